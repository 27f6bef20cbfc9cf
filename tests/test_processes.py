"""Sampling as processes: killed, interrupted, many of them, on folders and disks as they are.

Every process runs without mpi4py where no mpiexec is involved: an import of it fails.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from scripts_in_process import run_script
from tiny import assert_within_one_level, command, files, make_model, make_references, pictures, record

MPIEXEC = Path(sys.executable).parent / "mpiexec"
NAMES = [f"{n}.png" for n in range(6)]
LIMIT = 600  # seconds after which a process hangs
STEPS = 40  # of runs that something happens to: an image takes a third of a second


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, references, a package mpi4py that cannot be imported, and the folder of an unbroken run."""
    root = tmp_path_factory.mktemp("data")
    make_model(root / "model.safetensors")
    make_references(root / "ref", NAMES)
    (root / "without_mpi").mkdir()
    (root / "without_mpi" / "mpi4py.py").write_text("raise ImportError('there is no MPI on this machine')")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes; rounding depends on it
    flags = command(root / "model.safetensors", root / "ref", root / "out", "--batch_size", 1, steps=STEPS)
    assert run_script("ae_sample", *flags[2:]) == 0
    torch.set_num_threads(threads)
    return root


def start(*flags, data, out, base=None, launcher=(), mpi=False, variables=(), steps=STEPS, **options):
    """A process group of its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **dict(variables)}
    if not mpi:
        environment["PYTHONPATH"] = str(data / "without_mpi")
    given = command(data / "model.safetensors", base or data / "ref", out, "--batch_size", 1, *flags, steps=steps)
    if launcher[:1] == (sys.executable,):
        given = given[1:]  # the launcher calls the interpreter
    return subprocess.Popen(
        [*map(str, launcher), *given], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=data, **options,
    )  # fmt: skip


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
MPI = (MPIEXEC, "-n", "2")


def finish(process):
    """The finished process with what it said."""
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for(condition, process):
    """Wait until condition() holds, which must be before the process ends."""
    until = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def made(out):
    return len(list(out.glob("[0-9].png")))


def words(pid):
    """The command line of a process; "" for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def ranks_of(out):
    """Process ids of the ranks that write to a folder, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            variables = dict(each.partition("=")[::2] for each in (entry / "environ").read_text().split("\0"))
            rank = variables.get("RANK", variables.get("PMI_RANK"))
            if rank and str(out) in words(entry.name):
                found[int(rank)] = entry.name
    return found


def test_killed_and_restarted_runs_end_as_an_unbroken_one(data, tmp_path):
    """SIGKILL while an image is made, and when all are there but the rest is not."""
    out = tmp_path / "out"
    moments = [lambda: made(out) >= 2, lambda: made(out) >= 6]
    for moment in moments:
        process = start(data=data, out=out)
        wait_for(moment, process)
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
    done = finish(start(data=data, out=out))
    assert done.returncode == 0, done.stderr
    assert files(out) == files(data / "out")
    found, wanted = record(out), record(data / "out")
    for name in ("settings", "plan", "counts", "versions", "batch_size"):
        assert found[name] == wanted[name]
    # At most the images in flight at the kills were sampled again: one each.
    assert wanted["monitor"]["images"] == 6 and 6 <= found["monitor"]["images"] <= 8
    assert "6 already present" in done.stdout


def test_an_interrupted_run_says_how_to_go_on(data, tmp_path):
    out = tmp_path / "out"
    process = start(data=data, out=out)
    wait_for(lambda: made(out) >= 1, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr
    count = made(out)
    last = done.stderr.splitlines()[-1]
    assert last == f"interrupted: {count} of 6 images are done; run the same command again to resume" and 1 <= count < 6
    assert all(files(data / "out")[name] == image for name, image in files(out).items() if name[0] != ".")
    done = finish(start(data=data, out=out))
    assert done.returncode == 0 and f"{6 - count} done, {count} already present, 0 failed" in done.stdout
    assert files(out) == files(data / "out")


def test_an_interruption_while_starting_is_one_line_too(data, tmp_path):
    process = start(data=data, out=tmp_path / "out")
    wait_for(lambda: b"torch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and done.stderr == "interrupted; run the same command again to resume\n"


@pytest.mark.parametrize("redirection, flags, status", [("<&- >&- 2>&-", [], 0), ("2>&1 | true", ["--area", 5], 2)])
def test_streams_that_are_closed_change_nothing_but_what_is_said(data, tmp_path, redirection, flags, status):
    """All are closed; or the reader of both is gone."""
    launcher = ("bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash")
    done = finish(start(*flags, data=data, out=tmp_path / "out", launcher=launcher, steps=6))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert status or (made(tmp_path / "out") == 6 and record(tmp_path / "out")["finished"])


def as_slurm(rank):
    """What srun tells the processes of a step of two tasks on one machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
    }  # fmt: skip


