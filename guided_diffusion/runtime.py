"""How a network is run: device, precision, compilation, and the memory of the process."""

import contextlib
import ctypes
import functools
import re

import torch

from .errors import InputError, check_choice, first_line, log

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*DTYPES, "auto")

# In the words of CUDA, of PyTorch's allocators, of oneDNN and of the system. No memory, no thread.
OUT_OF_MEMORY = (
    "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|could not create a primitive|"
    "can't start new thread"
)


def default_device(local_rank: int = 0) -> torch.device:
    """The device to run on: the GPU of this rank, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_device(name: str | torch.device = "auto", local_rank: int = 0) -> torch.device:
    """The device of that name, tried out: cpu, cuda, cuda:1, mps or auto. Raises InputError where it cannot be used."""
    if name == "auto":
        return default_device(local_rank)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = default_device(local_rank)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except Exception as error:  # backends that are not built in raise errors of their own
        raise InputError(f"it cannot be used: {first_line(error)}", parameter="device", value=name) from None
    return device


def pick_precision(name: str | None, device: torch.device) -> str:
    """Resolve a precision to `fp32`, `bf16` or `fp16`; warns once where bf16 is emulated on a CPU."""
    if name is not None:
        check_choice("precision", name, PRECISIONS)
    if name == "auto":
        return best_precision(device)
    if name == "bf16" and device.type == "cpu" and best_precision(device) != "bf16":
        _warn_of_emulation()
    return name or "fp32"


@functools.cache
def _warn_of_emulation() -> None:
    log.warning("this CPU emulates bf16, many times slower than fp32; `precision` auto picks what is native")


def best_precision(device: torch.device) -> str:
    """`bf16` on devices with native bfloat16, as GPUs since Ampere and CPUs with AVX512-BF16 or AMX; else `fp32`."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in names)
    return "bf16" if native else "fp32"


def memory_format(device: torch.device, compiled: bool = False) -> torch.memory_format:
    """The fastest memory format of a network: channels last, except on GPUs, where GroupNorm would copy, uncompiled."""
    return torch.contiguous_format if device.type == "cuda" and not compiled else torch.channels_last


class CompiledModel:
    """A network model(x, t, ...), x [N, C, H, W], compiled for the shape of its first x.

    Other shapes, such as the last batch of a folder, run eagerly, and so do all where compilation fails.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.shape = model, None
        self.on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        # CUDA graphs spare the GPU the wait for the next of hundreds of small kernels.
        self.compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if self.on_gpu else None)

    def __call__(self, x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        self.shape = self.shape or x.shape
        if self.compiled is None or x.shape != self.shape:
            return self.model(x, *arguments)
        try:
            output = self.compiled(x, *arguments)
            return output.clone() if self.on_gpu else output  # the next evaluation's graph writes to the same memory
        except torch.OutOfMemoryError:
            self.shape = None  # a smaller batch comes next
            raise
        except Exception as error:
            self.compiled = None
            log.warning("compilation failed, the network runs eagerly: %s", first_line(error))
            return self.model(x, *arguments)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system; whether that worked.

    By default it maps every large activation afresh, and zeroing the pages can take as long as a layer on a CPU.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1) and mallopt(top_pad, 64 << 20))
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, in the words of any backend."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or bool(re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE))
