"""Models and diffusion processes from flags, with guided-diffusion's names and defaults."""

import argparse
import inspect
import linecache
import re
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import InputError, renaming
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps

if TYPE_CHECKING:
    from .unet import EncoderUNetModel, SuperResModel, UNetModel

NUM_CLASSES = 1000  # where no number is given; a script may set another

# Default channel multipliers by image size; those of super-resolution models by the size of their output.
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
SR_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}


def _defaults(function):
    """The defaults of the parameters that guided-diffusion's function has, too: those before an asterisk."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the UNet and of the diffusion process."""
    return _defaults(create_model_and_diffusion)


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the noisy-image classifier and of the diffusion process."""
    return _defaults(create_classifier_and_diffusion)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a super-resolution model and of its diffusion process."""
    return _defaults(sr_create_model_and_diffusion)


def classifier_defaults() -> dict[str, Any]:
    """Return the flags of the noisy-image classifier and, with EGSDE's values, of the domain-specific extractor."""
    flags = classifier_and_diffusion_defaults().items()
    return {name: value for name, value in flags if name == "image_size" or name.startswith("classifier_")}


def diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the diffusion process."""
    flags = classifier_and_diffusion_defaults().items()
    return {name: value for name, value in flags if name not in classifier_defaults()}


def extension_defaults() -> dict[str, Any]:
    """Return the flags that guided-diffusion does not have: conventions of diffusers' models and super-resolution.

    Files and records of models hold them only where they differ from these values.
    """
    return {
        "super_res": False, "norm_groups": 32, "norm_eps": 1e-5, "sines_first": False, "pad_end": False,
        "middle_norm": True, "predict_v": False, "in_channels": 3,
    }  # fmt: skip


def create_model_and_diffusion(
    image_size: int = 64, class_cond: bool = False, learn_sigma: bool = False, num_channels: int = 128,
    num_res_blocks: int = 2, channel_mult: str = "", num_heads: int = 4, num_head_channels: int = -1,
    num_heads_upsample: int = -1, attention_resolutions: str = "16,8", dropout: float = 0.0,
    diffusion_steps: int = 1000, noise_schedule: str = "linear", timestep_respacing: str = "", use_kl: bool = False,
    predict_xstart: bool = False, rescale_timesteps: bool = False, rescale_learned_sigmas: bool = False,
    use_checkpoint: bool = False, use_scale_shift_norm: bool = True, resblock_updown: bool = False,
    use_fp16: bool = False, use_new_attention_order: bool = False, *, sigma_small: bool = False,
    num_classes: int | None = None, norm_groups: int = 32, norm_eps: float = 1e-5, sines_first: bool = False,
    pad_end: bool = False, middle_norm: bool = True, predict_v: bool = False, in_channels: int = 3,
) -> "tuple[UNetModel, SpacedDiffusion]":  # fmt: skip
    """Create the UNet and its diffusion process. Parameters after the asterisk are this project's own."""
    flags = dict(locals())
    return create_model(**_arguments(create_model, flags)), create_diffusion(**flags)


def create_diffusion(**flags: Any) -> SpacedDiffusion:
    """Create the diffusion process from any set of flags that includes its own; sigma_small is True by default here."""
    flags = {**diffusion_defaults(), "sigma_small": True, **flags}
    return create_gaussian_diffusion(steps=flags["diffusion_steps"], **_arguments(create_gaussian_diffusion, flags))


def _arguments(function, flags):
    return {name: flags[name] for name in inspect.signature(function).parameters if name in flags}


def channel_multipliers(channel_mult: str | None, image_size: int, *, super_res: bool = False) -> tuple[float, ...]:
    """Parse `channel_mult`: "1,2,4", or "" for the defaults of the image size."""
    if channel_mult in ("", None):
        table = {**CHANNEL_MULT, **SR_CHANNEL_MULT} if super_res else CHANNEL_MULT
        if image_size in table:
            return table[image_size]
        known = ", ".join(map(str, sorted(table)))
        reason = f"it has no default `channel_mult` (known for {known}): give one, such as 1,2,4"
        raise InputError(reason, parameter="image_size", value=image_size)
    try:
        numbers = [float(part) for part in str(channel_mult).split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= 1 << 16 for number in numbers):
        raise InputError("it is a list of numbers like 1,2,4", parameter="channel_mult", value=channel_mult)
    return tuple(int(number) if number.is_integer() else number for number in numbers)


