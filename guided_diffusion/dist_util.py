"""Rank and world size under torchrun, mpiexec or Slurm, and a key-value store between ranks.

torchrun, mpiexec (MPICH, Open MPI, Intel MPI) and Slurm's srun announce ranks in environment variables. Sampling ranks
share a key-value store and nothing else; mpi4py is imported only under mpiexec. Training, and scripts written for
guided-diffusion, use torch.distributed on top of it: `setup_dist`.
"""

import io
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError, first_line, shown
from .runtime import default_device

if TYPE_CHECKING:
    from collections.abc import Iterable

# launcher, then its variables for rank, number of ranks and rank within the machine. Slurm's are those of a job step:
# a plain `python` in an sbatch script or an salloc shell sees the job's (SLURM_PROCID, SLURM_NTASKS) too.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

HEARTBEAT_INTERVAL = 1.0
"""Seconds between the signs of life of a rank."""
HEARTBEAT_TIMEOUT = 60.0
"""Seconds without one after which a rank counts as dead. Launchers notice sooner; plain srun does not notice at all."""
STARTUP_TIMEOUT = 900.0
"""The same before its first sign: on a busy cluster, importing torch alone may take minutes. See `startup_timeout`."""
PATIENCE = 10.0
"""Seconds of waiting for other ranks at start-up after which a line says for whom."""
POLL = 0.1
"""Seconds between looks at the store while waiting for another rank."""

log = logging.getLogger("sddm")


