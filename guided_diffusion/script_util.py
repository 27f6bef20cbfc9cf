"""Flags and the models they describe, with guided-diffusion's names and defaults."""

import argparse
import inspect
import math

from .errors import InputError
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps

NUM_CLASSES = 1000

# Channel multipliers where --channel_mult is empty, by image size.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


def diffusion_defaults():
    """Flags of the diffusion process."""
    return dict(
        learn_sigma=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=False,
        rescale_learned_sigmas=False,
    )


def model_and_diffusion_defaults():
    """Flags of the UNet and of the diffusion process."""
    return dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        attention_resolutions="16,8",
        channel_mult="",
        dropout=0.0,
        class_cond=False,
        use_checkpoint=False,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_fp16=False,
        use_new_attention_order=False,
        **diffusion_defaults(),
    )


def extension_defaults():
    """Flags that only models of diffusers have otherwise; they stand in no file and no record where they are usual."""
    return {
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "sines_first": False,
        "pad_end": False,
        "middle_norm": True,
        "predict_v": False,
    }


def classifier_defaults():
    """Flags of the noisy-image classifier and, with EGSDE's values, of the domain-specific extractor."""
    return dict(
        image_size=64,
        classifier_use_fp16=False,
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
        classifier_pool="attention",
    )


def create_model_and_diffusion(**flags):
    """The UNet and its diffusion process from the flags of `model_and_diffusion_defaults`; missing ones take defaults."""
    flags = {**model_and_diffusion_defaults(), **flags}
    model = create_model(**{name: flags[name] for name in inspect.signature(create_model).parameters if name in flags})
    diffusion = create_gaussian_diffusion(**_diffusion_arguments(flags))
    return model, diffusion


def create_diffusion(**flags):
    """The diffusion process alone, from any set of flags that has its own among them."""
    return create_gaussian_diffusion(**_diffusion_arguments({**diffusion_defaults(), **flags}))


def _diffusion_arguments(flags):
    names = inspect.signature(create_gaussian_diffusion).parameters
    return {"steps": flags["diffusion_steps"], **{name: flags[name] for name in names if name in flags}}


def channel_multipliers(channel_mult, image_size):
    """--channel_mult ("1,2,4" or "" for the image size's usual ones) as a tuple."""
    if channel_mult in ("", None):
        if image_size not in CHANNEL_MULT:
            known = ", ".join(str(size) for size in sorted(CHANNEL_MULT))
            raise InputError(
                f"it has no usual `channel_mult` (known for {known}): give one, as 1,2,4",
                parameter="image_size",
                value=image_size,
            )
        return CHANNEL_MULT[image_size]
    try:
        numbers = [float(part) for part in str(channel_mult).split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise InputError("it is a list of numbers like 1,2,4", parameter="channel_mult", value=channel_mult)
    return tuple(int(number) if number == int(number) else number for number in numbers)


def attention_factors(attention_resolutions, image_size):
    """--attention_resolutions ("16,8": sides of the feature map) as downsampling factors."""
    sides = [part.strip() for part in str(attention_resolutions).split(",") if part.strip()]
    if not all(side.isdigit() and int(side) for side in sides):
        raise InputError(
            "it is a list of sides of the feature map like 16,8",
            parameter="attention_resolutions",
            value=attention_resolutions,
        )
    # As in guided-diffusion, a side that no level has gives a factor that is never reached, which does no harm.
    return tuple(image_size // int(side) for side in sides)


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    norm_groups=32,
    norm_eps=1e-5,
    sines_first=False,
    pad_end=False,
    middle_norm=True,
):
    """The ADM UNet that the flags describe, for 3-channel images; num_classes counts only with class_cond."""
    from .unet import UNetModel

    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_factors(attention_resolutions, image_size),
        dropout=dropout,
        channel_mult=channel_multipliers(channel_mult, image_size),
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        norm_groups=norm_groups,
        norm_eps=norm_eps,
        sines_first=sines_first,
        pad_end=pad_end,
        middle_norm=middle_norm,
    )


def create_classifier(
    image_size,
    classifier_use_fp16=False,
    classifier_width=128,
    classifier_depth=2,
    classifier_attention_resolutions="32,16,8",
    classifier_use_scale_shift_norm=True,
    classifier_resblock_updown=True,
    classifier_pool="attention",
    channel_mult="",
    num_class=NUM_CLASSES,
    num_head_channels=64,
    head="out",
):
    """The noisy-image classifier; with num_class=2 and head="I2Iout" EGSDE's domain-specific extractor."""
    from .unet import EncoderUNetModel

    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=num_class,
        num_res_blocks=classifier_depth,
        attention_resolutions=attention_factors(classifier_attention_resolutions, image_size),
        channel_mult=channel_multipliers(channel_mult, image_size),
        use_fp16=classifier_use_fp16,
        num_head_channels=num_head_channels,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        head=head,
    )


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=True,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
    predict_v=False,
):
    """The diffusion process that the flags describe.

    Without learned variance, sigma_small chooses the posterior's variance (the release's choice, better with few steps),
    sigma_small=False the larger one, beta (guided-diffusion's default).
    """
    if steps < 1:
        raise InputError("it must be at least 1", parameter="diffusion_steps", value=steps)
    if predict_xstart and predict_v:
        raise InputError("a model predicts one of them; leave out `predict_xstart`", parameter="predict_v", value=predict_v)
    betas = get_named_beta_schedule(noise_schedule, steps)
    if betas.max() >= 1:
        raise InputError("the linear schedule needs more than 20", parameter="diffusion_steps", value=steps)
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        model_var_type = ModelVarType.LEARNED_RANGE
    else:
        model_var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if predict_v:
        model_mean_type = ModelMeanType.VELOCITY
    else:
        model_mean_type = ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=model_mean_type,
        model_var_type=model_var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def add_dict_to_argparser(parser, default_dict):
    """One flag per entry; its type is the default's, booleans are written True or False."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args, keys):
    """The named attributes of parsed arguments as a dict."""
    return {key: getattr(args, key) for key in keys}


def str2bool(value):
    """True/False, yes/no, 1/0 in any case as a boolean, for argparse."""
    if isinstance(value, bool):
        return value
    text = value.lower()
    if text in ("yes", "true", "t", "y", "1"):
        return True
    if text in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")
