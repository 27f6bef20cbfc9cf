"""SDDM as pipelines of diffusers: around a UNet2DModel and a scheduler, or around a pipeline with prompts.

    from guided_diffusion.diffusers_pipeline import SDDMPipeline
    from PIL import Image

    pipe = SDDMPipeline.from_pretrained("google/ddpm-cat-256").to("cuda")
    picture = pipe(Image.open("dog.png"), num_inference_steps=100, t0=0.5, area=16).images[0]

    pipe = SDDMPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")
    picture = pipe("a photo of a cat", Image.open("dog.png"), strength=0.7, t0=0.4, area=16).images[0]

Folders of DDPMPipeline, DDIMPipeline, LDMPipeline and of the pipelines in `checkpoint.pipelines.KINDS` load. A folder
that SDDMPipeline saved loads with its `from_pretrained`, or with the library's own:
`DiffusionPipeline.from_pretrained(folder, custom_pipeline="scripts/diffusers", trust_remote_code=True)`, where
scripts/diffusers/pipeline.py imports the class from this module.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

try:
    from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel, VQModel  # type: ignore[import-not-found]
    from diffusers.image_processor import VaeImageProcessor  # type: ignore[import-not-found]
    from diffusers.schedulers import KarrasDiffusionSchedulers  # type: ignore[import-not-found]
    from diffusers.utils.torch_utils import randn_tensor  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(f"SDDMPipeline needs the package diffusers: pip install diffusers ({error})") from error

from . import sddm
from .checkpoint.pipelines import (
    KINDS,
    Prompt,
    Unconditional,
    absent_parts,
    autoencoder,
    pipeline_target,
    scheduler_process,
    square,
)
from .codec import Codec, Pixels, in_range, pixels
from .errors import InputError, first_line, renaming
from .image_datasets import ImageError, load_image, load_picture, to_tensor
from .manifold import check_blocks
from .methods import ENERGIES, create_energies, energy_names
from .solvers import resolve_step
from .target import Batch, Counted, Target

Picture = str | Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]
PARAMETERS = {"blocks": "area", "start": "strength", "range_t": "t0"}
"""The pipelines' names of parameters."""
PROMPTED = [name for name, kind in KINDS.items() if kind is not Unconditional]
"""Pipelines with prompts, by class name."""

Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


class Stopped(Exception):
    """A callback set `_interrupt`: the state so far is the result."""