@dataclass(frozen=True)
class Ranks:
    """rank: this process, 0 to world_size - 1; local_rank: its number on this machine; launcher: what started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""


def ranks() -> Ranks:
    """The `Ranks` of this process, read from the environment; alone where no launcher left its variables.

    Raises InputError for variables that make no sense, such as leftovers of another run.
    """
    env = os.environ
    for launcher, rank, size, local in LAUNCHERS:
        if rank not in env or size not in env:
            continue
        if rank == "PMI_RANK" and (env[rank], env[size]) == (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")):
            continue  # srun speaks PMI for programs that want MPI; this one does not
        try:
            found = Ranks(int(env[rank]), int(env[size]), int(env.get(local, 0)), launcher)
        except ValueError:
            raise InputError(f"the environment variables {rank}, {size} and {local} must be numbers") from None
        stale = f"; started without {launcher}, unset {rank} and {size}"
        if not 0 <= found.rank < found.world_size:
            raise InputError(f"the environment has {rank}={env[rank]}, which is no rank of {size}={env[size]}{stale}")
        if launcher == "torchrun" and found.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
            raise InputError(f"the environment has {rank} and {size}, but no MASTER_ADDR and MASTER_PORT{stale}")
        return found
    return Ranks()


def startup_timeout() -> float:
    """Seconds that ranks have to find each other: SDDM_STARTUP_TIMEOUT in the environment, else STARTUP_TIMEOUT."""
    text = os.environ.get("SDDM_STARTUP_TIMEOUT")
    if text is None:
        return STARTUP_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(
            f"the environment variable SDDM_STARTUP_TIMEOUT is {shown(text)}; it must be a number of seconds"
        )
    return seconds


# ---- the common store -----------------------------------------------------------------------------------------------


def open_store(me: Ranks, timeout: timedelta = timedelta(days=1)) -> Any:
    """A key-value store that all ranks share (torch.distributed.Store), or None for a single process.

    timeout: of later requests. Raises InputError where the ranks cannot reach each other within `startup_timeout()`.
    """
    if me.world_size == 1:
        return None
    patience = timedelta(seconds=startup_timeout())
    notice = threading.Timer(PATIENCE, _say_who_is_missing, [me, patience.total_seconds()])
    notice.daemon = True
    notice.start()
    try:
        open_one = {"torchrun": _torchrun_store, "mpiexec": _mpi_store, "srun": _slurm_store}[me.launcher]
        store = open_one(me, patience)
    except RuntimeError as error:
        raise InputError(
            f"rank {me.rank} of {me.world_size} cannot reach the others: {first_line(error)}{_leftovers(me)}"
        ) from None
    finally:
        notice.cancel()
    store.set_timeout(timeout)
    return store


def _say_who_is_missing(me, seconds):
    others = f"the other {me.world_size - 1}" if me.rank == 0 else "rank 0"
    log.warning(
        "rank %d of %d has been waiting for %s for %.0f seconds, and will for %.0f%s",
        me.rank, me.world_size, others, PATIENCE, seconds, _leftovers(me),
    )  # fmt: skip


def _leftovers(me):
    """What to do where no launcher started this process and variables of another run make it wait."""
    for launcher, rank, size, _ in LAUNCHERS:
        if launcher == me.launcher and {rank, size} <= os.environ.keys():
            where = ""
            if launcher == "torchrun":
                where = f" at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"{where}; if {launcher} did not start this process, unset {rank} and {size}"
    return ""


def _torchrun_store(me, timeout):
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    # The launcher keeps entries of its own in the same store.
    return PrefixStore("sddm", store)


def _slurm_store(me, timeout):
    env = os.environ
    one_machine = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    host = "127.0.0.1" if one_machine else _first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    # A port that all ranks can work out, below those that systems give to outgoing connections.
    port = int(env.get("MASTER_PORT", 20000 + (job * 7 + step) % 12000))
    try:
        return _tcp_store(env.get("MASTER_ADDR", host), port, me, timeout)
    except RuntimeError as error:
        raise RuntimeError(f"{first_line(error)} (port {port}; MASTER_ADDR and MASTER_PORT choose another)") from None


def _mpi_store(me, timeout):
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InputError(f"mpiexec needs a working mpi4py (pip install mpi4py): {error}; torchrun needs none") from None
    ranks = MPI.COMM_WORLD
    if ranks.Get_size() != me.world_size:
        raise InputError(
            f"mpiexec started {me.world_size} processes and mpi4py sees {ranks.Get_size()}: mpi4py was built for "
            "another MPI than this mpiexec (reinstall it, or use torchrun), or the environment is another run's"
        )
    hosts = ranks.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    # Rank 0's is open before its port is told, so that nobody knocks too early.
    store = _tcp_store(host, 0, me, timeout) if me.rank == 0 else None
    port = ranks.bcast(store.port if store else None)
    return store or _tcp_store(host, port, me, timeout)


def _tcp_store(host, port, me, timeout):
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, me.world_size, is_master=me.rank == 0, wait_for_workers=False, timeout=timeout)


def _first_host(nodelist):
    """The first host of a Slurm list like "node[003-010,012],gpu1"."""
    name, bracket, rest = nodelist.partition("[")
    if not bracket or "," in name:
        return nodelist.split(",")[0]
    return name + rest.split("]")[0].split(",")[0].split("-")[0]


def abort(me: Ranks, status: int = 1) -> None:
    """End all ranks of an MPI run: the others would wait for this one for ever. Other launchers do so themselves."""
    if me.launcher == "mpiexec" and me.world_size > 1:
        try:
            from mpi4py import MPI
        except ImportError:  # which is the reason for the end, and true of all ranks
            return
        time.sleep(1)  # where a rank has died, the launcher ends the others itself, and says which it was
        MPI.COMM_WORLD.Abort(status)


# ---- messages between ranks -----------------------------------------------------------------------------------------


class Stopped(Exception):
    """Another rank ended the run and has said why."""


class LocalStore:
    """The part of torch.distributed.Store that `Peers` uses, for a single process."""

    def __init__(self) -> None:
        self._values = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> str:
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        self._values[key] = self._values.get(key, 0) + amount
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


class Peers:
    """This process among the ranks of a run, and the messages that they leave in a common store.

    Has the fields of `Ranks`. Ranks above 0 give signs of life; rank 0 looks for them whenever it calls `watch`.
    Every method raises InputError where contact to the store is lost.
    """

    def __init__(self, me: Ranks, store: Any) -> None:
        self.rank, self.world_size, self.local_rank, self.launcher = me.rank, me.world_size, me.local_rank, me.launcher
        self._startup = startup_timeout()
        self._store = LocalStore() if store is None else store
        self._leaving = threading.Event()
        self._watched_at = time.monotonic()
        self._beats = dict.fromkeys(range(1, me.world_size), 0) if me.rank == 0 else {}
        self._silence = dict.fromkeys(self._beats, 0.0)
        if me.rank:
            threading.Thread(target=self._beat, daemon=True).start()

    def _call(self, method, *arguments):
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:
            owner = "the launcher" if self.launcher == "torchrun" else "rank 0"
            raise InputError(
                f"rank {self.rank} of {self.world_size} lost contact with {owner}, which has ended or cannot be "
                "reached; run the same command again to resume"
            ) from error

    def _beat(self):
        try:
            while not self._leaving.wait(HEARTBEAT_INTERVAL):
                self._store.add(f"beats/{self.rank}", 1)
        except RuntimeError:  # the rank itself finds out at its next word to the others
            pass

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
        # A process that was suspended has not listened: time between two looks counts as one beat at most.
        elapsed = min(time.monotonic() - self._watched_at, HEARTBEAT_INTERVAL)
        self._watched_at = time.monotonic()
        for rank in self._beats:
            beats = self.count(f"beats/{rank}", 0)
            self._silence[rank] = 0.0 if beats != self._beats[rank] else self._silence[rank] + elapsed
            self._beats[rank] = beats
            if self._silence[rank] > (HEARTBEAT_TIMEOUT if beats else self._startup) and not self._call(
                "check", [f"left/{rank}"]
            ):
                raise InputError(
                    f"rank {rank} of {self.world_size} has given no sign of life for {self._silence[rank]:.0f} "
                    "seconds; run the same command again to resume"
                )

    def stop(self, reason: str) -> bool:
        """End the run for all ranks; returns whether no other rank has given this reason yet."""
        try:
            first = self.count(f"reason/{reason}") == 1
            self._call("set", "stopped", "1")
            return first
        except InputError:
            return True

    def stopped(self) -> bool:
        """Whether a rank has ended the run."""
        return self._call("check", ["stopped"])

    def interrupted(self, patience: float = 1.0) -> bool:
        """End the run because a signal came; returns whether this rank is the one to say so.

        Mostly the signal comes to all, and rank 0 speaks. Another rank waits `patience` seconds for that: rank 0 may be
        what died, or may not have been meant. A launcher that ends the run because a rank has failed sends signals too;
        then all is said.
        """
        until = time.monotonic() + (patience if self.rank else 0)
        try:
            while not self.stopped():
                if time.monotonic() >= until:
                    return self.stop("interrupted")
                time.sleep(POLL)
            return False
        except InputError:  # the store is gone, and with it the rank or launcher that had it
            return True

    def leave(self) -> None:
        """The last call: this rank has published all that it had to."""
        if self.world_size == 1:
            return
        self._leaving.set()
        try:
            if self.rank:
                self._call("set", f"left/{self.rank}", "1")
            elif self.launcher == "srun" and self.stopped():
                # The store lives in this process: the others have a moment to see in it that the run is over.
                until = time.monotonic() + 5
                while time.monotonic() < until and not self._call("check", [f"left/{rank}" for rank in self._beats]):
                    time.sleep(POLL)
        except InputError:
            pass


def connect(me: Ranks) -> Peers:
    """The `Peers` of this process."""
    return Peers(me, open_store(me))


# ---- guided-diffusion's interface: torch.distributed ----------------------------------------------------------------


def setup_dist(*args: Any, **kwargs: Any) -> None:
    """Join the ranks that torchrun, mpiexec or Slurm started in torch's default process group; a process started by
    hand makes a group of one. Nothing happens where the group exists. NCCL serves GPUs, gloo CPUs.

    args, kwargs: not used; forks pass parsed arguments or device numbers, which the launcher determines here.
    """
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if dist.is_initialized():
        return
    me = ranks()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(me.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=open_store(me) or HashStore(), rank=me.rank, world_size=me.world_size)


def dev() -> torch.device:
    """The device of tensors in the process group: this process's GPU, else the CPU (MPS has no collectives)."""
    if default_device().type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """What torch.load makes of a file or blobfile address; `.safetensors` works, too. kwargs are torch.load's.

    Nothing in the file is executed: `weights_only` is always True. Any rank may call it on its own; each reads the
    file. Raises InputError where it cannot be read, or not without running code.
    """
    import pickle

    try:
        if "://" in path:
            import blobfile

            with blobfile.BlobFile(path, "rb") as blob:
                file = io.BytesIO(blob.read())
        else:
            file = open(path, "rb")  # noqa: SIM115 - closed below
        with file:
            start = file.read(10)
            file.seek(0)
            if start[8:9] == b"{":  # after the header's length, as safetensors begin
                from safetensors.torch import load

                state = load(file.read())
                return {name: tensor.to(kwargs.get("map_location") or "cpu") for name, tensor in state.items()}
            return torch.load(file, **{**kwargs, "weights_only": True})
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be loaded without running code from it: {first_line(error)}") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def sync_params(params: "Iterable[torch.Tensor]") -> None:
    """Give all processes the tensors of rank 0; nothing happens in a process without a group."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for parameter in params:
            dist.broadcast(parameter, 0)
