"""Rank and world size under torchrun, mpiexec or Slurm, and a key-value store between ranks.

Launchers announce ranks in environment variables. Sampling ranks share a key-value store and nothing else; training,
and scripts written for guided-diffusion, use torch.distributed on top of it. mpi4py is imported only under mpiexec.
"""

import atexit
import contextlib
import io
import json
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from .errors import AGAIN, InputError, first_line, log, reading, shown
from .runtime import default_device

# launcher, then its variables for rank, number of ranks and rank within the machine. Slurm's are those of a job step:
# a plain `python` in an sbatch script or an salloc shell sees the job's (SLURM_PROCID, SLURM_NTASKS) too.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

# Seconds.
HEARTBEAT_INTERVAL = 1.0
HEARTBEAT_TIMEOUT = 60.0  # silence after which a rank counts as dead; launchers notice sooner, plain srun never does
STARTUP_TIMEOUT = 900.0  # the same before its first heartbeat: on a busy cluster, importing torch may take minutes
PATIENCE = 10.0  # of waiting for other ranks at start-up, after which a line says for whom
POLL = 0.1  # between looks at the store while waiting for another rank


@dataclass(frozen=True)
class Ranks:
    """rank: this process, 0 to world_size - 1; local_rank: its number on this machine; launcher: what started it.

    advice: what to do if the variables are left from another run, the end of an error's sentence.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""
    advice: str = field(default="", compare=False, repr=False)


def ranks() -> Ranks:
    """Read the `Ranks` of this process from the environment; a single one without a launcher's variables.

    Raises InputError for inconsistent variables, such as leftovers of another run.
    """
    env = os.environ
    for launcher, rank, size, local in LAUNCHERS:
        if rank not in env or size not in env:
            continue
        if rank == "PMI_RANK" and (env[rank], env[size]) == (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")):
            continue  # srun speaks PMI for programs that want MPI; this one does not
        number, count, place = (_variable(name, 0, 0, 1 << 20) for name in (rank, size, local))
        advice = f"; started without {launcher}, unset {rank} and {size}"
        if number >= count:
            raise InputError(f"the environment has {rank}={number}, which is no rank of {size}={count}{advice}")
        if launcher == "torchrun" and count > 1:
            if not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
                raise InputError(f"the environment has {rank} and {size}, but no MASTER_ADDR and MASTER_PORT{advice}")
            advice = f" at {env['MASTER_ADDR']}:{_variable('MASTER_PORT', 0, 1, 65535)}{advice}"
        return Ranks(number, count, place, launcher, advice)
    return Ranks()


def _variable(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
        reason = f"it must be a whole number from {least} to {most}"
        raise InputError(f"the environment variable {name} is {shown(text)}; {reason}")
    return int(text)


# ---- the common store -----------------------------------------------------------------------------------------------


def open_store(me: Ranks) -> Any:
    """A key-value store that all ranks share (torch.distributed.Store), or None for a single process.

    Raises InputError where the ranks cannot reach each other within STARTUP_TIMEOUT.
    """
    if me.world_size == 1:
        return None
    this, others = f"rank {me.rank} of {me.world_size}", f"the other {me.world_size - 1}" if me.rank == 0 else "rank 0"
    said = f"{this} has been waiting for {others} for {PATIENCE:.0f} seconds, and will for {STARTUP_TIMEOUT:.0f}"
    notice = threading.Timer(PATIENCE, log.warning, ["%s%s", said, me.advice])
    notice.daemon = True
    notice.start()
    try:
        open_it = {"torchrun": _torchrun_store, "mpiexec": _mpi_store, "srun": _slurm_store}[me.launcher]
        store = open_it(me, timedelta(seconds=STARTUP_TIMEOUT))
    except RuntimeError as error:
        raise InputError(f"{this} cannot reach the others: {first_line(error)}{me.advice}") from None
    finally:
        notice.cancel()
    store.set_timeout(timedelta(days=1))
    return store


def _torchrun_store(me, timeout):
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return PrefixStore("sddm", store)  # the launcher keeps entries of its own in the same store


def _slurm_store(me, timeout):
    env = os.environ
    several = env.get("SLURM_STEP_NUM_NODES", "1") != "1"
    host = _first_host(env.get("SLURM_STEP_NODELIST", "localhost")) if several else "127.0.0.1"
    job, step = (_variable(name, 0, 0, 1 << 60) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # A port that all ranks can compute, below those that systems give to outgoing connections.
    port = _variable("MASTER_PORT", 20000 + (job * 7 + step) % 12000, 1, 65535)
    return _tcp_store(env.get("MASTER_ADDR", host), port, me, timeout)


def _mpi_store(me, timeout):
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InputError(f"mpiexec needs a working mpi4py (pip install mpi4py): {error}; torchrun needs none") from None
    world = MPI.COMM_WORLD
    if world.Get_size() != me.world_size:
        raise InputError(
            f"mpiexec started {me.world_size} processes and mpi4py sees {world.Get_size()}: mpi4py was built for "
            "another MPI than this mpiexec (reinstall it, or use torchrun), or the environment is another run's"
        )
    hosts = world.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    # Ranks connect only once the port is known.
    store = _tcp_store(host, 0, me, timeout) if me.rank == 0 else None
    port = world.bcast(store.port if store else None)
    return store or _tcp_store(host, port, me, timeout)


def _tcp_store(host, port, me, timeout):
    return TCPStore(host, port, me.world_size, is_master=me.rank == 0, wait_for_workers=False, timeout=timeout)


def _first_host(nodelist):
    """The first host of a Slurm list like "node[003-010,012],gpu1"."""
    name, number = re.findall(r"([^\[,]*)(?:\[([0-9]+))?", nodelist)[0]
    return name + number


def abort(me: Ranks, status: int = 1) -> None:
    """End all ranks of an MPI run, where the others would wait forever. Other launchers do so themselves."""
    if me.launcher == "mpiexec" and me.world_size > 1:
        with contextlib.suppress(ImportError):  # the reason for the end, on all ranks
            from mpi4py import MPI

            time.sleep(1)  # where a rank has died, the launcher ends the others itself, and says which it was
            MPI.COMM_WORLD.Abort(status)


# ---- messages between ranks -----------------------------------------------------------------------------------------


class Stopped(Exception):
    """Another rank ended the run and has said why."""


class Peers:
    """Messages between the ranks of a run in a common store; it has the fields of `Ranks`.

    Ranks above 0 send heartbeats, and rank 0 checks them in `watch`. Methods raise InputError where the store is lost.
    """

    def __init__(self, me: Ranks, store: Any) -> None:
        self.rank, self.world_size, self.local_rank, self.launcher = me.rank, me.world_size, me.local_rank, me.launcher
        self._store = HashStore() if store is None else store
        self._leaving = threading.Event()
        self._watched_at = time.monotonic()
        self._beats = dict.fromkeys(range(1, me.world_size), 0) if me.rank == 0 else {}
        self._silence = dict.fromkeys(self._beats, 0.0)
        if me.rank:
            beating = threading.Thread(target=self._beat, daemon=True)
            beating.start()
            # Python kills daemon threads at exit, and one inside the store takes the process down with std::terminate.
            atexit.register(lambda: (self._leaving.set(), beating.join(timeout=5)))

    def _call(self, method, *arguments):
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:
            owner = "the launcher" if self.launcher == "torchrun" else "rank 0"
            lost = f"rank {self.rank} of {self.world_size} lost contact with {owner}"
            raise InputError(f"{lost}, which has ended or cannot be reached; {AGAIN}") from error

    def _beat(self):
        with contextlib.suppress(RuntimeError):  # the rank itself finds out at its next message
            while not self._leaving.wait(HEARTBEAT_INTERVAL):
                self._store.add(f"beats/{self.rank}", 1)

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a common counter, which begins at 0; returns the new value."""
        return self._call("add", key, amount)

    def publish(self, key: str, value: Any) -> None:
        """Give all ranks a JSON value."""
        self._call("set", key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """The JSON value that a rank publishes under a key, waited for."""
        while not self._call("check", [key]):
            self.watch()
            time.sleep(POLL)
        return json.loads(self._call("get", key))

    def watch(self) -> None:
        """Raise Stopped where another rank has ended the run, and InputError on rank 0 where one has died silently."""
        if self.world_size == 1:
            return
        if self.stopped():
            raise Stopped
        # A suspended process has not listened: the time between two looks counts as one beat at most.
        elapsed = min(time.monotonic() - self._watched_at, HEARTBEAT_INTERVAL)
        self._watched_at = time.monotonic()
        for rank in self._beats:
            beats = self.count(f"beats/{rank}", 0)
            self._silence[rank] = 0.0 if beats != self._beats[rank] else self._silence[rank] + elapsed
            self._beats[rank] = beats
            silent = self._silence[rank]
            dead = silent > (HEARTBEAT_TIMEOUT if beats else STARTUP_TIMEOUT)
            if dead and not self._call("check", [f"left/{rank}"]):
                lost = f"rank {rank} of {self.world_size} has given no sign of life for {silent:.0f} seconds"
                raise InputError(f"{lost}; {AGAIN}")

    def stop(self, reason: str) -> bool:
        """End the run for all ranks; returns whether no other rank has given this reason yet."""
        with contextlib.suppress(InputError):
            first = self.count(f"reason/{reason}") == 1
            self._call("set", "stopped", "1")
            return first
        return True

    def stopped(self) -> bool:
        """Whether a rank has ended the run."""
        return self._call("check", ["stopped"])

    def interrupted(self) -> bool:
        """End the run after a signal, which mostly reaches all ranks; returns whether this one is to report it."""
        with contextlib.suppress(InputError):
            return not self.stopped() and self.stop("interrupted")
        return True  # the store is gone, and with it the rank or launcher that had it

    def leave(self) -> None:
        """Announce that this rank has published everything; the last call."""
        if self.world_size == 1:
            return
        self._leaving.set()
        with contextlib.suppress(InputError):
            if self.rank:
                self._call("set", f"left/{self.rank}", "1")
            elif self.launcher == "srun" and self.stopped():
                # The store lives in this process: the others have a moment to see in it that the run is over.
                until = time.monotonic() + 5
                while time.monotonic() < until and not self._call("check", [f"left/{rank}" for rank in self._beats]):
                    time.sleep(POLL)


def connect(me: Ranks) -> Peers:
    """The `Peers` of this process."""
    return Peers(me, open_store(me))


# ---- guided-diffusion's interface: torch.distributed ----------------------------------------------------------------


def setup_dist(*args: Any, **kwargs: Any) -> None:
    """Join torch's default process group, of one for a process without a launcher; do nothing where it exists.

    args, kwargs: not used; forks pass parsed arguments or device numbers, which the launcher determines here.
    """
    if not torch.distributed.is_initialized():
        me = ranks()
        device = default_device(me.local_rank)
        join_ranks(me, device if device.type == "cuda" else torch.device("cpu"))


def join_ranks(me: Ranks, device: torch.device) -> None:
    """Make torch's default process group of all ranks: NCCL for a GPU, gloo for the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = open_store(me) or HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size)


def dev() -> torch.device:
    """The device of tensors in the process group: this process's GPU, else the CPU (MPS has no collectives)."""
    on_gpu = default_device().type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Load a file or blobfile address as torch.load with `weights_only` does, or a `.safetensors` file, on any rank.

    kwargs: torch.load's. Raises InputError where the file cannot be read, or not without running code.
    """
    from .references import open_binary

    with reading(path):
        with open_binary(path) as file:
            content = file.read()
        if content[8:9] == b"{":  # after the header's length, as safetensors begin
            from safetensors.torch import load

            return {name: tensor.to(kwargs.get("map_location") or "cpu") for name, tensor in load(content).items()}
        try:
            return torch.load(io.BytesIO(content), **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} cannot be loaded without running code from it: {first_line(error)}") from None


def sync_params(params: Iterable[torch.Tensor]) -> None:
    """Give all processes the tensors of rank 0; nothing happens in a process without a group."""
    dist = torch.distributed
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for parameter in params:
            dist.broadcast(parameter, 0)
