"""SDDM as pipelines of diffusers: around a UNet2DModel and a scheduler, or around a pipeline with prompts.

    from guided_diffusion.diffusers_pipeline import SDDMPipeline
    from PIL import Image

    pipe = SDDMPipeline.from_pretrained("google/ddpm-cat-256").to("cuda")
    picture = pipe(Image.open("dog.png"), num_inference_steps=100, t0=0.5, area=16).images[0]

    pipe = SDDMPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")
    picture = pipe("a photo of a cat", Image.open("dog.png"), strength=0.7, t0=0.4, area=16).images[0]

Folders of the pipelines in `checkpoint.pipelines.KINDS` load, and those that SDDMPipeline saved. The library loads them
with `DiffusionPipeline.from_pretrained(folder, custom_pipeline="scripts/diffusers", trust_remote_code=True)`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

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
from .checkpoint import pipelines
from .checkpoint.pipelines import KINDS, Prompt, Unconditional
from .codec import OVERSHOOT, Pixels
from .errors import InputError, first_line, renaming
from .image_datasets import ImageError, load_image, to_tensor
from .methods import ENERGIES, create_energies, energy_names
from .target import Batch, Target

Picture = str | Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]
PARAMETERS = {"blocks": "area", "start": "strength", "range_t": "t0"}  # the pipelines' names
PROMPTED = [name for name, kind in KINDS.items() if kind is not Unconditional]  # pipelines with prompts
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


class _Translating:
    """The call that both pipelines share. num_timesteps, guidance_scale: of the last call."""

    num_timesteps = 0
    guidance_scale: float | None = None
    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop."""
        return self._interrupt

    def __call__(
        self, image: Pictures, num_inference_steps: int = 100, t0: float = 0.5, area: int = 16, energy: Any = None,
        variant: str = "manifold", sampler: str | None = None, eta: float = 0.0,
        class_labels: int | Sequence[int] | torch.Tensor | None = None, num_images_per_image: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None, output_type: str = "pil",
        return_dict: bool = True, callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",), *, strength: float | None = None,
        num_images_per_prompt: int = 1, latents: torch.Tensor | None = None, timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None, height: int | None = None, prompts: Prompt | None = None,
    ) -> Any:  # fmt: skip
        """Translate pictures; returns ImagePipelineOutput with `images`, several in a row for every reference.

        Arguments not named here are those of `sddm.sample` and of diffusers' img2img pipelines. Raises InputError.

        Args:
            image: references, one or a list: paths; PIL pictures; arrays [N, H, W, 3], uint8 or in [0, 1]; tensors
                [N, 3, H, W] or [N, 1, H, W] in [0, 1] or, where a value is negative, [-1, 1]; or latents [N, C, H, W].
            t0: share of the process, at its end, without guidance. More of it: more realistic, less like the reference.
            area: number of blocks per side, of the latents for a latent model: with a factor of 8, 16 blocks of 64x64
                latents hold what 16 blocks of a 512-pixel picture do.
            energy: names ("dct", "low_pass"), or objects of `guided_diffusion.energy`; None for `dct` on pixels and
                none on latents.
            sampler: None for ancestral, and ddim for flow matching and EDM.
            class_labels: of a class-conditional network, one for each reference or for all.
            callback_on_step_end: called with (pipe, i, t, {"latents": x}); may return other latents. Setting
                `pipe._interrupt` stops the run.
            strength: begin late: this share of the steps, from the noised reference.
            latents: the first draw of noise. height: side of the pictures in pixels.
            prompts: see `SDDMTextPipeline`, which makes them.
        """
        counts = {"num_images_per_image": num_images_per_image, "num_images_per_prompt": num_images_per_prompt}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise InputError("it must be a whole number of at least 1", parameter=name, value=value)
        repeats, pipe = num_images_per_image * num_images_per_prompt, cast(Any, getattr(self, "pipe", self))
        kind, device = KINDS.get(type(pipe).__name__, Unconditional)(pipe), pipe._execution_device
        if prompts is None:
            labels = {} if class_labels is None else {"class_labels": torch.as_tensor(class_labels).reshape(-1)}
            prompts = Prompt(embeddings=labels)
        wanted = Prompt(
            _repeated(prompts.text, repeats), _repeated(prompts.negative, repeats), prompts.guidance_scale,
            {name: _repeated(values, repeats) for name, values in prompts.embeddings.items()},
        )  # fmt: skip
        given = {"timesteps": timesteps, "sigmas": sigmas}
        target = pipelines.pipeline_target(kind, lambda batch: wanted, num_inference_steps, device, height, **given)
        total, start = target.diffusion.num_timesteps, None
        ref = _encoded(image, target).repeat_interleave(repeats, dim=0)
        if isinstance(generator, (list, tuple)) and len(generator) != len(ref):
            raise InputError(f"{len(ref)} are needed", parameter="generator", value=f"{len(generator)} generators")
        if latents is not None and latents.shape != ref.shape:
            raise InputError(f"{list(ref.shape)} is needed", parameter="latents", value=list(latents.shape))
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise InputError("it can be latents", parameter="callback_on_step_end_tensor_inputs", value=min(unknown))
        if strength is not None:
            if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
                raise InputError("it must be above 0 and at most 1", parameter="strength", value=strength)
            start = max(1, int(total * strength))  # as img2img pipelines round
        if not 0 <= t0 <= 1:
            raise InputError("it must be from 0 to 1", parameter="t0", value=t0)
        steps, range_t = start or total, min(round(t0 * total), total - 1)
        if range_t >= steps - 1:
            variant = "released"  # without guided steps, the start is not restricted either
        self._interrupt, self.num_timesteps = False, steps
        draws = [] if latents is None else [latents.to(device, torch.float32)]
        if sampler is None:  # DDIM's is the Euler step of flow matching and EDM
            sampler = "ddim" if type(pipe.scheduler).__name__.startswith(("FlowMatch", "EDM")) else "ancestral"

        def noise(shape: torch.Size) -> torch.Tensor:
            return draws.pop() if draws else randn_tensor(shape, generator=generator, device=device, dtype=ref.dtype)

        batch = Batch(ref, tuple(map(str, range(len(ref)))))
        with pipe.progress_bar(total=steps) as bar, renaming(PARAMETERS):
            states = sddm.sample.steps(  # type: ignore[attr-defined]
                target.conditioned(batch).model, target.diffusion, ref, blocks=area, range_t=range_t,
                energies=_energies(energy, area, target), variant=variant, clip_denoised=target.clip_denoised,
                sampler=sampler, eta=eta, start=start, noise=noise,
            )  # fmt: skip
            x = ref
            for i, state in enumerate(states):
                x = state["x"]
                bar.update()
                if callback_on_step_end is not None:
                    t = target.diffusion.timestep_map[state["i"]]
                    x.copy_((callback_on_step_end(self, i, t, {"latents": x}) or {}).get("latents", x))
                if self._interrupt:
                    break
        if output_type == "latent":
            images = x
        else:
            with torch.no_grad():
                decoded = target.codec.decode(x).clamp(-1, 1)
            images = VaeImageProcessor(do_resize=False).postprocess(decoded, output_type=output_type)
        pipe.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _repeated(values: Any, repeats: int) -> Any:
    """A list or tensor with each of its values so often; a single one stays, for all pictures."""
    if not isinstance(values, (list, tuple, torch.Tensor)) or len(values) == 1:
        return values
    if isinstance(values, torch.Tensor):
        return values.repeat_interleave(repeats, dim=0)
    return [value for value in values for _ in range(repeats)]