def attention_factors(attention_resolutions: str, image_size: int) -> tuple[int, ...]:
    """Parse `attention_resolutions` ("16,8": sides of the feature map); return them as downsampling factors."""
    sides = [part.strip() for part in str(attention_resolutions).split(",") if part.strip()]
    if not all(re.fullmatch(r"[0-9]{1,9}", side) and int(side) for side in sides):
        reason = "it is a list of sides of the feature map like 16,8"
        raise InputError(reason, parameter="attention_resolutions", value=attention_resolutions)
    # As in guided-diffusion, a side that no level has is ignored.
    return tuple(image_size // int(side) for side in sides)


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, channel_mult: str = "", learn_sigma: bool = False,
    class_cond: bool = False, use_checkpoint: bool = False, attention_resolutions: str = "16", num_heads: int = 1,
    num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, dropout: float = 0,
    resblock_updown: bool = False, use_fp16: bool = False, use_new_attention_order: bool = False,
    num_classes: int | None = None, norm_groups: int = 32, norm_eps: float = 1e-5, sines_first: bool = False,
    pad_end: bool = False, middle_norm: bool = True, super_res: bool = False, in_channels: int = 3,
    **configuration: Any,
) -> Any:  # fmt: skip
    """Create the ADM UNet that the flags describe.

    num_classes: of class-conditional models, NUM_CLASSES if None. super_res: create the `SuperResModel` that enlarges
    images to image_size. in_channels: 1 for grey images. configuration: keys that ddrm and its descendants pass; they
    change nothing, and a value that would is named in a warning.
    """
    from .unet import SuperResModel, UNetModel

    flags = dict(locals())
    _check_configuration(configuration, in_channels, learn_sigma)
    flags |= {
        "model_channels": num_channels,
        "out_channels": in_channels * (2 if learn_sigma else 1),
        "attention_resolutions": attention_factors(attention_resolutions, image_size),
        "channel_mult": channel_multipliers(channel_mult, image_size, super_res=super_res),
        "num_classes": (NUM_CLASSES if num_classes is None else num_classes) if class_cond else None,
    }
    return (SuperResModel if super_res else UNetModel)(**_arguments(UNetModel, flags))


def _check_configuration(given, channels, learn_sigma):
    """Warn of keys of a configuration file that ask for another network; TypeError for keys that it does not have."""
    fitting = {"type": ("openai",), "resamp_with_conv": (True,), "var_type": ("fixedsmall", "fixedlarge")}
    # Published files give 3 for models with a learned variance, too.
    fitting["out_channels"] = (channels, 2 * channels) if learn_sigma else (channels,)
    for name, value in given.items():
        if name not in fitting:
            raise TypeError(f"create_model() got an unexpected keyword argument {name!r}")
        if value not in fitting[name]:
            known = " or ".join(map(repr, fitting[name]))
            text = f"create_model: {name}={value!r} has no effect; the network is made for {known}"
            warnings.warn(text, stacklevel=3)


def create_classifier(
    image_size: int, classifier_use_fp16: bool = False, classifier_width: int = 128, classifier_depth: int = 2,
    classifier_attention_resolutions: str = "32,16,8", classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True, classifier_pool: str = "attention", channel_mult: str = "",
    num_class: int | None = None, num_head_channels: int = 64, head: str = "out",
) -> Any:  # fmt: skip
    """Create the noisy-image classifier; with num_class=2 and head="I2Iout" EGSDE's domain-specific extractor.

    num_class: number of classes, NUM_CLASSES if None.
    """
    from .unet import EncoderUNetModel

    return EncoderUNetModel(
        image_size=image_size, in_channels=3, model_channels=classifier_width,
        out_channels=NUM_CLASSES if num_class is None else num_class, num_res_blocks=classifier_depth,
        attention_resolutions=attention_factors(classifier_attention_resolutions, image_size),
        channel_mult=channel_multipliers(channel_mult, image_size), use_fp16=classifier_use_fp16,
        num_head_channels=num_head_channels, use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown, pool=classifier_pool, head=head,
    )  # fmt: skip


