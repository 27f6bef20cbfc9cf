"""Which process this is among how many, whatever launched them, and the little that they tell each other.

torchrun, mpiexec (MPICH, Open MPI, Intel MPI) and Slurm's srun announce ranks in environment variables. Sampling ranks
share a key-value store and nothing else; mpi4py is imported only under mpiexec.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch

from .errors import UserError

# launcher, then its variables for rank, number of ranks and rank within the machine
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Ranks:
    """rank: this process, 0 to world_size - 1; local_rank: its number on this machine; launcher: what started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""


def ranks():
    """The `Ranks` of this process, read from the environment; alone where no launcher left its variables."""
    env = os.environ
    for launcher, rank, size, local in LAUNCHERS:
        if rank not in env or size not in env:
            continue
        # A plain `python` in an sbatch script or in a salloc shell sees Slurm's variables too, but no step's.
        if launcher == "srun" and "SLURM_STEP_ID" not in env:
            continue
        try:
            return Ranks(int(env[rank]), int(env[size]), int(env.get(local, 0)), launcher)
        except ValueError:
            raise UserError(f"the environment variables {rank}, {size} and {local} must be numbers") from None
    return Ranks()


def default_device(local_rank=0):
    """The device to run on: this rank's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def open_store(me, timeout=timedelta(days=1)):
    """A key-value store that all ranks share (torch.distributed.Store), or None for a single process."""
    if me.world_size == 1:
        return None
    from torch.distributed import PrefixStore, TCPStore, rendezvous

    if me.launcher == "torchrun":
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # The launcher keeps entries of its own in the same store.
        return PrefixStore("sddm", store)
    if me.launcher == "srun":
        host = os.environ.get("SLURM_SRUN_COMM_HOST") or _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost"))
        job, step = int(os.environ.get("SLURM_JOB_ID", 0)), int(os.environ.get("SLURM_STEP_ID", 0))
        port = int(os.environ.get("MASTER_PORT", 20000 + (job * 7 + step) % 20000))
        host = os.environ.get("MASTER_ADDR", host)
        return TCPStore(host, port, me.world_size, is_master=me.rank == 0, timeout=timeout)
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"mpiexec needs a working mpi4py (pip install mpi4py): {error}; torchrun needs none") from None
    options = dict(timeout=timeout, wait_for_workers=False)
    if me.rank == 0:
        # Opened before its address is told, so that nobody knocks too early.
        store = TCPStore(_own_address(), 0, me.world_size, is_master=True, **options)
        MPI.COMM_WORLD.bcast((store.host, store.port))
        return store
    host, port = MPI.COMM_WORLD.bcast(None)
    return TCPStore(host, port, me.world_size, is_master=False, **options)


def _first_host(nodelist):
    """The first host of a Slurm list like "node[003-010,012],gpu1"."""
    name, bracket, rest = nodelist.partition("[")
    if not bracket or "," in name:
        return nodelist.split(",")[0]
    return name + rest.split("]")[0].split(",")[0].split("-")[0]


def _own_address():
    """An address of this machine that other machines of the run can reach, else the loopback address."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def abort(me):
    """End all ranks of an MPI run: the others would wait for this one for ever. Other launchers do so themselves."""
    if me.launcher == "mpiexec" and me.world_size > 1:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