def _energies(energy: Any, area: int, target: Target) -> list[Any]:
    """Energies by name, or as objects; None for dct on pixels and none on latents."""
    if energy is None:
        energy = "dct" if isinstance(target.codec, Pixels) else []
    found: list[Any] = []
    for each in energy if isinstance(energy, (list, tuple)) else [energy]:
        if isinstance(each, str):
            kinds = [ENERGIES[name] for name in energy_names(each)]
            found += [kind(blocks=area) if "blocks" in kind.__dataclass_fields__ else kind() for kind in kinds]
        elif hasattr(each, "energy_and_grad"):
            found.append(each)
        else:
            needed = "it can be names, or objects of guided_diffusion.energy"
            raise InputError(needed, parameter="energy", value=each)
    return create_energies(found, target)


@torch.no_grad()
def _encoded(image: Pictures, target: Target) -> torch.Tensor:
    """References of any kind as x_0 of the model, float32 [N, C, H, W]."""
    images, found = list(image) if isinstance(image, (list, tuple)) else [image], []
    if not images:
        raise InputError("give at least one", parameter="image", value="[]")
    latent = not isinstance(target.codec, Pixels) and target.shape[0] != 3
    for each in images:
        if latent and isinstance(each, torch.Tensor) and each.shape[-3:] == target.shape:
            found.append(each.reshape(-1, *target.shape).to(target.device).float())
        else:
            found.append(target.codec.encode(_pixels(each, target.image_size).to(target.device)))
    return torch.cat(found)


