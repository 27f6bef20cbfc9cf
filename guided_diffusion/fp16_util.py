"""Training in 16-bit precision, with guided-diffusion's interface on torch's gradient scaler.

The weights stay in float32 and `MixedPrecisionTrainer` makes the model compute in float16 by autocast, so there are no
second ("master") copies of parameters: `master_params` are the model's own.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0

ParamGroups = list[tuple[list[tuple[str, torch.Tensor]], Any]]


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

    use_fp16: run the forward pass under float16 autocast; weights stay in float32. fp16_scale_growth: growth of log2 of
    the loss scale per step; a step whose gradients overflow is skipped and halves the scale. initial_lg_loss_scale:
    log2 of the first scale. `master_params` are the optimizer's parameters.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        device = self.model_params[0].device.type
        self.scaler = torch.amp.GradScaler(
            device,
            init_scale=2.0**initial_lg_loss_scale,
            growth_factor=2.0**fp16_scale_growth,
            growth_interval=1,
            enabled=use_fp16,
        )
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
        for parameter in self.model_params:
            parameter.grad = None

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
        return master_params_to_state_dict(self.model, None, list(master_params), False)

    def state_dict_to_master_params(self, state_dict: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The values of the model's parameters in a state dict, in their order."""
        return state_dict_to_master_params(self.model, state_dict, False)


# ---- parameters flattened into one float32 vector and one matrix: for code that keeps copies of its own --------------


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, torch.Tensor]]) -> ParamGroups:
    """Named parameters as (those of one axis or none, -1) and (the others, (1, -1)): group and flattened shape."""
    named = list(named_model_params)
    return [([(n, p) for n, p in named if p.ndim <= 1], -1), ([(n, p) for n, p in named if p.ndim > 1], (1, -1))]


def make_master_params(param_groups_and_shapes: ParamGroups) -> list[nn.Parameter]:
    """A float32 parameter for every group: its parameters one after the other."""
    return [
        nn.Parameter(_flatten_dense_tensors([p.detach().float() for _, p in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(param_groups_and_shapes: ParamGroups, master_params: list[nn.Parameter]) -> None:
    """Copy the model's gradients into the master parameters."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes):
        gradients = [param_grad_or_zeros(p).to(master.dtype) for _, p in group]
        master.grad = _flatten_dense_tensors(gradients).view(shape)


def master_params_to_model_params(param_groups_and_shapes: ParamGroups, master_params: list[nn.Parameter]) -> None:
    """Copy the values of the master parameters back into the model."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes):
        for (_, p), value in zip(group, unflatten_master_params(group, master.view(-1))):
            p.detach().copy_(value)


def unflatten_master_params(param_group: list[tuple[str, torch.Tensor]], master_param: torch.Tensor) -> Any:
    """The values of a group's parameters, each in its own shape."""
    return _unflatten_dense_tensors(master_param, [p for _, p in param_group])


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: ParamGroups | None, master_params: list, use_fp16: bool
) -> dict[str, torch.Tensor]:
    """The model's state dict with the values of master parameters: flattened ones with use_fp16, else one each."""
    state = model.state_dict()
    if use_fp16 and param_groups_and_shapes is not None:
        for master, (group, _) in zip(master_params, param_groups_and_shapes):
            values = unflatten_master_params(group, master.view(-1))
            state.update((name, value) for (name, _), value in zip(group, values))
    else:
        state.update((name, value) for (name, _), value in zip(model.named_parameters(), master_params))
    return state


def state_dict_to_master_params(
    model: nn.Module, state_dict: dict[str, torch.Tensor], use_fp16: bool
) -> list[torch.Tensor]:
    """The reverse of `master_params_to_state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return list(make_master_params(get_param_groups_and_shapes(named)))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[torch.Tensor]) -> None:
    """Clear the gradients of parameters."""
    for parameter in master_params:
        parameter.grad = None


def zero_grad(model_params: Iterable[torch.Tensor]) -> None:
    """Set the gradients of parameters to zero."""
    for parameter in model_params:
        if parameter.grad is not None:
            parameter.grad.detach_()
            parameter.grad.zero_()


def param_grad_or_zeros(param: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, zeros where it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or not a number."""
    return not math.isfinite(value)
