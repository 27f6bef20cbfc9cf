"""Pipelines of diffusers as targets: latents, prompts and flow matching. Needs the package diffusers.

A pipeline's parts are called as they are, so that offloading, LoRA and compilation work. Of the scheduler, the process
and its timesteps count, not its way to take a step. Another kind of pipeline needs a subclass of `Pipeline`.
"""

import glob
import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..codec import Autoencoder, Pixels, pixels
from ..errors import InputError, display_name, first_line, reading
from ..flow import EDM, FlowMatching, process
from ..gaussian_diffusion import GaussianDiffusion, ModelVarType
from ..registry import Registry
from ..respace import SpacedDiffusion
from ..script_util import create_diffusion
from ..target import Batch, Counted, Target
from . import diffusers
from .reading import hash_file, read_json_object

KINDS = Registry("pipeline")  # pipelines by the name of their class: `Pipeline` and its subclasses
OTHERS = ("FlowMatchEuler", "EDM")  # schedulers of processes that `flow` makes variance preserving


@dataclass(frozen=True)
class Prompt:
    """Prompts of a batch: texts for all pictures or one for each, or ready embeddings in place of them.

    guidance_scale: classifier-free guidance (Ho & Salimans 2022), none at 1 and below; None for the pipeline's default.
    embeddings: by the names that the pipeline's `encode_prompt` has for them; `class_labels` without a text encoder.
    """

    text: str | list[str] | None = None
    negative: str | list[str] | None = None
    guidance_scale: float | None = None
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)