class _Translating:
    """The call that both pipelines share."""

    _interrupt = False
    _num_timesteps = 0
    _guidance_scale: float | None = None

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float | None:
        """Guidance scale of the last call."""
        return self._guidance_scale

    def _translate(
        self, pipe: Any, target: Target, image: Pictures, repeats: int, *, t0: float, area: int, energy: Any = None,
        variant: str = "manifold", sampler: str | None = None, eta: float = 0.0, strength: float | None = None,
        generator: Any = None, latents: torch.Tensor | None = None, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callback | None = None, callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:  # fmt: skip
        """Sample; see `SDDMPipeline.__call__`. pipe: the one that has scheduler, progress bar and hooks."""
        self._interrupt = False
        ref, device = self._latents(image, target).repeat_interleave(repeats, dim=0), target.device
        if isinstance(generator, (list, tuple)) and len(generator) != len(ref):
            raise InputError(f"{len(ref)} are needed", parameter="generator", value=f"{len(generator)} generators")
        if latents is not None and latents.shape != ref.shape:
            raise InputError(f"{list(ref.shape)} is needed", parameter="latents", value=list(latents.shape))
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents"}
        if unknown:
            raise InputError("it can be latents", parameter="callback_on_step_end_tensor_inputs", value=min(unknown))
        process, total, start = target.diffusion, target.diffusion.num_timesteps, None
        if strength is not None:
            if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
                raise InputError("it must be above 0 and at most 1", parameter="strength", value=strength)
            start = max(1, int(total * strength))  # as img2img pipelines round
        if not 0 <= t0 <= 1:
            raise InputError("it must be from 0 to 1", parameter="t0", value=t0)
        range_t, steps = min(round(t0 * total), total - 1), start or total
        if range_t >= steps - 1:
            variant = "released"  # without guided steps, the start is not restricted either
        self._num_timesteps = steps
        given = [] if latents is None else [latents.to(device, torch.float32)]
        last = torch.empty_like(ref)

        def noise(shape: torch.Size) -> torch.Tensor:
            return given.pop() if given else randn_tensor(shape, generator=generator, device=device, dtype=ref.dtype)

        def after_step(i: int, x: torch.Tensor) -> None:
            bar.update()
            last.copy_(x)
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, steps - 1 - i, process.timestep_map[i], {"latents": x}) or {}
                if "latents" in changed and changed["latents"] is not x:
                    x.copy_(changed["latents"])
                    last.copy_(x)
            if self._interrupt:
                raise Stopped

        names = Batch(ref, tuple(map(str, range(len(ref)))))
        with pipe.progress_bar(total=steps) as bar, renaming(PARAMETERS):
            check_blocks(ref.shape[2:], area)
            try:
                x = sddm.sample(
                    target.conditioned(names).model,
                    process,
                    ref,
                    blocks=area,
                    range_t=resolve_step(range_t, total, "range_t"),
                    energies=self._energies(energy, area, target),
                    variant=variant,
                    clip_denoised=target.clip_denoised,
                    sampler=sampler or default_sampler(pipe.scheduler),
                    eta=eta,
                    start=start,
                    noise=noise,
                    callback=after_step,
                )
            except Stopped:
                x = last
        with torch.no_grad():
            images = x if output_type == "latent" else target.codec.decode(x)
        pipe.maybe_free_model_hooks()
        if output_type != "latent":
            images = VaeImageProcessor(do_resize=False).postprocess(images.clamp(-1, 1), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _energies(self, energy: Any, area: int, target: Target) -> list[Any]:
        """Energies by name, or as objects; None for dct on pixels and none on latents."""
        if energy is None:
            energy = "dct" if isinstance(target.codec, Pixels) else []
        found = []
        for each in energy if isinstance(energy, (list, tuple)) else [energy]:
            if isinstance(each, str):
                for name in energy_names(each):
                    own = {"blocks": area} if "blocks" in ENERGIES[name].__dataclass_fields__ else {}
                    found += create_energies([ENERGIES[name](**own)], target)
            elif hasattr(each, "energy_and_grad"):
                found.append(each)
            else:
                reason = "it can be names, or objects of guided_diffusion.energy"
                raise InputError(reason, parameter="energy", value=each)
        return found

    def _latents(self, image: Pictures, target: Target) -> torch.Tensor:
        """References of any kind as x_0 of the model, float32 [N, C, H, W]."""
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError("give at least one", parameter="image", value="[]")
        channels = 3 if isinstance(target.codec, Pixels) else target.shape[0]
        found = []
        with torch.no_grad():
            for each in images:
                if isinstance(each, torch.Tensor) and each.ndim in (3, 4) and each.shape[-3] == channels != 3:
                    latents = each.reshape(-1, *each.shape[-3:])
                    if latents.shape[1:] != target.shape:
                        needed = f"latents {list(target.shape)} are needed"
                        raise InputError(needed, parameter="image", value=list(each.shape))
                    found.append(latents.to(target.device).float())
                else:
                    pixels = _pixels(each, target.image_size).to(target.device)
                    found.append(target.codec.encode(in_range(pixels, "image")))
        return torch.cat(found)


def _pixels(image: Any, side: int) -> torch.Tensor:
    """A picture, or an array or tensor of several, as float32 [N, 3, side, side] in [-1, 1]."""
    try:
        if isinstance(image, str):
            return to_tensor([load_image(image, side)])
        if isinstance(image, Image.Image):
            return to_tensor([load_picture(image, side)])
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3, 4):
            arrays = image if image.ndim == 4 else image[None]
            return to_tensor([load_picture(Image.fromarray(array), side) for array in arrays])
    except (ImageError, TypeError) as error:
        value = image if isinstance(image, str) else "it"
        raise InputError(first_line(error), parameter="image", value=value) from None
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] == 3:
        x = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 4 else image[None])).permute(0, 3, 1, 2)
    elif isinstance(image, torch.Tensor) and image.ndim in (3, 4) and image.shape[-3] in (1, 3):
        x = image.reshape(-1, *image.shape[-3:]).expand(-1, 3, -1, -1)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        reason = "arrays have the shape [N, H, W, 3], tensors [N, 3, H, W] or [N, 1, H, W]"
        raise InputError(reason, parameter="image", value=f"{image.dtype} {list(image.shape)}")
    else:
        reason = "it can be paths, PIL pictures, arrays or tensors"
        raise InputError(reason, parameter="image", value=type(image).__name__)
    x = x.float()
    if not x.numel() or not x.isfinite().all() or x.abs().max() > 1.1:
        raise InputError("its values must be from 0 to 1, or from -1 to 1", parameter="image", value=list(x.shape))
    x = x if x.min() < 0 else 2 * x - 1
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
    return x.clamp(-1, 1)


SHARED = {*inspect.getfullargspec(_Translating._translate).kwonlyargs}
"""Arguments that both pipelines take; `SDDMTextPipeline` takes all others as embeddings."""