def _pixels(image: Any, side: int) -> torch.Tensor:
    """A picture, or an array or tensor of several, as float32 [N, 3, side, side] in [-1, 1]."""
    try:
        if isinstance(image, (str, Image.Image)):
            return to_tensor([load_image(image, side)])
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3, 4):
            arrays = image if image.ndim == 4 else image[None]
            return to_tensor([load_image(Image.fromarray(array), side) for array in arrays])
    except (ImageError, TypeError) as error:
        value = image if isinstance(image, str) else "it"
        raise InputError(first_line(error), parameter="image", value=value) from None
    x = image
    if isinstance(x, np.ndarray) and x.ndim in (3, 4):
        x = torch.from_numpy(np.ascontiguousarray(x)).movedim(-1, -3)
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4) or x.shape[-3] not in (1, 3):
        reason = "it can be paths, PIL pictures, arrays [N, H, W, 3], tensors [N, 3, H, W] or [N, 1, H, W], or latents"
        value = list(image.shape) if isinstance(image, (np.ndarray, torch.Tensor)) else type(image).__name__
        raise InputError(reason, parameter="image", value=value)
    x = x.reshape(-1, *x.shape[-3:]).expand(-1, 3, -1, -1).float()
    if not x.numel() or not x.isfinite().all() or x.abs().max() > OVERSHOOT:
        raise InputError("its values must be from 0 to 1, or from -1 to 1", parameter="image", value=list(x.shape))
    x = x if x.min() < 0 else 2 * x - 1
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
    return x.clamp(-1, 1)


SHARED = {*inspect.signature(_Translating.__call__).parameters}  # `SDDMTextPipeline` takes others as embeddings


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
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, vae=vae)
        config, own = unet.config, vqvae if vqvae is not None else vae
        wanted = own.config.latent_channels if own is not None else 1 if config.in_channels == 1 else 3
        if config.in_channels != wanted or config.out_channels not in (wanted, 2 * wanted):
            channels = f"{config.in_channels} channels in and {config.out_channels} out"
            needed = f"{wanted} in, and as many or twice as many out, are needed"
            raise InputError(needed, parameter="unet", value=f"a network of {channels}")
        Unconditional(self)
        pipelines.scheduler_process(scheduler, min(25, scheduler.config.get("num_train_timesteps", 25)))

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
            options = {**pipelines.absent_parts(found), **options}
            return SDDMTextPipeline(DiffusionPipeline.from_pretrained(path, **options))
        return super().from_pretrained(path, **options)


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
        negative_prompt: str | list[str] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Translate pictures towards a prompt; returns ImagePipelineOutput with `images`.

        prompt, negative_prompt: for all pictures, or one for each. guidance_scale: classifier-free guidance, None for
        the pipeline's default. options: the other arguments of `SDDMPipeline`, such as generator and output_type, and
        embeddings by the names of the pipeline's arguments, such as `prompt_embeds`. The defaults suit latents of 64x64
        to 128x128. Raises InputError.
        """
        if image is None:
            raise InputError("give the references", parameter="image")
        embeddings = {name: options.pop(name) for name in [*options] if name not in SHARED}
        self.guidance_scale = guidance_scale
        options["prompts"] = Prompt(prompt, negative_prompt, guidance_scale, embeddings)
        return super().__call__(image, num_inference_steps, t0, area, strength=strength, **options)
