"""Which process this is among how many, whatever launched them, and the little that they tell each other.

torchrun, mpiexec (MPICH, Open MPI, Intel MPI) and Slurm's srun announce ranks in environment variables. Sampling ranks
share a key-value store and nothing else; mpi4py is imported only under mpiexec.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch

from .errors import UserError

# launcher, then its variables for rank, number of ranks and rank within the machine. Slurm's are those of a job step:
# a plain `python` in an sbatch script or an salloc shell sees the job's (SLURM_PROCID, SLURM_NTASKS) too.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

BEAT = 1.0
"""Seconds between signs of life that a rank gives."""
SILENCE = 60.0
"""Seconds without one after which a rank counts as dead. Launchers notice sooner; plain srun does not notice at all."""
LATE = 900.0
"""The same before its first sign: on a busy cluster, importing torch alone may take minutes."""
POLL = 0.1
"""Seconds between looks at the store while waiting for another rank."""


@dataclass(frozen=True)
class Ranks:
    """rank: this process, 0 to world_size - 1; local_rank: its number on this machine; launcher: what started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""


def ranks():
    """The `Ranks` of this process, read from the environment; alone where no launcher left its variables.

    Raises UserError for variables that make no sense, such as leftovers of another run.
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
            raise UserError(f"the environment variables {rank}, {size} and {local} must be numbers") from None
        stale = f"; started without {launcher}, unset {rank} and {size}"
        if not 0 <= found.rank < found.world_size:
            raise UserError(f"the environment has {rank}={env[rank]}, which is no rank of {size}={env[size]}{stale}")
        if launcher == "torchrun" and found.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
            raise UserError(f"the environment has {rank} and {size}, but no MASTER_ADDR and MASTER_PORT{stale}")
        return found
    return Ranks()


def default_device(local_rank=0):
    """The device to run on: this rank's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# ---- the common store -----------------------------------------------------------------------------------------------


def open_store(me, timeout=timedelta(days=1)):
    """A key-value store that all ranks share (torch.distributed.Store), or None for a single process.

    Raises UserError where the ranks cannot reach each other.
    """
    if me.world_size == 1:
        return None
    try:
        return {"torchrun": _torchrun_store, "mpiexec": _mpi_store, "srun": _slurm_store}[me.launcher](me, timeout)
    except RuntimeError as error:
        raise UserError(
            f"rank {me.rank} of {me.world_size} cannot reach the others: {str(error).strip().splitlines()[0]}"
        ) from None


def _torchrun_store(me, timeout):
    from torch.distributed import PrefixStore, rendezvous

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
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"{reason} (port {port}; MASTER_ADDR and MASTER_PORT choose another)") from None


def _mpi_store(me, timeout):
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"mpiexec needs a working mpi4py (pip install mpi4py): {error}; torchrun needs none") from None
    ranks = MPI.COMM_WORLD
    if ranks.Get_size() != me.world_size:
        raise UserError(
            f"mpiexec started {me.world_size} processes and mpi4py sees {ranks.Get_size()}: mpi4py was built for another "
            "MPI than this mpiexec (reinstall it, or use torchrun), or the environment is left over from another run"
        )
    hosts = ranks.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    # Rank 0's is open before its port is told, so that nobody knocks too early.
    store = _tcp_store(host, 0, me, timeout) if me.rank == 0 else None
    port = ranks.bcast(store.port if store else None)
    return store or _tcp_store(host, port, me, timeout)


def _tcp_store(host, port, me, timeout):
    from torch.distributed import TCPStore

    store = TCPStore(
        host, port, me.world_size, is_master=me.rank == 0, wait_for_workers=False, timeout=timedelta(seconds=LATE)
    )
    store.set_timeout(timeout)
    return store


def _first_host(nodelist):
    """The first host of a Slurm list like "node[003-010,012],gpu1"."""
    name, bracket, rest = nodelist.partition("[")
    if not bracket or "," in name:
        return nodelist.split(",")[0]
    return name + rest.split("]")[0].split(",")[0].split("-")[0]