@KINDS.add("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
class Pipeline:
    """How Stable Diffusion 1 and 2 are called; subclasses know the differences of other kinds.

    channels, side: of the latents; patch: side of a transformer's patches. Raises InputError for rectangles.
    """

    guidance_scale = 7.5
    distilled = False  # whether the guidance scale is an input of the network; then there is no negative prompt
    # What `encode_prompt` gives, and its arguments for further text encoders: None gives them the same prompt.
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    other_prompts: Mapping[str, None] = {}

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.network = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
        self.channels = self.network.config.in_channels
        self.side = diffusers.side_of(getattr(self.network.config, "sample_size", None))
        if isinstance(self.side, (list, tuple)):
            raise InputError(f"its network is for rectangles (sample_size {list(self.side)}), which are not supported")
        self.patch = getattr(self.network.config, "patch_size", None) or 1
        own = [each for each in (getattr(pipe, name, None) for name in ("vqvae", "vae")) if each is not None]
        self.codec: Any = autoencoder(own[0]) if own else pixels(self.channels)
        if getattr(self.network.config, "time_cond_proj_dim", None) is not None:
            raise InputError("it is distilled for few steps (time_cond_proj_dim), which is not supported")

    def encode(self, prompt: Prompt, guided: bool, device: torch.device) -> dict[str, torch.Tensor]:
        """The embeddings of a prompt, or of one for each picture, by name."""
        given: dict[str, Any] = {name: value for name, value in prompt.embeddings.items() if value is not None}
        if prompt.text is None and "prompt_embeds" not in given:
            raise InputError("the pipeline needs one, or `prompt_embeds`", parameter="prompt")
        given["num_images_per_prompt"] = 1
        if not self.distilled:
            given |= {"do_classifier_free_guidance": guided, "negative_prompt": prompt.negative}
        elif prompt.negative is not None:
            raise InputError("the pipeline has none", parameter="negative_prompt", value=prompt.negative)
        try:
            found = self.pipe.encode_prompt(prompt=prompt.text, device=device, **self.other_prompts, **given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(first_line(error), parameter="prompt", value=prompt.text) from None
        return {name: value for name, value in zip(self.names, found) if value is not None}

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        """The network's output at x, in its own parameterisation."""
        return self.network(x, t, encoder_hidden_states=embeddings["prompt_embeds"], return_dict=False)[0]

    def model(self, prompt: Prompt, device: torch.device, count: int) -> Callable[..., torch.Tensor]:
        """model(x, t) of the network with the prompts of a batch of `count` pictures."""
        scale = self.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
        guided = scale > 1 and not self.distilled
        dtype, call, found = self.network.dtype, Counted(self.call), {}
        for name, value in self.encode(prompt, guided, device).items():
            if len(value) not in (1, count):
                given = name if name in prompt.embeddings else "prompt"
                raise InputError(f"{len(value)} for {count} pictures", parameter=given, value=list(value.shape))
            found[name] = value.expand(count, *value.shape[1:]).to(dtype if value.is_floating_point() else value.dtype)
        embeddings = {name: value for name, value in found.items() if not name.startswith("negative_")}
        if guided:
            embeddings = {name: torch.cat([found[f"negative_{name}"], value]) for name, value in embeddings.items()}
        if self.distilled:
            embeddings["guidance"] = torch.full((count,), float(scale), device=device)

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = x.to(dtype)
            if not guided:
                return call(x, t, embeddings).float()
            without, given = call(torch.cat([x, x]), torch.cat([t, t]), embeddings).float().chunk(2)
            return without + scale * (given - without)

        return model


@KINDS.add("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
class StableDiffusionXL(Pipeline):
    """Stable Diffusion XL."""

    guidance_scale = 5.0
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        side = [n * self.codec.factor for n in x.shape[2:]]
        times = torch.tensor([[*side, 0, 0, *side]], device=x.device, dtype=x.dtype).repeat(len(x), 1)
        added = {"text_embeds": embeddings["pooled_prompt_embeds"], "time_ids": times}
        options = {"encoder_hidden_states": embeddings["prompt_embeds"], "added_cond_kwargs": added}
        return self.network(x, t, **options, return_dict=False)[0]


@KINDS.add("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
class StableDiffusion3(Pipeline):
    """Stable Diffusion 3."""

    guidance_scale = 7.0
    names = StableDiffusionXL.names
    other_prompts: Mapping[str, None] = {"prompt_2": None, "prompt_3": None}

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        pooled = embeddings["pooled_prompt_embeds"]
        options = {"encoder_hidden_states": embeddings["prompt_embeds"], "pooled_projections": pooled}
        return self.network(hidden_states=x, timestep=t, **options, return_dict=False)[0]


@KINDS.add("FluxPipeline", "FluxImg2ImgPipeline")
class Flux(Pipeline):
    """Flux; its latents are packed in patches of 2x2."""

    guidance_scale, distilled = 3.5, True
    names = ("prompt_embeds", "pooled_prompt_embeds")
    other_prompts: Mapping[str, None] = {"prompt_2": None}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.channels, self.side, self.patch = self.channels // 4, pipe.default_sample_size, 2

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        n, c, height, width = x.shape
        packed = x.view(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
        ids = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        ids[..., 1] += torch.arange(height // 2, device=x.device)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=x.device)[None]
        text = embeddings["prompt_embeds"]
        out = self.network(
            hidden_states=packed, timestep=(t / 1000).to(x.dtype), encoder_hidden_states=text,
            pooled_projections=embeddings["pooled_prompt_embeds"], img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
            guidance=embeddings["guidance"] if self.network.config.guidance_embeds else None, return_dict=False,
        )[0]  # fmt: skip
        return out.view(n, height // 2, width // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@KINDS.add("DDPMPipeline", "DDIMPipeline", "LDMPipeline")
class Unconditional(Pipeline):
    """A UNet2DModel without prompts, of pixels or latents, for the processes that our own networks do not have."""

    def encode(self, prompt: Prompt, guided: bool, device: torch.device) -> dict[str, torch.Tensor]:
        if prompt.text is not None:
            raise InputError("the model takes no prompt", parameter="prompt", value=prompt.text)
        labels, classes = prompt.embeddings.get("class_labels"), self.network.config.num_class_embeds
        if (labels is None) != (classes is None and self.network.config.class_embed_type is None):
            needed = "the network is class-conditional; SDDMPipeline in Python takes them"
            reason = needed if labels is None else "the network has no classes"
            raise InputError(reason, parameter="class_labels", value=labels)
        if classes is not None and labels is not None and not ((labels >= 0) & (labels < classes)).all():
            raise InputError(f"they must be from 0 to {classes - 1}", parameter="class_labels", value=labels.tolist())
        return {} if labels is None else {"class_labels": labels.to(device)}

    def model(self, prompt: Prompt, device: torch.device, count: int) -> Callable[..., torch.Tensor]:
        return super().model(replace(prompt, guidance_scale=1.0), device, count)

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(x, t, **embeddings).sample


# ---- parts -----------------------------------------------------------------------------------------------------------


def autoencoder(network: Any) -> Autoencoder:
    """The codec of an AutoencoderKL, AutoencoderTiny or VQModel, with the scale and shift of its configuration."""
    config = network.config
    widths = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    scale, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None)
    return Autoencoder(network, 1.0 if scale is None else scale, shift or 0.0, 2 ** (len(widths or (1,)) - 1))


def scheduler_process(
    scheduler: Any, count: int, *, tokens: int = 1, latent: bool = True, doubled: bool = False, **given: Any
) -> tuple[GaussianDiffusion, bool | float, Callable[[Callable], Callable]]:
    """(process, how far x_0 is clipped, wrapper of the network) of a scheduler's own list of `count` timesteps.

    tokens: patches of a picture, for dynamic shifting. doubled: the network predicts a variance, too. given:
    `timesteps` or `sigmas` in place of the count. Raises InputError.
    """
    name, config = type(scheduler).__name__, scheduler.config
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= steps:
        raise InputError(f"it can be 1 to {steps}", parameter="num_inference_steps", value=count)
    given = {key: value for key, value in given.items() if value is not None} or {"num_inference_steps": count}
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        given["mu"] = least + (most - least) * (tokens - low) / (high - low)
    try:
        scheduler.set_timesteps(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not take these steps: {first_line(error)}", parameter="scheduler") from None
    if name.startswith(OTHERS):
        kind, options = FlowMatching, {"steps": steps}
        if name.startswith("EDM"):
            velocity = config.get("prediction_type") == "v_prediction"
            kind, options = EDM, {"sigma_data": config["sigma_data"], "velocity": velocity}
        made = process(kind, scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist())
        return made, False, partial(kind, **options)
    config = {**config, "_class_name": name}
    if config.get("trained_betas") is not None:  # an array where the scheduler was made in Python
        config["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
    diffusers.refuse_other_processes("scheduler", config)
    flags = diffusers.process_flags(config)
    whole = create_diffusion(**{**flags, "learn_sigma": flags.get("learn_sigma", False) and doubled})
    spaced = SpacedDiffusion(
        {t for t in (round(float(t)) for t in scheduler.timesteps) if 0 <= t < whole.num_timesteps},
        betas=whole.betas, model_mean_type=whole.model_mean_type, model_var_type=whole.model_var_type,
    )  # fmt: skip
    # Latents have no range of their own.
    return spaced, not latent and flags.get("clip_denoised", False), lambda network: network


def pipeline_target(
    kind: Pipeline, prompt: Callable[[Batch], Prompt], steps: int, device: torch.device, image_size: int | None = None,
    **given: Any,
) -> Target:  # fmt: skip
    """A pipeline as a target, over `steps` timesteps of its scheduler. Raises InputError.

    image_size: side of the pictures, None for the pipeline's. given: `timesteps` or `sigmas`.
    """
    codec, config, unit = kind.codec, kind.network.config, kind.codec.factor * kind.patch
    size = kind.side * codec.factor if image_size is None and kind.side else image_size
    if not size or size % unit:
        reason = f"a multiple of {unit} is needed (by default the network's sample_size)"
        raise InputError(reason, parameter="image_size", value=image_size)
    side = size // codec.factor
    diffusion, clip, wrap = scheduler_process(
        kind.pipe.scheduler, steps, tokens=(size // unit) ** 2, latent=not isinstance(codec, Pixels),
        doubled=getattr(config, "out_channels", None) == 2 * config.in_channels, **given,
    )  # fmt: skip
    kept = 2 * kind.channels if diffusion.model_var_type is ModelVarType.LEARNED_RANGE else kind.channels

    def condition(batch: Batch) -> Callable[..., torch.Tensor]:
        model = kind.model(prompt(batch), device, len(batch.ref))
        return wrap(lambda x, t: model(x, t)[:, :kept])

    shape, model = (kind.channels, side, side), Counted(kind.network)  # called through `Target.conditioned`
    return Target(model, diffusion, codec, shape, size, clip, device, condition)


# ---- files -----------------------------------------------------------------------------------------------------------


def _class_name(*parts: str) -> str:
    """The class that a JSON file of diffusers names, "" without the file."""
    file = os.path.join(*parts)
    return str(read_json_object(file).get("_class_name")) if os.path.isfile(file) else ""


def is_pipeline(path: str) -> bool:
    """Whether a path is a folder of one of `KINDS`, but for a UNet2DModel that is one of our own networks."""
    kind = KINDS.get(_class_name(path, diffusers.INDEX))
    if kind is not Unconditional:
        return kind is not None
    latent = any(os.path.isdir(os.path.join(path, part)) for part in ("vqvae", "vae"))
    return latent or _class_name(path, "scheduler", diffusers.SCHEDULER).startswith(OTHERS)


def load_pipeline(path: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """The pipeline of a folder or Hub id on a device, and the identity of its files for a record. Raises InputError."""
    try:
        library: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(f"{display_name(path)} is a pipeline; pip install diffusers transformers ({error})") from None
    here = os.path.isdir(path)
    library.utils.logging.disable_progress_bar()  # the run has one of its own
    with reading(path, "a pipeline of diffusers"):
        config = library.DiffusionPipeline.load_config(path)
        name = config["_class_name"]
        if name not in KINDS:
            raise ValueError(f"it is a {name}; supported are {', '.join(KINDS)}")
        cls = getattr(library, name)
        # The checker would judge nothing here: its pictures are not asked for.
        optional = {"safety_checker": None} if "safety_checker" in cls._optional_components else {}
        optional |= absent_parts(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the name of dtype, which depends on the version
            pipe = cls.from_pretrained(path, torch_dtype=dtype, local_files_only=here, **optional)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe.to(device), folder_identity(path) if here else path


def absent_parts(config: Mapping[str, Any]) -> dict[str, None]:
    """Parts that a pipeline was saved without, as arguments of `from_pretrained`."""
    return {name: None for name, entry in config.items() if isinstance(entry, (list, tuple)) and entry[0] is None}


def folder_identity(path: str) -> str:
    """Hash of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(path), "**"), recursive=True))):
        digest.update(os.path.relpath(file, path).encode("utf-8", "surrogateescape") + b"\0")
        hash_file(file, digest)
    return f"sha256 {digest.hexdigest()}"