class SDDMPipeline(_Translating, DiffusionPipeline):
    """Translate pictures into the domain of an unconditional or class-conditional model (SDDM, Sun et al. 2023).

    unet: a UNet2DModel, of colour or grey pixels, or of latents; scheduler: DDPM's process, flow matching or EDM, whose
    process and list of steps count, not its way to take a step. vqvae or vae: the autoencoder of a latent model. Raises
    InputError for parts that do not fit.
    """

    model_cpu_offload_seq = "unet->vqvae->vae"
    _optional_components = ["vqvae", "vae"]  # noqa: RUF012 - the library's attributes
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self, unet: UNet2DModel, scheduler: KarrasDiffusionSchedulers, vqvae: VQModel | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config, own = unet.config, vqvae if vqvae is not None else vae
        square(config.sample_size)
        wanted = own.config.latent_channels if own is not None else 1 if config.in_channels == 1 else 3
        if config.in_channels != wanted or config.out_channels not in (wanted, 2 * wanted):
            channels = f"{config.in_channels} channels in and {config.out_channels} out"
            needed = f"{wanted} in, and as many or twice as many out, are needed"
            raise InputError(needed, parameter="unet", value=f"a network of {channels}")
        scheduler_process(scheduler, min(25, scheduler.config.get("num_train_timesteps", 25)))
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, vae=vae)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """The pipeline of another one's parts; `SDDMTextPipeline` around a pipeline with prompts."""
        if type(pipeline).__name__ in PROMPTED:
            return SDDMTextPipeline(pipeline)
        return super().from_pipe(pipeline, **options)

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        """The pipeline of a folder or Hub id; `SDDMTextPipeline` for one with prompts."""
        keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
        found = cls.load_config(path, **{key: options[key] for key in keys if key in options})
        if found.get("_class_name") in PROMPTED:
            return SDDMTextPipeline(DiffusionPipeline.from_pretrained(path, **{**absent_parts(found), **options}))
        return super().from_pretrained(path, **options)

    def __call__(
        self, image: Pictures, num_inference_steps: int = 100, t0: float = 0.5, area: int = 16, energy: Any = None,
        variant: str = "manifold", sampler: str | None = None, eta: float = 0.0,
        class_labels: int | Sequence[int] | torch.Tensor | None = None, num_images_per_image: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None, output_type: str = "pil",
        return_dict: bool = True, callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",), *, strength: float | None = None,
        num_images_per_prompt: int | None = None, latents: torch.Tensor | None = None,
        timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None,
    ) -> Any:  # fmt: skip
        """Translate pictures; returns ImagePipelineOutput with `images`, several in a row for every reference.

        Args:
            image: references, one or a list: paths; PIL pictures, which are turned upright, cropped and resized to the
                model's size; arrays [N, H, W, 3], uint8 or in [0, 1]; tensors [N, 3, H, W], or [N, 1, H, W] of grey
                ones, in [0, 1] or, where a value is negative, [-1, 1]; or latents [N, C, H, W].
            num_inference_steps: steps of the whole process.
            t0: share of the process, at its end, without guidance. More of it: more realistic, less like the reference.
            area: number of blocks per side, of the latents for a latent model: with a factor of 8, 16 blocks of
                64x64 latents hold what 16 blocks of a 512-pixel picture do.
            energy: names ("dct", "low_pass"), or objects of `guided_diffusion.energy`; None for `dct` on pixels and
                none on latents.
            variant, eta: see `sddm.sample`. sampler: None for ancestral, and ddim for flow matching and EDM.
            class_labels: for a class-conditional network.
            num_images_per_image, num_images_per_prompt: translations of every reference.
            output_type: pil, np, pt, or latent.
            callback_on_step_end: called with (pipe, i, t, {"latents": x}); may return other latents. Setting
                `pipe._interrupt` stops the run.
            strength: begin late, as in img2img pipelines: this share of the steps, from the noised reference.
            latents: the first draw of noise. timesteps, sigmas: the scheduler's list, in place of a number.

        Raises InputError.
        """
        repeats = num_images_per_image if num_images_per_prompt is None else num_images_per_prompt
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise InputError("it must be at least 1", parameter="num_images_per_image", value=repeats)
        own = self.vqvae if self.vqvae is not None else self.vae
        channels, side = self.unet.config.in_channels, square(self.unet.config.sample_size)
        codec: Codec = pixels(channels) if own is None else autoencoder(own)
        if side is None:
            raise InputError("its network's sample_size is null; set it to a side in pixels", parameter="unet")
        given = {"timesteps": timesteps, "sigmas": sigmas}
        process, clip, wrap = scheduler_process(
            self.scheduler, num_inference_steps, latent=own is not None, learned_range=self._learned_range, **given
        )
        device, dtype = self._execution_device, self.unet.dtype

        def condition(batch: Batch) -> Callable[..., torch.Tensor]:
            labels = self._labels(class_labels, len(batch.ref), repeats)

            def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                output = self.unet(x.to(dtype), t, **labels).sample.float()
                return output if self._learned_range else output[:, :channels]

            return wrap(Counted(network))

        target = Target(
            Counted(self.unet), process, codec, (channels, side, side), side * codec.factor, clip, device,
            condition=condition,
        )  # fmt: skip
        return self._translate(
            self, target, image, repeats, t0=t0, area=area, energy=energy, variant=variant, sampler=sampler, eta=eta,
            strength=strength, generator=generator, latents=latents, output_type=output_type, return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip

    def _labels(self, class_labels: Any, count: int, repeats: int) -> dict[str, torch.Tensor]:
        """The network's argument for classes, of `count` pictures."""
        classes = self.unet.config.num_class_embeds
        if (class_labels is None) != (classes is None and self.unet.config.class_embed_type is None):
            needed = "the network is class-conditional and needs them"
            reason = needed if class_labels is None else "the network has no classes"
            raise InputError(reason, parameter="class_labels", value=class_labels)
        if class_labels is None:
            return {}
        labels = torch.as_tensor(class_labels).reshape(-1)
        if len(labels) not in (1, count, count // repeats):
            raise InputError(f"{count // repeats} are needed", parameter="class_labels", value=class_labels)
        labels = labels.repeat_interleave(repeats) if len(labels) * repeats == count else labels.expand(count)
        if classes is not None and not ((labels >= 0) & (labels < classes)).all():
            raise InputError(f"they must be from 0 to {classes - 1}", parameter="class_labels", value=class_labels)
        return {"class_labels": labels.to(self._execution_device)}

    @property
    def _learned_range(self) -> bool:
        six = self.unet.config.out_channels == 2 * self.unet.config.in_channels
        return six and getattr(self.scheduler.config, "variance_type", None) == "learned_range"


class SDDMTextPipeline(_Translating):
    """SDDM around a pipeline with prompts: one of `checkpoint.pipelines.KINDS`.

    The pipeline stays the user's: `to`, offloading, LoRA and every other attribute are those of `pipe`. Raises
    InputError for another class of pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        if type(pipe).__name__ not in PROMPTED:
            raise InputError(f"it can be {', '.join(PROMPTED)}", parameter="pipe", value=type(pipe).__name__)
        self.pipe = pipe

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def to(self, *arguments: Any, **options: Any) -> "SDDMTextPipeline":
        """Move the pipeline; see `DiffusionPipeline.to`."""
        self.pipe.to(*arguments, **options)
        return self

    def __call__(
        self, prompt: str | list[str] | None = None, image: Pictures | None = None, strength: float = 0.8,
        num_inference_steps: int = 50, t0: float = 0.4, area: int = 16, guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None, *, num_images_per_prompt: int = 1,
        num_images_per_image: int = 1, height: int | None = None, timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Translate pictures towards a prompt; returns ImagePipelineOutput with `images`.

        prompt, negative_prompt: for all pictures, or one for each. guidance_scale: classifier-free guidance, None for
        the pipeline's default. height: side of the pictures in pixels. options: the other arguments of `SDDMPipeline`,
        such as generator and output_type, and embeddings by the names of the pipeline's arguments, such as
        `prompt_embeds`. The defaults suit latents of 64x64 to 128x128. Raises InputError.
        """
        embeddings = {name: options.pop(name) for name in [*options] if name not in SHARED}
        if image is None:
            raise InputError("give the references", parameter="image")
        repeats = num_images_per_prompt * num_images_per_image
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise InputError("it must be at least 1", parameter="num_images_per_prompt", value=repeats)
        self._guidance_scale = guidance_scale

        def wanted(batch: Batch) -> Prompt:
            each = [_repeated(texts, repeats, len(batch.ref)) for texts in (prompt, negative_prompt)]
            return Prompt(each[0], each[1], guidance_scale, embeddings)

        device, given = self.pipe._execution_device, {"timesteps": timesteps, "sigmas": sigmas}
        target = pipeline_target(self.pipe, wanted, num_inference_steps, device, height, **given)
        return self._translate(self.pipe, target, image, repeats, strength=strength, t0=t0, area=area, **options)


def default_sampler(scheduler: Any) -> str:
    """The solver that suits a scheduler: DDIM's Euler step for flow matching and EDM, else ancestral."""
    return "ddim" if type(scheduler).__name__.startswith(("FlowMatch", "EDM")) else "ancestral"


def _repeated(texts: Any, repeats: int, count: int) -> Any:
    """One text for all pictures, or a list with one for each of `count`."""
    if not isinstance(texts, (list, tuple)):
        return texts
    if len(texts) * repeats == count:
        return [text for text in texts for _ in range(repeats)]
    if len(texts) == 1:
        return texts[0]
    raise InputError(f"{count // repeats} are needed, one for each picture", parameter="prompt", value=list(texts))
