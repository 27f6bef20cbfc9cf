"""What sampling costs and what its guided steps do, for run.json: summed over images, processes and restarts.

Every process keeps its sums in a hidden file of its own in the save folder, written anew after each batch, so that a
killed run loses none; at the end rank 0 adds them up. Nothing is read from the device before a batch is done.
"""

import glob
import json
import os
import time
from collections import defaultdict

import torch

from . import files as outputs
from . import record as run_record

COLUMNS = ("count", "tangent", "normal", "negative")  # of a step's sums; the weights of the directions follow
EMPTY = {"images": 0, "seconds": 0.0, "evaluations": 0, "steps": {}}


class Monitor:
    """Watches the sampler of an engine.Job.

    Made before `Job.prepare`, because that begins a new record; then, in this order: `begin`, `counted` and `watch` for
    what the job runs, and `finish` after `Job.finish`.
    """

    def __init__(self, job):
        self.job, self.folder = job, job.options.save_dir
        self.own = self._part(f"{job.peers.rank}-{os.getpid()}-{time.time_ns()}")
        self.sums, self.calls = EMPTY, 0
        self.earlier = None
        if job.peers.rank == 0 and not job.options.overwrite:
            self.earlier = _read(os.path.join(self.folder, run_record.NAME)).get("monitor")

    def _part(self, name):
        return os.path.join(self.folder, f".monitor-{name}.json")

    def _parts(self):
        return glob.glob(os.path.join(glob.escape(self.folder), ".monitor-*.json"))

    def begin(self):
        """After `Job.prepare`: take over what earlier runs of this record have measured (rank 0)."""
        if self.job.peers.rank:
            return
        # Parts that are in the record's sums already are there because a run was killed while it removed them.
        counted = {self._part(name) for name in self.earlier["parts"]} if self.earlier else ()
        for path in self._parts():
            if self.job.options.overwrite or path in counted:
                os.remove(path)
        if self.earlier:
            outputs.write_json(self._part("earlier"), {name: self.earlier[name] for name in EMPTY})

    def counted(self, model):
        """The model, its evaluations counted."""

        def call(*arguments):
            self.calls += 1
            return model(*arguments)

        return call

    def watch(self, sampler, guided=False):
        """A sampler whose batches are measured; guided: it has an argument `monitor`, as `sddm.sample`."""

        def run(ref, **options):
            steps, self.calls, started = [], 0, time.monotonic()
            if guided:
                options["monitor"] = lambda i, record: steps.append((i, record))
            x = sampler(ref, **options)
            x.flatten()[-1].item()  # a GPU has not finished before
            done = {
                "images": len(ref),
                "seconds": time.monotonic() - started,
                "evaluations": self.calls * len(ref),
                "steps": _sums_of_steps(steps),
            }
            self.sums = _added([self.sums, done])
            outputs.write_json(self.own, self.sums)
            return x

        return run

    def finish(self):
        """After `Job.finish`: add everything up in run.json (rank 0; nothing where the run did not finish)."""
        record = self.job.record if self.job.peers.rank == 0 else {"finished": None}
        if record["finished"] is None:
            return
        parts = self._parts()
        total = _added([_read(path) for path in parts])
        images = total["images"]
        record |= {
            "negative_impact": _share_of_negative(total["steps"].values()),
            "model_evaluations": total["evaluations"] / images if images else None,
            "seconds_per_image": round(total["seconds"] / images, 6) if images else None,
            "monitor": {**total, "parts": [os.path.basename(path)[len(".monitor-") : -len(".json")] for path in parts]},
        }
        outputs.write_json(os.path.join(self.folder, run_record.NAME), record)
        for path in parts:
            os.remove(path)


def curves(record):
    """Means over images of what a run's guided steps did, in the order of sampling.

    record: the content of a run.json. Returns a list of dicts: `i`, `tangent` and `normal` (Euclidean norms of the
    score's parts), `negative` (share of negative inner products), `weights` (of the score and of every energy).
    """
    steps = record.get("monitor", EMPTY)["steps"]
    result = []
    for i in sorted(map(int, steps), reverse=True):
        count, tangent, normal, negative, *weights = steps[str(i)]
        means = {"tangent": tangent / count, "normal": normal / count, "negative": negative / count}
        result.append({"i": i, **means, "weights": [weight / count for weight in weights]})
    return result


def _sums_of_steps(steps):
    """Sums over images of the records of one batch: step -> [count, tangent, normal, negative, *weights]."""
    if not steps:
        return {}
    tables = {
        name: torch.stack([record[name].float() for _, record in steps]).sum(1).tolist()
        for name in ("tangent", "normal", "negative", "weights")
    }
    sums = defaultdict(lambda: None)
    for row, (i, record) in enumerate(steps):
        values = [len(record["tangent"]), *(tables[name][row] for name in COLUMNS[1:]), *tables["weights"][row]]
        sums[str(i)] = values if sums[str(i)] is None else [a + b for a, b in zip(sums[str(i)], values)]
    return dict(sums)


def _added(parts):
    """The sum of several processes' sums."""
    total = {**EMPTY, "steps": {}}
    for part in parts:
        for name in ("images", "seconds", "evaluations"):
            total[name] += part[name]
        for i, values in part["steps"].items():
            known = total["steps"].get(i)
            total["steps"][i] = values if known is None else [a + b for a, b in zip(known, values)]
    return total


def _share_of_negative(steps):
    count = sum(values[0] for values in steps)
    return sum(values[COLUMNS.index("negative")] for values in steps) / count if count else None


def _read(path):
    """A JSON object; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