@pytest.mark.parametrize("launcher", [TORCHRUN, MPI, ()], ids=["torchrun", "mpiexec", "srun"])
def test_two_processes_make_what_one_makes(data, tmp_path, launcher):
    out, variables = tmp_path / "out", [()] if launcher else [as_slurm(rank) for rank in range(2)]
    started = [start(data=data, out=out, launcher=launcher, mpi=launcher is MPI, variables=each) for each in variables]
    done = [finish(process) for process in started]
    assert not any(process.returncode for process in done), done
    said = "".join(process.stdout + process.stderr for process in done)
    assert_within_one_level(pictures(out), pictures(data / "out"))
    assert record(out)["processes"] == 2 and record(out)["counts"]["outputs"] == 6 == record(out)["monitor"]["images"]
    assert files(out).keys() == files(data / "out").keys()
    assert said.count("6 done, 0 already present, 0 failed") == 1  # one rank speaks for all
    assert said.count("100%, 6/6 images") == 1


@pytest.mark.parametrize("launcher, rank", [(TORCHRUN, 1), (MPI, 0)], ids=["torchrun", "mpiexec"])
def test_a_rank_that_dies_takes_the_run_down_and_a_restart_completes_it(data, tmp_path, launcher, rank):
    out = tmp_path / "out"
    process = start(data=data, out=out, launcher=launcher, mpi=launcher is MPI)
    wait_for(lambda: made(out) >= 1 and len(ranks_of(out)) == 2, process)
    ranks = ranks_of(out)
    os.kill(int(ranks[rank]), signal.SIGKILL)
    done = finish(process)
    assert done.returncode not in (0, 130)
    until = time.monotonic() + LIMIT  # a launcher may end a moment before its ranks are gone
    while any(map(words, ranks.values())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(words, ranks.values()))
    said = done.stdout + done.stderr
    if launcher is MPI:
        assert "BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES" in said and f"PID {ranks[rank]} " in said
    else:
        assert f"Signal 9 (SIGKILL) received by PID {ranks[rank]}" in said
        count = made(out)
        assert (
            f"ended by SIGTERM, as launchers do when another process has died: {count} of 6 images are done; "
            "run the same command again to resume\n" in said
        )
    count = made(out)
    assert count < 6
    done = finish(start(data=data, out=out))
    assert done.returncode == 0 and f"{6 - count} done, {count} already present, 0 failed" in done.stdout
    assert files(out).keys() == files(data / "out").keys()
    assert_within_one_level(pictures(out), pictures(data / "out"))


def test_ranks_with_different_flags_are_one_line(data, tmp_path):
    """A wrapper around the command gives every rank a seed of its own."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        "sys.argv = [*sys.argv[1:], '--seed', os.environ['RANK']]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = finish(start(data=data, out=tmp_path / "out", launcher=(*TORCHRUN, wrapper)))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: rank 1 was started with --seed 1, rank 0 with 0; all ranks need the same flags"]


def test_without_a_launcher_that_watches_the_others_notice(data, tmp_path):
    """Slurm's ranks, where rank 0 dies while rank 1 makes images, which its umask tells."""
    slow = {"data": data, "out": tmp_path / "out", "steps": 5 * STEPS}  # rank 0 must not do all before rank 1 starts
    both = [start(**slow, variables=as_slurm(rank), umask=umask) for rank, umask in enumerate((0o022, 0o077))]
    wait_for(lambda: any(p.stat().st_mode & 0o077 == 0 for p in slow["out"].glob("[0-9].png")), both[0])
    both[0].kill()
    done = finish(both[1])
    assert done.returncode == 2 and done.stderr == (
        "error: rank 1 of 2 lost contact with rank 0, which has ended or cannot be reached; "
        "run the same command again to resume\n"
    )
    finish(both[0])


def test_a_rank_that_ends_amid_its_heartbeats_ends_well():
    """Python's exit kills daemon threads; one within a store would end the process with SIGABRT."""
    code = (
        "from torch.distributed import HashStore; from guided_diffusion import dist_util; import time\n"
        "dist_util.HEARTBEAT_INTERVAL, store = 0.0, HashStore()\n"
        "ranks = [dist_util.Peers(dist_util.Ranks(rank, 9), store) for rank in range(1, 9)]\n"
        "time.sleep(0.3)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
