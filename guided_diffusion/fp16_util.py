"""Training in 16-bit precision, with guided-diffusion's interface on torch's autocast and gradient scaler.

Weights stay in float32, so there are no second ("master") copies of parameters: `master_params` are the model's own.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from . import logger


def convert_module_to_f16(module: nn.Module) -> None:
    """Convert the weights of a convolution to float16; other modules stay as they are. For `nn.Module.apply`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.half()


def convert_module_to_f32(module: nn.Module) -> None:
    """Undo `convert_module_to_f16`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.float()


class MixedPrecisionTrainer:
    """Backward pass and optimizer step of a model, with a loss scale where it computes in float16.

    use_fp16: run the forward pass under float16 autocast. fp16_scale_growth: growth of log2 of the loss scale per step;
    a step whose gradients overflow is skipped and halves the scale. initial_lg_loss_scale: log2 of the first scale.
    """

    def __init__(
        self, *, model: nn.Module, use_fp16: bool = False, fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = 20.0,
    ) -> None:  # fmt: skip
        self.model, self.use_fp16 = model, use_fp16
        self.master_params = self.model_params = list(model.parameters())
        device = self.model_params[0].device.type
        scale = {"init_scale": 2.0**initial_lg_loss_scale, "growth_factor": 2.0**fp16_scale_growth}
        self.scaler = torch.amp.GradScaler(device, **scale, growth_interval=1, enabled=use_fp16)
        if use_fp16:
            if hasattr(model, "convert_to_fp32"):
                model.convert_to_fp32()  # type: ignore[operator]
            model.forward = torch.autocast(device, torch.float16)(model.forward)

    @property
    def lg_loss_scale(self) -> float:
        """log2 of the loss scale."""
        return math.log2(self.scaler.get_scale())

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.model.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the (scaled) loss."""
        self.scaler.scale(loss.float()).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Take an optimizer step unless gradients overflow; returns whether. Logs norms and the loss scale."""
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        self.scaler.unscale_(opt)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.master_params if p.grad is not None]).item()
        before = self.scaler.get_scale()
        self.scaler.step(opt)
        self.scaler.update()
        if self.use_fp16 and not math.isfinite(norm):
            logger.log(f"gradients overflow at loss scale {before:g}: step skipped, scale {self.scaler.get_scale():g}")
            return False
        logger.logkv_mean("grad_norm", norm)
        logger.logkv_mean("param_norm", torch.nn.utils.get_total_norm(self.master_params).item())
        return True

    def master_params_to_state_dict(self, master_params: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's state dict with other values of its parameters, such as averages."""
        names = (name for name, _ in self.model.named_parameters())
        return {**self.model.state_dict(), **dict(zip(names, master_params))}

    def state_dict_to_master_params(self, state_dict: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The values of the model's parameters in a state dict, in their order."""
        return [state_dict[name] for name, _ in self.model.named_parameters()]
