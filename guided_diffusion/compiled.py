"""torch.compile for a network, and eager evaluation where that is not to be had."""

import logging

import torch

log = logging.getLogger("sddm")


class Compiled:
    """A network that is compiled for the shape of its first input.

    Compiling takes from seconds to minutes, which pays over the steps of many batches. So inputs of another shape, such
    as the last batch of a folder, go through the network as it is, and so do all where compiling fails: it needs a C++
    compiler on CPUs and Triton on GPUs. Outputs are those of the network up to rounding.

    model(x, t, ...): the network; x [N, C, H, W].
    """

    def __init__(self, model):
        self.model, self.shape = model, None
        # CUDA graphs spare the GPU the wait for the next of hundreds of small kernels.
        on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        self.compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if on_gpu else None)
        self.reuses_output = on_gpu

    def __call__(self, x, *arguments):
        self.shape = self.shape or x.shape
        if self.compiled is None or x.shape != self.shape:
            return self.model(x, *arguments)
        try:
            output = self.compiled(x, *arguments)
            # The next evaluation's graph writes to the same memory.
            return output.clone() if self.reuses_output else output
        except torch.OutOfMemoryError:
            self.shape = None  # a smaller batch comes next
            raise
        except Exception as error:
            self.compiled = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("--compile has no effect, the network runs as it is: %s", reason[0][:200])
            return self.model(x, *arguments)
