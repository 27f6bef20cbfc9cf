"""Which arithmetic suits a device."""

import torch


def best_precision(device):
    """`bf16` where the device multiplies matrices of bfloat16 natively, else `fp32`.

    device: torch.device. GPUs since Ampere do, and CPUs with AVX512-BF16; on others it is emulated, and slow.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16" if device.type == "cpu" and native is not None and native() else "fp32"
