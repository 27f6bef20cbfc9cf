"""Open the save folder of a run: check its record, find out what is missing, and plan the batches."""

import contextlib
import glob
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, display_name, one_line
from ..image_datasets import Reference
from . import journal, record
from .files import remove_files, remove_temporaries
from .job import Job
from .sources import Source

AUTO_BATCH = {"cuda": 32, "mps": 8, "cpu": 8}
"""First batch size tried with batch_size="auto"; it is halved while memory does not suffice."""

log = logging.getLogger("sddm")


@dataclass(frozen=True)
class Plan:
    """Outputs that are left to make in an open save folder.

    batches: keys in their company, those with at least one missing output. skipped: number of outputs that exist.
    record: the entries of run.json, on rank 0.
    """

    image_size: int
    batches: list[list[str]]
    skipped: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    def image_steps(self, steps: int) -> int:
        """Number of image-steps of the whole run, over all ranks."""
        return steps * sum(map(len, self.batches))


def open_plan(job: Job, image_size: int, settings: dict[str, Any]) -> Plan:
    """Lock a job's folder, check it against run.json, write the record, and return what is left to make.

    image_size: side of the images in pixels; settings: all that determines the outputs, for the record. Rank 0 does
    this, the others wait for it. Raises InputError for a folder that is in use, or holds another run.
    """
    if job.peers.rank:
        batches = job.peers.wait_for("plan")
        job.folder.watch()
        return Plan(image_size, batches)
    job.folder.lock()
    try:
        plan = _open(job, image_size, settings)
    except BaseException:
        job.folder.release()
        raise
    job.peers.publish("plan", plan.batches)
    return plan


def _open(job, image_size, settings):
    options, folder = job.options, job.folder
    batch_size = options.batch_size
    if isinstance(batch_size, str):
        batch_size = AUTO_BATCH.get(job.device.type, AUTO_BATCH["cpu"])
    if options.overwrite:
        _forget(job)
    old = record.read(folder.path)
    if old is None:
        _refuse_foreign(job)
    else:
        record.check_same(folder.path, old["settings"], settings)
        _report_versions(old["versions"])
    remove_temporaries(folder.path)
    remove_files(glob.glob(os.path.join(glob.escape(folder.path), ".monitor-*.json")))  # of version 0.2
    present = {key for key, item in job.items.items() if job.exists(item)}
    recorded = {entry["key"]: entry["source"] for entry in journal.entries(folder.path)}
    changed = changed_sources(job.source, {key: job.items[key].reference for key in present}, recorded)
    job.discard(changed)
    present -= changed
    missing = job.items.keys() - present
    journal.gather(folder, keep=lambda entry: entry["key"] not in missing)
    old_plan = old["plan"] if old else []
    if old and old["batch_size"] != batch_size:
        old_plan = [kept for batch in old_plan if (kept := [key for key in batch if key not in missing])]
    # The batches of an earlier plan stay as they are; keys that are new to it are added.
    placed = {key for batch in old_plan for key in batch}
    rest = [key for key in job.items if key not in placed]
    batches = [*old_plan, *(rest[i : i + batch_size] for i in range(0, len(rest), batch_size))]
    content = {
        "format": record.FORMAT,
        "settings": settings,
        "versions": record.versions(),
        "base_samples": job.source.base or os.devnull,
        "device": str(job.device),
        "processes": job.peers.world_size,
        "started": old["started"] if old else now(),
        "seconds": old["seconds"] if old else 0.0,
        "finished": None,
        "batch_size": batch_size,
        "plan": batches,
    }
    record.write(folder, content)
    # References that are gone stay in the plan, so that it lists all that the run wrote, but are not wanted.
    wanted = [[key for key in batch if key in job.items] for batch in batches if not missing.isdisjoint(batch)]
    return Plan(image_size, wanted, len(present), content)


def changed_sources(source: Source, references: dict[str, Reference], recorded: dict[str, Any]) -> set[str]:
    """Keys of outputs whose source has other content than the one that they were made from; says so in a log line.

    references: of the outputs that exist, by key. recorded: fingerprints of the sources of outputs, by key. Outputs
    without one, as version 0.2 left them, and those whose source cannot be read any more, do not count.
    """
    unique = {reference.name: reference for reference in references.values()}
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(unique, pool.map(source.fingerprint, unique.values())))
    now = {key: found[reference.name] for key, reference in references.items() if found[reference.name] is not None}
    changed = {key for key, value in now.items() if key in recorded and recorded[key] != value}
    unknown = now.keys() - recorded.keys()
    groups = {"made again, because their sources have changed": changed}
    groups["kept, although their sources are not recorded"] = unknown
    for words, keys in groups.items():
        if keys:
            example = display_name(references[min(keys)].name)
            log.warning("outputs that are %s: %d, such as %s", words, len(keys), example)
    return changed


def _refuse_foreign(job):
    """Raise InputError where an output of a new run would replace a file."""
    for path in [*(path for key in job.items for path in job.paths(key)[:1]), *job.own_files()]:
        if os.path.lexists(path):
            name = display_name(os.path.relpath(path, job.folder.path))
            reason = f"{name} is already present, and no {record.NAME} of a run that wrote it; give another folder"
            raise InputError(f"{reason}, or `overwrite` True", parameter="save_dir", value=job.folder.path)


def _forget(job):
    """Remove what an earlier run wrote, so that nothing of it is taken for this one's."""
    old = None
    with contextlib.suppress(InputError):
        old = record.read(job.folder.path)
    wanted = [path for key in job.items for path in job.paths(key)]
    if old is not None:
        count = old["settings"].get("samples_per_image", 1)
        wanted += [path for batch in old["plan"] for key in batch for path in job.paths(key, count)]
    job.refuse_protected(wanted)
    # The record goes last: a run that is killed in here is still known for what it is.
    inside = [path for path in wanted if job.holds(os.path.dirname(path))]
    remove_files([*inside, *journal.parts(job.folder.path), *job.own_files()])


def _report_versions(old: dict[str, str]) -> None:
    changed = [f"{name} {old.get(name)} -> {new}" for name, new in record.versions().items() if old.get(name) != new]
    if changed:
        log.info("other versions than the run began with: %s", one_line(", ".join(changed)))


def now() -> str:
    """The time in UTC, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