def create_classifier_and_diffusion(
    image_size: int = 64, classifier_use_fp16: bool = False, classifier_width: int = 128, classifier_depth: int = 2,
    classifier_attention_resolutions: str = "32,16,8", classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True, classifier_pool: str = "attention", learn_sigma: bool = False,
    diffusion_steps: int = 1000, noise_schedule: str = "linear", timestep_respacing: str = "", use_kl: bool = False,
    predict_xstart: bool = False, rescale_timesteps: bool = False, rescale_learned_sigmas: bool = False,
) -> "tuple[EncoderUNetModel, SpacedDiffusion]":  # fmt: skip
    """Create the noisy-image classifier of NUM_CLASSES classes and the diffusion process that makes the noise."""
    flags = dict(locals(), sigma_small=False)
    return create_classifier(**_arguments(create_classifier, flags)), create_diffusion(**flags)


def sr_create_model_and_diffusion(
    large_size: int = 256, small_size: int = 64, class_cond: bool = False, learn_sigma: bool = False,
    num_channels: int = 128, num_res_blocks: int = 2, num_heads: int = 4, num_head_channels: int = -1,
    num_heads_upsample: int = -1, attention_resolutions: str = "16,8", dropout: float = 0.0,
    diffusion_steps: int = 1000, noise_schedule: str = "linear", timestep_respacing: str = "", use_kl: bool = False,
    predict_xstart: bool = False, rescale_timesteps: bool = False, rescale_learned_sigmas: bool = False,
    use_checkpoint: bool = False, use_scale_shift_norm: bool = True, resblock_updown: bool = False,
    use_fp16: bool = False, *, channel_mult: str = "", num_classes: int | None = None,
) -> "tuple[SuperResModel, SpacedDiffusion]":  # fmt: skip
    """Create the super-resolution model and its diffusion process; see `sr_create_model`."""
    flags = dict(locals(), sigma_small=False)
    model = sr_create_model(large_size, small_size, **_arguments(create_model, flags))
    return model, create_diffusion(**flags)


def sr_create_model(large_size: int, small_size: int, **flags: Any) -> "SuperResModel":
    """Create the UNet that enlarges images to large_size. They can have any size; small_size is not used.

    flags: of `create_model`.
    """
    with renaming({"image_size": "large_size"}):
        return create_model(large_size, super_res=True, **flags)


def create_gaussian_diffusion(
    *, steps: int = 1000, learn_sigma: bool = False, sigma_small: bool = False, noise_schedule: str = "linear",
    use_kl: bool = False, predict_xstart: bool = False, rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False, timestep_respacing: Any = "", predict_v: bool = False,
) -> SpacedDiffusion:  # fmt: skip
    """Create the diffusion process that the flags describe.

    sigma_small: without a learned variance, use the posterior's, which is better with few steps, instead of beta.
    """
    if steps < 1:
        raise InputError("it must be at least 1", parameter="diffusion_steps", value=steps)
    if predict_xstart and predict_v:
        reason = "a model predicts one of them; leave out `predict_xstart`"
        raise InputError(reason, parameter="predict_v", value=predict_v)
    betas = get_named_beta_schedule(noise_schedule, steps)
    if betas.max() >= 1:
        raise InputError("the linear schedule needs more than 20", parameter="diffusion_steps", value=steps)
    mse = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    start_or_noise = ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=ModelMeanType.VELOCITY if predict_v else start_or_noise,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else mse,
        rescale_timesteps=rescale_timesteps,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add one flag per entry, of the default's type; booleans are written True or False."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Return the named attributes of parsed arguments as a dict.

    Warns of values that would be lost: those whose name stands in no set of flags here, such as an option of a fork's
    model or loss, and is not read in the source file of the caller.
    """
    keys = list(keys)
    known = {*keys, *sr_model_and_diffusion_defaults(), *model_and_diffusion_defaults(), *classifier_defaults()}
    caller = "".join(linecache.getlines(sys._getframe(1).f_code.co_filename))
    for name, value in vars(args).items():
        if value and name not in known and not re.search(rf"\.{name}\b", caller):
            warnings.warn(f"{name}={value!r} has no effect: this guided_diffusion has no such option", stacklevel=2)
    return {key: getattr(args, key) for key in keys}


def str2bool(value: str | bool) -> bool:
    """Parse True/False, yes/no, t/f, y/n, 1/0 in any case; argparse.ArgumentTypeError for others."""
    text = str(value).lower()
    if text in ("yes", "true", "t", "y", "1"):
        return True
    if text in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")
