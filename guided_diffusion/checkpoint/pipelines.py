"""Pipelines of diffusers as targets: latents, prompts and flow matching. Needs the package diffusers.

A pipeline stays as it is: its network, text encoders, autoencoder and scheduler are called, so that offloading, LoRA
and compilation of its parts work. Of the scheduler, the process and its list of timesteps count, not its way to take a
step. `KINDS` has the supported pipelines by class name; another one needs a subclass of `Pipeline`.
"""

import dataclasses
import glob
import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codec import Autoencoder, Codec, Pixels, pixels
from ..errors import InputError, display_name, first_line, reading
from ..flow import EDM, FlowMatching, process
from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from ..registry import Registry
from ..respace import SpacedDiffusion
from ..run.files import read_json
from ..target import Batch, Counted, Target
from . import diffusers
from .reading import hash_file

KINDS = Registry("pipeline")
"""Pipelines by the name of their class: subclasses of `Pipeline`."""

Embeddings = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """Prompts of a batch.

    text, negative: for all pictures, or one for each. guidance_scale: classifier-free guidance (Ho & Salimans 2022),
    none at 1 and below; None for the pipeline's default. embeddings: ready ones in place of texts, by the names that
    `encode_prompt` of the pipeline gives them.
    """

    text: str | list[str] | None = None
    negative: str | list[str] | None = None
    guidance_scale: float | None = None
    embeddings: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class Pipeline:
    """How a kind of pipeline is called; subclasses know the arguments of its network."""

    guidance_scale = 5.0
    distilled = False
    """The guidance scale is an input of the network, and there is no negative prompt."""
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    """The tensors that `encode` gives, positive before negative."""
    other_prompts: Mapping[str, None] = {}
    """Arguments of `encode_prompt` for further text encoders: None gives them the same prompt."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def network(self) -> Any:
        return self.pipe.unet if getattr(self.pipe, "unet", None) is not None else self.pipe.transformer

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def patch(self) -> int:
        """Side of the patches of a transformer, which count for dynamic shifting."""
        return getattr(self.network.config, "patch_size", None) or 1

    def codec(self) -> Codec:
        """The pipeline's autoencoder."""
        return autoencoder(self.pipe.vae)

    def side(self) -> int | None:
        """Default side of the latents."""
        return square(self.network.config.sample_size)

    def encode(self, prompt: Prompt, guided: bool, device: torch.device, texts: int) -> Embeddings:
        """The embeddings of `texts` prompts by name."""
        given = {name: value for name, value in prompt.embeddings.items() if value is not None}
        if prompt.text is None and "prompt_embeds" not in given:
            raise InputError("the pipeline needs one, or `prompt_embeds`", parameter="prompt")
        try:
            found = self.encode_prompt(prompt, guided, device, given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(first_line(error), parameter="prompt", value=prompt.text) from None
        embeddings = {name: value for name, value in zip(self.names, found) if value is not None}
        for name, value in embeddings.items():
            if len(value) not in (1, texts):
                raise InputError(f"{len(value)} for {texts} pictures", parameter=name, value=list(value.shape))
        return {name: value.expand(texts, *value.shape[1:]) for name, value in embeddings.items()}

    def encode_prompt(self, prompt: Prompt, guided: bool, device: torch.device, given: Mapping) -> Sequence[Any]:
        """The pipeline's own encoding: tensors in the order of `names`."""
        return self.pipe.encode_prompt(
            prompt=prompt.text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided,
            negative_prompt=prompt.negative, **self.other_prompts, **given,
        )  # fmt: skip

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        """The network's output at x, in its own parameterisation."""
        raise NotImplementedError

    def model(self, prompt: Prompt, device: torch.device, texts: int) -> Callable[..., torch.Tensor]:
        """model(x, t) of the network with the prompts of a batch of `texts` pictures."""
        scale = self.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
        guided = scale > 1 and not self.distilled
        found = self.encode(prompt, guided, device, texts)
        positive = {name: value for name, value in found.items() if not name.startswith("negative_")}
        negative = {name.removeprefix("negative_"): v for name, v in found.items() if name.startswith("negative_")}
        dtype, call = self.network.dtype, Counted(self.call)
        if guided:
            positive = {name: torch.cat([negative[name], value]) for name, value in positive.items()}
        embeddings = {name: value.to(dtype) for name, value in positive.items()}
        if self.distilled:
            embeddings["guidance"] = torch.full((texts,), float(scale), device=device)

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = x.to(dtype)
            if not guided:
                return call(x, t, embeddings).float()
            without, given = call(torch.cat([x, x]), torch.cat([t, t]), embeddings).float().chunk(2)
            return without + scale * (given - without)

        return model


@KINDS.add("StableDiffusionPipeline")
@KINDS.add("StableDiffusionImg2ImgPipeline")
class StableDiffusion(Pipeline):
    """Stable Diffusion 1 and 2."""

    guidance_scale = 7.5

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        if self.network.config.time_cond_proj_dim is not None:
            raise InputError("it is distilled for few steps (time_cond_proj_dim), which is not supported")
        return self.network(x, t, encoder_hidden_states=embeddings["prompt_embeds"], return_dict=False)[0]


@KINDS.add("StableDiffusionXLPipeline")
@KINDS.add("StableDiffusionXLImg2ImgPipeline")
class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL."""

    guidance_scale = 5.0
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        side = [n * autoencoder(self.pipe.vae).factor for n in x.shape[2:]]
        times = torch.tensor([[*side, 0, 0, *side]], device=x.device, dtype=x.dtype).repeat(len(x), 1)
        added = {"text_embeds": embeddings["pooled_prompt_embeds"], "time_ids": times}
        options = {"encoder_hidden_states": embeddings["prompt_embeds"], "added_cond_kwargs": added}
        return self.network(x, t, **options, return_dict=False)[0]


@KINDS.add("StableDiffusion3Pipeline")
@KINDS.add("StableDiffusion3Img2ImgPipeline")
class StableDiffusion3(Pipeline):
    """Stable Diffusion 3."""

    guidance_scale = 7.0
    names = StableDiffusionXL.names
    other_prompts: Mapping[str, None] = {"prompt_2": None, "prompt_3": None}

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        pooled = embeddings["pooled_prompt_embeds"]
        options = {"encoder_hidden_states": embeddings["prompt_embeds"], "pooled_projections": pooled}
        return self.network(hidden_states=x, timestep=t, **options, return_dict=False)[0]


@KINDS.add("FluxPipeline")
@KINDS.add("FluxImg2ImgPipeline")
class Flux(Pipeline):
    """Flux; its latents are packed in patches of 2x2."""

    guidance_scale, distilled = 3.5, True
    names = ("prompt_embeds", "pooled_prompt_embeds")
    patch = 2  # type: ignore[assignment]

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    def side(self) -> int | None:
        return self.pipe.default_sample_size

    def encode_prompt(self, prompt: Prompt, guided: bool, device: torch.device, given: Mapping) -> Sequence[Any]:
        if prompt.negative is not None:
            raise InputError("Flux has none", parameter="negative_prompt", value=prompt.negative)
        return self.pipe.encode_prompt(prompt.text, None, device=device, **given)[:2]

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        n, c, height, width = x.shape
        packed = x.view(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
        ids = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        ids[..., 1] += torch.arange(height // 2, device=x.device)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=x.device)[None]
        text = embeddings["prompt_embeds"]
        guidance = embeddings["guidance"] if self.network.config.guidance_embeds else None
        out = self.network(
            hidden_states=packed,
            timestep=(t / 1000).to(x.dtype),
            guidance=guidance,
            pooled_projections=embeddings["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=ids.reshape(-1, 3),
            return_dict=False,
        )[0]
        return out.view(n, height // 2, width // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@KINDS.add("DDPMPipeline")
@KINDS.add("DDIMPipeline")
@KINDS.add("LDMPipeline")
class Unconditional(Pipeline):
    """A UNet2DModel without prompts, of pixels or latents, for the processes that our own networks do not have."""

    def codec(self) -> Codec:
        for name in ("vqvae", "vae"):
            if getattr(self.pipe, name, None) is not None:
                return autoencoder(getattr(self.pipe, name))
        return pixels(self.channels)

    def encode(self, prompt: Prompt, guided: bool, device: torch.device, texts: int) -> Embeddings:
        if prompt.text is not None:
            raise InputError("the model takes no prompt", parameter="prompt", value=prompt.text)
        return {}

    def model(self, prompt: Prompt, device: torch.device, texts: int) -> Callable[..., torch.Tensor]:
        return super().model(dataclasses.replace(prompt, guidance_scale=1.0), device, texts)

    def call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        if self.network.config.num_class_embeds is not None:
            raise InputError("a class-conditional network is supported by SDDMPipeline in Python only")
        return self.network(x, t).sample


# ---- parts -----------------------------------------------------------------------------------------------------------


def autoencoder(network: Any) -> Autoencoder:
    """The codec of an AutoencoderKL, AutoencoderTiny or VQModel, with the scale and shift of its configuration."""
    config = network.config
    widths = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    scale, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None)
    return Autoencoder(network, 1.0 if scale is None else scale, shift or 0.0, 2 ** (len(widths or (1,)) - 1))


def square(size: Any) -> int | None:
    """The side of a `sample_size`; None where it tells none. Raises InputError for a rectangle."""
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise InputError(f"its network is for rectangles (sample_size {list(size)}), which are not supported")
        return size[0]
    return size


def scheduler_process(
    scheduler: Any, count: int, *, tokens: int = 1, latent: bool = True, learned_range: bool = False, **given: Any
) -> tuple[GaussianDiffusion, bool | float, Callable[[Callable], Callable]]:
    """A scheduler's process over its own list of `count` timesteps.

    tokens: patches of a picture, for dynamic shifting. given: `timesteps` or `sigmas` in place of the count. Returns
    the process, how far x_0 is clipped, and a wrapper that makes the process's model of a network. Raises InputError.
    """
    name, config = type(scheduler).__name__, scheduler.config
    given = {key: value for key, value in given.items() if value is not None}
    flow, edm = name.startswith("FlowMatchEuler"), name.startswith("EDM")
    if flow and config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        given["mu"] = least + (most - least) * (tokens - low) / (high - low)
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= steps:
        raise InputError(f"it can be 1 to {steps}", parameter="num_inference_steps", value=count)
    if not {"timesteps", "sigmas"} & given.keys():
        given["num_inference_steps"] = count
    try:
        scheduler.set_timesteps(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not take these steps: {first_line(error)}", parameter="scheduler") from None
    if flow or edm:
        velocity = config.get("prediction_type") == "v_prediction"
        made = process(EDM if edm else FlowMatching, scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist())
        if edm:
            return made, False, lambda network: EDM(network, config["sigma_data"], velocity)
        return made, False, lambda network: FlowMatching(network, steps)
    diffusers.refuse_other_processes("scheduler", {**config, "_class_name": name})
    betas = config.get("trained_betas")  # an array where the scheduler was made in Python
    listed = {} if betas is None else {"trained_betas": [float(beta) for beta in betas]}
    flags = diffusers.process_flags({**config, **listed, "_class_name": name})
    betas = get_named_beta_schedule(flags["noise_schedule"], flags["diffusion_steps"])
    kinds = {"predict_xstart": ModelMeanType.START_X, "predict_v": ModelMeanType.VELOCITY}
    fixed = ModelVarType.FIXED_SMALL if flags.get("sigma_small", True) else ModelVarType.FIXED_LARGE
    timesteps = {round(float(t)) for t in scheduler.timesteps}
    spaced = SpacedDiffusion(
        {t for t in timesteps if 0 <= t < len(betas)},
        betas=betas,
        model_mean_type=next((kind for flag, kind in kinds.items() if flags[flag]), ModelMeanType.EPSILON),
        model_var_type=ModelVarType.LEARNED_RANGE if learned_range else fixed,
    )
    # Latents have no range of their own.
    return spaced, flags.get("clip_denoised", False) if not latent else False, lambda network: network


def pipeline_target(
    pipe: Any, prompt: Callable[[Batch], Prompt], steps: int, device: torch.device, image_size: int | None, **given: Any
) -> Target:
    """A pipeline as a target, over `steps` timesteps of its scheduler.

    prompt: gives the prompts of a batch. image_size: side of the pictures, None for the pipeline's. given: `timesteps`
    or `sigmas`. Raises InputError.
    """
    kind = KINDS.pick(type(pipe).__name__)(pipe)
    codec = kind.codec()
    side = kind.side() if image_size is None else image_size // codec.factor
    if side is None or side < 1 or (image_size or 0) % codec.factor or side % kind.patch:
        reason = f"it must be a multiple of {codec.factor * kind.patch}"
        raise InputError(reason, parameter="image_size", value=image_size)
    tokens = (side // kind.patch) ** 2
    latent = not isinstance(codec, Pixels)
    diffusion, clip, wrap = scheduler_process(pipe.scheduler, steps, tokens=tokens, latent=latent, **given)

    def condition(batch: Batch) -> Callable[..., torch.Tensor]:
        return wrap(kind.model(prompt(batch), device, len(batch.ref)))

    def unconditioned(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a pipeline is called through Target.conditioned")

    shape = (kind.channels, side, side)
    return Target(Counted(unconditioned), diffusion, codec, shape, side * codec.factor, clip, device, condition)


# ---- files -----------------------------------------------------------------------------------------------------------


def _class_name(file: str) -> str:
    """The class that a JSON file of diffusers names, "" without the file."""
    content = read_json(file) if os.path.isfile(file) else {}
    return str(content.get("_class_name", "")) if isinstance(content, dict) else ""


def is_pipeline(path: str) -> bool:
    """Whether a path is a folder of one of `KINDS` that needs the package diffusers.

    A UNet2DModel of pixels and of DDPM's process does not: it is one of our own networks.
    """
    kind = KINDS.get(_class_name(os.path.join(path, diffusers.INDEX)))
    if kind is not Unconditional:
        return kind is not None
    scheduler = _class_name(os.path.join(path, "scheduler", diffusers.SCHEDULER))
    latent = any(os.path.isdir(os.path.join(path, part)) for part in ("vqvae", "vae"))
    return latent or scheduler.startswith(("FlowMatchEuler", "EDM"))


def load_pipeline(path: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """The pipeline of a folder or Hub id on a device, and the identity of its files for a record.

    Of a folder, nothing is downloaded. Raises InputError where diffusers is missing or the path cannot be loaded.
    """
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
