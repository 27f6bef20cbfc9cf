"""SDDM as a pipeline of diffusers, around any UNet2DModel and scheduler; the only module that imports diffusers.

    from guided_diffusion.diffusers_pipeline import SDDMPipeline
    from PIL import Image

    pipe = SDDMPipeline.from_pretrained("google/ddpm-cat-256").to("cuda")
    picture = pipe(Image.open("dog.png"), num_inference_steps=100, t0=0.5, area=16).images[0]
    picture.save("cat.png")

Folders of DDPMPipeline, DDIMPipeline and LDMPipeline load. What SDDMPipeline saved loads with its `from_pretrained`;
`DiffusionPipeline.from_pretrained` knows the library's own classes only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

try:
    from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel, VQModel  # type: ignore[import-not-found]
    from diffusers.image_processor import VaeImageProcessor  # type: ignore[import-not-found]
    from diffusers.schedulers import KarrasDiffusionSchedulers  # type: ignore[import-not-found]
    from diffusers.utils.torch_utils import randn_tensor  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(f"SDDMPipeline needs the package diffusers: pip install diffusers ({error})") from error

from . import energy as energies
from . import sddm
from .checkpoint.diffusers import process_flags, refuse_other_processes
from .errors import InputError
from .gaussian_diffusion import ModelMeanType, ModelVarType, get_named_beta_schedule
from .image_datasets import load_picture, to_tensor
from .manifold import check_blocks
from .respace import SpacedDiffusion

Pictures = (
    Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[torch.Tensor]
)
ENERGIES: dict[str, Callable[[int], Any]] = {"dct": energies.dct, "low_pass": lambda blocks: energies.low_pass()}


class Stopped(Exception):
    """A callback set `_interrupt`: the state so far is the result."""


class SDDMPipeline(DiffusionPipeline):
    """Translate pictures into the domain of a diffusion model (SDDM, Sun et al. 2023, algorithm 1).

    unet: a UNet2DModel, of pixels or of latents; scheduler: one of DDPM's process, whose betas, prediction type and
    spacing of steps count, not its way to take a step. vqvae or vae: the autoencoder of a latent model.
    """

    model_cpu_offload_seq = "unet->vqvae->vae"
    _optional_components = ["vqvae", "vae"]  # noqa: RUF012 - the library's attributes
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: KarrasDiffusionSchedulers,
        vqvae: VQModel | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        refuse_other_processes("scheduler", _configuration(scheduler))
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, vae=vae)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        num_inference_steps: int = 100,
        t0: float = 0.5,
        area: int = 16,
        energy: Any = None,
        variant: str = "manifold",
        sampler: str = "ancestral",
        eta: float = 0.0,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        num_images_per_image: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Returns ImagePipelineOutput with `images`, `num_images_per_image` in a row for every reference.

        image: the references: PIL pictures, which are cropped and resized to the model's size; arrays [N, H, W, 3] in
        [0, 1]; or tensors [N, 3, H, W] in [0, 1] or, where a value is negative, [-1, 1]. t0: where guidance ends, as a
        fraction of the process. area: the image plane (that of the latents) is cut into area x area blocks. energy:
        None for `dct` (nothing where latents have other than 3 channels), names ("dct", "low_pass"), or objects of
        `guided_diffusion.energy`. variant, sampler, eta: see `sddm.sample`. class_labels: for a class-conditional
        network. output_type: pil, np, pt, or latent. callback_on_step_end(pipe, i, t, {"latents": x}) may return other
        latents; it stops the run by setting `pipe._interrupt`. Raises InputError.
        """
        self._interrupt = False
        if num_images_per_image < 1:
            raise InputError("it must be at least 1", parameter="num_images_per_image", value=num_images_per_image)
        if not 0 <= t0 <= 1:
            raise InputError("it must be from 0 to 1", parameter="t0", value=t0)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise InputError("it can be latents", parameter="callback_on_step_end_tensor_inputs", value=min(unknown))
        device = self._execution_device
        ref = self._encode(self._references(image).to(device)).repeat_interleave(num_images_per_image, dim=0)
        try:
            check_blocks(ref.shape[2:], area)
        except InputError as error:
            raise InputError(error.reason, parameter="area", value=area) from None
        process, clip = self._process(num_inference_steps)
        steps = process.num_timesteps
        last = torch.empty_like(ref)

        def after_step(i: int, x: torch.Tensor) -> None:
            bar.update()
            last.copy_(x)
            if callback_on_step_end is not None:
                timestep = process.timestep_map[i]
                given = callback_on_step_end(self, steps - 1 - i, timestep, {"latents": x}) or {}
                if "latents" in given and given["latents"] is not x:
                    x.copy_(given["latents"])
                    last.copy_(x)
            if self._interrupt:
                raise Stopped

        with self.progress_bar(total=steps) as bar:
            try:
                x = sddm.sample(
                    self._network(class_labels, len(ref), num_images_per_image),
                    process,
                    ref,
                    blocks=area,
                    range_t=min(round(t0 * steps), steps - 1),
                    energies=self._energies(energy, area, ref.shape[1]),
                    variant=variant,
                    clip_denoised=clip,  # type: ignore[arg-type] - a range counts too
                    sampler=sampler,
                    eta=eta,
                    noise=lambda shape: randn_tensor(shape, generator=generator, device=device, dtype=torch.float32),
                    callback=after_step,
                )
            except Stopped:
                x = last
        images = x if output_type == "latent" else self._decode(x)
        self.maybe_free_model_hooks()
        if output_type != "latent":
            images = self.image_processor.postprocess(images.clamp(-1, 1), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- pictures and latents ----------------------------------------------------------------------------------------

    @property
    def _autoencoder(self) -> Any:
        return self.vqvae if self.vqvae is not None else self.vae

    @property
    def _side(self) -> int | None:
        """Side of the pictures in pixels; None where the network's configuration does not tell it."""
        size = self.unet.config.sample_size
        side = size[0] if isinstance(size, (list, tuple)) else size
        if side is None or self._autoencoder is None:
            return side
        return side * 2 ** (len(self._autoencoder.config.block_out_channels) - 1)

    def _references(self, image: Pictures) -> torch.Tensor:
        """References of any kind as float32 [N, 3, H, W] in [-1, 1]."""
        images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError("give at least one", parameter="image", value="[]")
        if isinstance(images[0], Image.Image):
            side = self._side
            if side is None:
                raise InputError(
                    "the network's sample_size is null; give tensors of its size", parameter="image", value="PIL"
                )
            return to_tensor([load_picture(each, side) for each in images])
        if isinstance(images[0], np.ndarray):
            batches = [array[None] if array.ndim == 3 else array for array in images]
            ref = torch.from_numpy(np.concatenate(batches).transpose(0, 3, 1, 2).copy()).float()
        elif isinstance(images[0], torch.Tensor):
            ref = torch.cat([tensor[None] if tensor.ndim == 3 else tensor for tensor in images]).float()
        else:
            kind = type(images[0]).__name__
            raise InputError("it can be PIL pictures, arrays or tensors", parameter="image", value=kind)
        side = self._side
        if ref.ndim != 4 or ref.shape[1] != 3 or (side is not None and ref.shape[2:] != (side, side)):
            shape = list(ref.shape)
            raise InputError(
                f"it must have 3 channels and {side or 'equal'} pixels a side", parameter="image", value=shape
            )
        if not ref.isfinite().all() or ref.min() < -1 or ref.max() > 1:
            raise InputError(
                "its values must be from 0 to 1, or from -1 to 1", parameter="image", value=list(ref.shape)
            )
        return ref if ref.min() < 0 else 2 * ref - 1

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures as what the network works on: themselves, or their latents."""
        if self._autoencoder is None:
            return images
        config = self._autoencoder.config
        encoded = self._autoencoder.encode(images.to(self._autoencoder.dtype))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents.float() - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        if self._autoencoder is None:
            return x
        config = self._autoencoder.config
        latents = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self._autoencoder.decode(latents.to(self._autoencoder.dtype)).sample.float()

    # ---- network and process -----------------------------------------------------------------------------------------

    def _network(
        self, class_labels: Any, count: int, repeats: int
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The network as `sddm.sample` calls it: x and its output in float32, in the network's type within."""
        classes = self.unet.config.num_class_embeds
        options = {}
        if (class_labels is None) != (classes is None and self.unet.config.class_embed_type is None):
            reason = (
                "the network is class-conditional and needs them"
                if class_labels is None
                else "the network has no classes"
            )
            raise InputError(reason, parameter="class_labels", value=class_labels)
        if class_labels is not None:
            labels = torch.as_tensor(class_labels).reshape(-1)
            labels = labels.repeat_interleave(repeats) if len(labels) * repeats == count else labels.expand(count)
            if classes is not None and not ((labels >= 0) & (labels < classes)).all():
                raise InputError(f"they must be from 0 to {classes - 1}", parameter="class_labels", value=class_labels)
            options["class_labels"] = labels.to(self._execution_device)

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = self.unet(x.to(self.unet.dtype), t, **options).sample.float()
            return output if self._learned_range else output[:, : x.shape[1]]

        return network

    @property
    def _learned_range(self) -> bool:
        six = self.unet.config.out_channels == 2 * self.unet.config.in_channels
        return six and getattr(self.scheduler.config, "variance_type", None) == "learned_range"

    def _process(self, num_inference_steps: int) -> tuple[SpacedDiffusion, bool | float]:
        """(the scheduler's process over its own list of timesteps, in float64; how far x_0 is clipped)."""
        config = _configuration(self.scheduler)
        flags = process_flags(config, "scheduler")
        betas = get_named_beta_schedule(flags["noise_schedule"], flags["diffusion_steps"])
        if not 1 <= num_inference_steps <= len(betas):
            raise InputError(f"it can be 1 to {len(betas)}", parameter="num_inference_steps", value=num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = {round(float(t)) for t in self.scheduler.timesteps}
        kinds = {"predict_xstart": ModelMeanType.START_X, "predict_v": ModelMeanType.VELOCITY}
        fixed = ModelVarType.FIXED_LARGE if flags["variance_type"] == "fixed_large" else ModelVarType.FIXED_SMALL
        process = SpacedDiffusion(
            {t for t in timesteps if 0 <= t < len(betas)},
            betas=betas,
            model_mean_type=next((kind for flag, kind in kinds.items() if flags[flag]), ModelMeanType.EPSILON),
            model_var_type=ModelVarType.LEARNED_RANGE if self._learned_range else fixed,
        )
        # Latents have no range of their own.
        return process, flags.get("clip_denoised", self._autoencoder is None)

    def _energies(self, energy: Any, area: int, channels: int) -> list[Any]:
        if energy is None:
            return [energies.dct(area)] if channels == 3 else []
        given = energy if isinstance(energy, (list, tuple)) else [energy]
        named = []
        for each in given:
            if isinstance(each, str) and each not in ENERGIES:
                raise InputError(f"it can be {', '.join(ENERGIES)} or an object", parameter="energy", value=each)
            named.append(ENERGIES[each](area) if isinstance(each, str) else each)
        return named


def _configuration(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


__all__ = ["SDDMPipeline"]