def abort(me, status=1):
    """End all ranks of an MPI run: the others would wait for this one for ever. Other launchers do so themselves."""
    if me.launcher == "mpiexec" and me.world_size > 1:
        try:
            from mpi4py import MPI
        except ImportError:  # which is the reason for the end, and true of all ranks
            return
        MPI.COMM_WORLD.Abort(status)


# ---- what ranks tell each other -------------------------------------------------------------------------------------


class Stopped(Exception):
    """Another rank ended the run and has said why."""


class LocalStore:
    """The part of torch.distributed.Store that `Peers` uses, for a single process."""

    def __init__(self):
        self._values = {}

    def set(self, key, value):
        self._values[key] = value

    def get(self, key):
        return self._values[key]

    def add(self, key, amount):
        self._values[key] = self._values.get(key, 0) + amount
        return self._values[key]

    def check(self, keys):
        return all(key in self._values for key in keys)


class Peers:
    """This process among the ranks of a run, with what they tell each other through a common store.

    Has the fields of `Ranks`. Ranks above 0 give signs of life; rank 0 looks for them whenever it calls `watch`.
    Every method raises UserError where contact to the store is lost.
    """

    def __init__(self, me, store):
        self.rank, self.world_size, self.local_rank, self.launcher = me.rank, me.world_size, me.local_rank, me.launcher
        self._store = LocalStore() if store is None else store
        self._leaving = threading.Event()
        self._watched_at = time.monotonic()
        self._beats = {rank: 0 for rank in range(1, me.world_size)} if me.rank == 0 else {}
        self._silence = dict.fromkeys(self._beats, 0.0)
        if me.rank:
            threading.Thread(target=self._beat, daemon=True).start()

    def _call(self, method, *arguments):
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:
            owner = "the launcher" if self.launcher == "torchrun" else "rank 0"
            raise UserError(
                f"rank {self.rank} of {self.world_size} lost contact with {owner}, which has ended or cannot be reached; "
                "run the same command again to go on"
            ) from error

    def _beat(self):
        try:
            while not self._leaving.wait(BEAT):
                self._store.add(f"beats/{self.rank}", 1)
        except RuntimeError:  # the rank itself finds out at its next word to the others
            pass

    def count(self, key, amount=1):
        """Add to a common counter, which begins at 0; returns the new value."""
        return self._call("add", key, amount)

    def share(self, key, value):
        """Tell the others a JSON value."""
        self._call("set", key, json.dumps(value))

    def shared(self, key):
        """The JSON value that a rank shares, waited for."""
        while not self._call("check", [key]):
            self.watch()
            time.sleep(POLL)
        return json.loads(self._call("get", key))

    def watch(self):
        """Raise Stopped where another rank has ended the run, and UserError on rank 0 where one has died silently."""
        if self.world_size == 1:
            return
        if self.stopped():
            raise Stopped
        # A process that was suspended has not listened: time between two looks counts as one beat at most.
        elapsed = min(time.monotonic() - self._watched_at, BEAT)
        self._watched_at = time.monotonic()
        for rank in self._beats:
            beats = self.count(f"beats/{rank}", 0)
            self._silence[rank] = 0.0 if beats != self._beats[rank] else self._silence[rank] + elapsed
            self._beats[rank] = beats
            if self._silence[rank] > (SILENCE if beats else LATE) and not self._call("check", [f"left/{rank}"]):
                raise UserError(
                    f"rank {rank} of {self.world_size} has given no sign of life for {self._silence[rank]:.0f} seconds; "
                    "run the same command again to go on"
                )

    def stop(self, reason):
        """End the run for all ranks; returns whether no other rank has given this reason yet."""
        try:
            first = self.count(f"reason/{reason}") == 1
            self._call("set", "stopped", "1")
            return first
        except UserError:
            return True

    def stopped(self):
        """Whether a rank has ended the run."""
        return self._call("check", ["stopped"])

    def interrupted(self, patience=1.0):
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
        except UserError:  # the store is gone, and with it the rank or launcher that had it
            return True

    def leave(self):
        """The last word to the others: what this rank had to share is shared."""
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
        except UserError:
            pass


def connect(me):
    """The `Peers` of this process."""
    return Peers(me, open_store(me))
