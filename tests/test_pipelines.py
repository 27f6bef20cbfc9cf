"""SDDM around pipelines of diffusers, and the library's networks, schedulers and img2img beside ours."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DIR
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripts_in_process import message, run_script
from tiny import make_references, pictures, record

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from guided_diffusion import Translator, energy, sddm
from guided_diffusion.checkpoint import load_model
from guided_diffusion.checkpoint.loading import convert
from guided_diffusion.checkpoint.pipelines import autoencoder, scheduler_process
from guided_diffusion.diffusers_pipeline import SDDMPipeline, SDDMTextPipeline
from guided_diffusion.errors import InputError
from guided_diffusion.flow import EDM, process
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.manifold import block_statistics, diffuse_statistics
from guided_diffusion.script_util import create_diffusion

ROOT = Path(__file__).resolve().parent.parent
FOLDER = GOLDEN_DIR / "diffusers"
NAMES = ("ddpm_eps", "butterflies", "v_cosine", "old_layout", "class_cond", "adm_scale_shift", "mixed")
MODELS = [name for name in NAMES if (FOLDER / name).is_dir()]
SMALL = {"num_inference_steps": 6, "t0": 0.34, "area": 4, "output_type": "pt"}
STEPS, SIDE = 10, 8  # SIDE: of the latents

pytestmark = pytest.mark.slow


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def references(count=2, side=16):
    return torch.rand(count, 3, side, side, generator=seeded(3))


def latents(count=2, seed=5):
    return torch.randn(count, 4, SIDE, SIDE, generator=seeded(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(path):
    return quiet(SDDMPipeline.from_pretrained(path))


# ---- around a UNet2DModel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return pipeline(FOLDER / "ddpm_eps")


@pytest.mark.parametrize("name", MODELS)
def test_whole_runs_are_those_of_our_networks(name):
    labels = [1, 4] if name == "class_cond" else None
    options = {**SMALL, "energy": {"ddpm_eps": "dct", "v_cosine": [energy.dct(4)]}.get(name)}
    found = pipeline(FOLDER / name)(references(), **options, class_labels=labels, generator=seeded()).images
    model, info = load_model(FOLDER / name)
    spacing = "trailing6" if name == "v_cosine" else "leading6"
    flags = {**info.flags, "sigma_small": info.choose("sigma_small"), "timestep_respacing": spacing}
    generator = seeded()
    expected = sddm.sample(
        model if labels is None else lambda x, t: model(x, t, torch.tensor(labels)), create_diffusion(**flags),
        2 * references() - 1, blocks=4, range_t=2, energies=[energy.dct(4)], clip_denoised=info.choose("clip_denoised"),
        noise=lambda shape: torch.randn(shape, generator=generator),
    )  # fmt: skip
    assert (expected.clamp(-1, 1) / 2 + 0.5 - found).abs().max() <= 5e-5


def test_pictures_of_all_kinds(pipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = (to_tensor([load_image(tmp_path / "a.png", 16)]) + 1) / 2
    expected = pipe(tensor, **SMALL, generator=seeded()).images
    for image in (
        Image.open(tmp_path / "a.png"), [str(tmp_path / "a.png")], pixels, [tensor[0]], 2 * tensor - 1,
        tensor.permute(0, 2, 3, 1).numpy(), [tensor[0].permute(1, 2, 0).numpy()],
    ):  # fmt: skip
        torch.testing.assert_close(pipe(image, **SMALL, generator=seeded()).images, expected, rtol=0, atol=1e-5)
    picture = pipe(tensor, **{**SMALL, "output_type": "pil"}, generator=seeded()).images[0]
    assert picture.size == (16, 16)
    assert pipe(tensor, **{**SMALL, "output_type": "np"}, return_dict=False)[0].shape == (1, 16, 16, 3)


def test_one_generator_per_picture_and_several_pictures_of_one(pipe):
    together = pipe(references(), **SMALL, generator=[seeded(1), seeded(2)]).images
    alone = pipe(references()[1:], **SMALL, generator=seeded(2)).images
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    several = pipe(references(), **SMALL, num_images_per_image=2, generator=[seeded(n) for n in (1, 5, 6, 2)]).images
    torch.testing.assert_close(several[[0, 3]], together, rtol=0, atol=1e-4)


def test_callback_sees_replaces_and_stops(pipe):
    seen, again = [], []

    def callback(given_pipe, i, t, tensors):
        assert given_pipe is pipe
        seen.append((i, t, tensors["latents"].clone()))
        if len(seen) == 4:
            given_pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])} if len(seen) == 3 else None

    images = pipe(references(1), **SMALL, callback_on_step_end=callback, generator=seeded()).images
    assert [(i, t) for i, t, _ in seen] == [(0, 830), (1, 664), (2, 498), (3, 332)] and pipe.interrupt
    torch.testing.assert_close(images, (seen[-1][2].clamp(-1, 1) + 1) / 2)

    def watch(given_pipe, i, t, tensors):
        again.append(tensors["latents"].clone())

    pipe(references(1), **SMALL, generator=seeded(), callback_on_step_end=watch)
    assert not torch.equal(seen[3][2], again[3]) and torch.equal(seen[1][2], again[1])


@pytest.mark.parametrize("options, parameter", [
    ({"area": 5}, "area"), ({"t0": 1.5}, "t0"), ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"num_inference_steps": 5.5}, "num_inference_steps"), ({"energy": "vggg"}, "energy"), ({"energy": 5}, "energy"),
    ({"class_labels": 3}, "class_labels"), ({"num_images_per_image": 0}, "num_images_per_image"),
    ({"strength": 0.0}, "strength"), ({"generator": [seeded()] * 3}, "generator"),
    ({"latents": references(1, 8)}, "latents"), ({"image": references(1, 8)[:, :2]}, "image"),
    ({"image": [references(1), 3]}, "image"), ({"image": 255 * references()}, "image"), ({"image": []}, "image"),
    ({"image": "cat.png"}, "image"),
    ({"callback_on_step_end_tensor_inputs": ["image"]}, "callback_on_step_end_tensor_inputs"),
], ids=str)  # fmt: skip
def test_refusals(options, parameter, pipe):
    with pytest.raises(InputError) as caught:
        pipe(**{"image": references(), **SMALL, **options})
    assert caught.value.parameter == parameter


def test_saving_loading_and_other_pipelines(pipe, tmp_path):
    expected = pipe(references(), **SMALL, generator=seeded()).images
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline(tmp_path / "saved")(references(), **SMALL, generator=seeded()).images, expected)
    other = quiet(SDDMPipeline.from_pipe(diffusers.DDPMPipeline.from_pretrained(FOLDER / "ddpm_eps")))
    assert torch.equal(other(references(), **SMALL, generator=seeded()).images, expected)
    assert load_model(tmp_path / "saved")[1].model_type == "DDPM"  # and the command line reads it


def test_network_in_half_precision(pipe):
    half = pipeline(FOLDER / "ddpm_eps").to(torch.bfloat16)
    options = {**SMALL, "energy": [], "num_inference_steps": 3}
    images = half(references(), **options, generator=seeded()).images
    assert images.dtype == torch.float32
    assert (images - pipe(references(), **options, generator=seeded()).images).abs().mean() < 0.05


def test_schedulers_that_clip_hold_betas_or_are_of_other_processes(pipe):
    betas = np.linspace(1e-4, 2e-2, 1000)
    for scheduler, clip in (
        (diffusers.HeunDiscreteScheduler(clip_sample=True, clip_sample_range=2.0), 2.0),
        (diffusers.HeunDiscreteScheduler(), False), (diffusers.DDPMScheduler(trained_betas=betas), True),
    ):  # fmt: skip
        made, found, _ = scheduler_process(scheduler, 10, latent=False)
        assert found == clip and made.num_timesteps >= 10
    assert made.alphas_cumprod[-1] == pytest.approx(np.cumprod(1 - betas)[made.timestep_map[-1]])
    for scheduler, says in (
        (diffusers.LCMScheduler(), "consistency"),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    ):
        with pytest.raises(InputError, match=says):
            SDDMPipeline(pipe.unet, scheduler)


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_schedulers_of_ddpms_process_give_their_timesteps(name, pipe):
    other, times = quiet(SDDMPipeline(pipe.unet, getattr(diffusers, f"{name}Scheduler")())), []
    other(references(1), **SMALL, callback_on_step_end=lambda p, i, t, k: times.append(t))
    assert times == sorted({round(float(t)) for t in other.scheduler.timesteps if t >= 0}, reverse=True)


# ---- diffusers' networks ---------------------------------------------------------------------------------------------


def test_the_demo_model_samples_the_same_in_the_library(tmp_path):
    convert(ROOT / "models" / "fluent3d_64.safetensors", tmp_path / "folder")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    model, info = load_model(ROOT / "models" / "fluent3d_64.safetensors")
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": "5"})
    theirs.scheduler.set_timesteps(5)
    ours = other = torch.randn(1, 3, 64, 64, generator=seeded())
    assert theirs.scheduler.timesteps.tolist() == diffusion.timestep_map[::-1]
    for i, t in zip(range(4, -1, -1), theirs.scheduler.timesteps):
        noise = torch.randn(1, 3, 64, 64, generator=seeded(i))
        with torch.no_grad():
            ours = diffusion.p_sample(model, ours, torch.tensor([i]), noise=noise)["sample"]
            output = theirs.unet(other, t).sample
        # `step` draws its noise from the generator in the same way.
        other = theirs.scheduler.step(output, t, other, generator=seeded(i)).prev_sample
    assert (ours - other).abs().max() <= 2e-5


BLOCKS = {"plain": "{}Block2D", "resnet": "Resnet{}sampleBlock2D", "attention": "Attn{}Block2D"}


@st.composite
def configurations(draw):
    """Configurations of the supported family."""
    resampling, base, count = draw(st.sampled_from(["plain", "resnet"])), draw(st.sampled_from([16, 32])), st.integers
    widths = [base, *(base * draw(st.sampled_from([1, 1, 2])) for _ in range(draw(count(0, 2))))]
    kinds = [draw(st.sampled_from(["attention", resampling])) for _ in widths]
    sines_first, groups = draw(st.booleans()), draw(st.sampled_from([4, 8, 16]))
    way = "resnet" if resampling == "resnet" else "conv"
    channels = draw(st.sampled_from([1, 3]))
    return {
        "sample_size": 8, "in_channels": channels, "out_channels": channels,
        "block_out_channels": widths, "layers_per_block": draw(count(1, 2)),
        "down_block_types": [BLOCKS[kind].format("Down") for kind in kinds], "downsample_type": way,
        "up_block_types": [BLOCKS[kind].format("Up") for kind in reversed(kinds)], "upsample_type": way,
        "downsample_padding": draw(st.sampled_from([0, 1])), "flip_sin_to_cos": not sines_first,
        "freq_shift": int(sines_first), "norm_eps": draw(st.sampled_from([1e-5, 1e-6])), "norm_num_groups": groups,
        "attn_norm_num_groups": draw(st.sampled_from([None, groups])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "attention_head_dim": draw(st.sampled_from([None, 8])), "num_class_embeds": draw(st.sampled_from([None, 4])),
    }  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(config=configurations(), seed=st.integers(0, 1000))
def test_any_network_of_the_family_is_ours(config, seed, tmp_path_factory):
    torch.manual_seed(seed)
    theirs = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("family") / "unet"
    theirs.save_pretrained(folder)
    model, info = load_model(folder)
    x, t = torch.randn(2, config["in_channels"], 8, 8), torch.tensor([3, 700])
    labels = [torch.tensor([0, 3])] if config["num_class_embeds"] else []
    with torch.no_grad():
        expected, output = theirs(x, t, *labels).sample, model(x, t, *labels)
    assert (output - expected).abs().max() <= 2e-5 * max(1, expected.abs().max()), (info.model_type, json.dumps(config))


# ---- grey pictures, latents and other processes ----------------------------------------------------------------------


def autoencoder_of(channels=4, kind="AutoencoderKL", **options):
    """An autoencoder that halves sides."""
    torch.manual_seed(2)
    return getattr(diffusers, kind)(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels, **options,
    ).eval()  # fmt: skip


def unet2d(channels):
    torch.manual_seed(6)
    return diffusers.UNet2DModel(
        sample_size=SIDE, in_channels=channels, out_channels=channels, block_out_channels=(16, 32), norm_num_groups=8,
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def test_grey_pictures():
    pipe = quiet(SDDMPipeline(unet2d(1), diffusers.DDPMScheduler()))
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    grey = torch.from_numpy(pixels / 255).float()[None, None]
    images = [
        pipe(each, **SMALL, generator=seeded()).images
        for each in (pixels, Image.fromarray(pixels), grey, grey.expand(-1, 3, -1, -1))
    ]
    assert images[0].shape == (1, 3, SIDE, SIDE) and torch.equal(images[0][:, 0], images[0][:, 2])
    for each in images[1:]:
        torch.testing.assert_close(each, images[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind, part, channels", [("VQModel", "vqvae", 3), ("AutoencoderKL", "vae", 4)])
def test_latent_models_encode_translate_and_decode(kind, part, channels, tmp_path):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    SDDMPipeline(unet2d(channels), scheduler, **{part: autoencoder_of(channels, kind)}).save_pretrained(
        tmp_path / "ldm"
    )
    with pytest.raises(InputError, match="latent diffusion model"):
        load_model(tmp_path / "ldm")
    pipe = pipeline(tmp_path / "ldm")

    def run(**options):
        return pipe(references(), **{**SMALL, "area": 2, **options}, generator=seeded()).images

    images, made, codec = run(), run(output_type="latent"), autoencoder(getattr(pipe, part))
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and made.shape[2:] == (SIDE, SIDE)
    assert torch.equal((codec.decode(made).clamp(-1, 1) + 1) / 2, images)
    # At t0 = 0 the latents' blocks have the reference's means.
    ref = block_statistics(codec.encode(2 * references() - 1), 2)[0]
    guided, plain = (block_statistics(run(t0=t0, output_type="latent"), 2)[0] for t0 in (0.0, 1.0))
    assert (guided - ref).abs().mean() < (plain - ref).abs().mean()
    assert pipe(Image.new("RGB", (50, 30)), **{**SMALL, "area": 2}).images.shape == (1, 3, 16, 16)
    with pytest.raises(InputError) as caught:
        run(area=16)
    assert caught.value.parameter == "area"


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_folders_without_prompts_of_other_processes(name, tmp_path):
    """On the command line, and in Python by SDDMPipeline's own loading and the library's."""
    make_references(tmp_path / "ref", ["a.png"])
    diffusers.DDPMPipeline(unet2d(3), getattr(diffusers, name)()).save_pretrained(tmp_path / "model")
    flags = ("--model_path", tmp_path / "model", "--base_samples", tmp_path / "ref", "--save_dir", tmp_path / "out")
    flags += ("--timestep_respacing", 4, "--range_t", 1, "--area", 2, "--energy", "none", "--sampler", "ddim")
    assert run_script("ae_sample", *flags) == 0
    assert pictures(tmp_path / "out")["a.png"].shape == (SIDE, SIDE, 3)
    options = {"custom_pipeline": str(ROOT / "scripts" / "diffusers"), "trust_remote_code": True}
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", **options)
    assert type(theirs).__name__ == "SDDMPipeline"
    a, b = (
        quiet(each)(references(1, SIDE), num_inference_steps=4, area=2, generator=seeded(), output_type="pt").images
        for each in (pipeline(tmp_path / "model"), theirs)
    )
    assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_the_euler_step_of_the_library(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    scheduler.set_timesteps(STEPS)
    x = latents() * scheduler.sigmas[0]
    diffusion = process(EDM, scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist())

    def network(x, t):
        return torch.tanh(1.5 * x.roll(1, 3) - 0.3 * x + t[:, None, None, None] / 1000)

    model, ours = EDM(network, 0.5, prediction == "v_prediction"), x / (1 + scheduler.sigmas[0] ** 2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
        ours = diffusion.ddim_sample(model, ours, torch.full((2,), STEPS - 1 - i), clip_denoised=False)["sample"]
        scale = (1 + scheduler.sigmas[i + 1] ** 2) ** 0.5
        torch.testing.assert_close(ours * scale, x, atol=2e-4, rtol=1e-4)


# ---- pipelines with prompts ------------------------------------------------------------------------------------------


def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    made = transformers.CLIPTokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[])
    made.model_max_length = 8
    return made


def text_encoder(projection=False):
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def unet(**options):
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()  # fmt: skip


def stable_diffusion(scheduler):
    return diffusers.StableDiffusionPipeline(
        autoencoder_of(), text_encoder(), tokenizer(), unet(cross_attention_dim=32), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(scheduler):
    network = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=1, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        autoencoder_of(), text_encoder(), text_encoder(True), tokenizer(), tokenizer(), network, scheduler,
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(scheduler):
    torch.manual_seed(4)
    network = diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=scheduler, vae=autoencoder_of(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder(True), tokenizer=tokenizer(), text_encoder_2=text_encoder(True),
        tokenizer_2=tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


DDPM = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
CASES = {
    "SD, DDIM": (stable_diffusion, lambda: diffusers.DDIMScheduler(**DDPM), "ddim"),
    "SD, DDPM": (stable_diffusion, lambda: diffusers.DDPMScheduler(**DDPM), "ancestral"),
    "XL, DDIM": (stable_diffusion_xl, lambda: diffusers.DDIMScheduler(**DDPM), "ddim"),
    "XL, DDPM": (stable_diffusion_xl, lambda: diffusers.DDPMScheduler(**DDPM), "ancestral"),
    "SD3, flow matching": (stable_diffusion_3, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "ddim"),
}


def made(case):
    make, scheduler, sampler = CASES[case]
    return quiet(make(scheduler())), sampler


def img2img(pipe):
    """The library's own img2img pipeline of the same parts."""
    name = type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    parts = {**pipe.components, **({"requires_safety_checker": False} if "safety_checker" in pipe.components else {})}
    return quiet(getattr(diffusers, name)(**parts))


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_without_guided_steps_it_is_the_library_s_img2img(case, scale):
    pipe, sampler = made(case)
    options = {"num_inference_steps": STEPS, "strength": 0.6, "guidance_scale": scale, "output_type": "latent"}
    prompts = {"prompt": ["a photo", "a dog"], "negative_prompt": ["bad", "blurred"]}
    sizes = {"height": 2 * SIDE, "width": 2 * SIDE} if case.startswith("SD3") else {}
    # The library's img2img of this version takes latents of four channels for the picture.
    wanted = img2img(pipe)(image=latents(), generator=seeded(), **prompts, **options, **sizes).images
    ours = SDDMPipeline.from_pipe(pipe)
    found = ours(image=latents(), generator=seeded(), t0=1.0, area=2, sampler=sampler, **prompts, **options).images
    assert isinstance(ours, SDDMTextPipeline) and ours.num_timesteps == 6 and ours.guidance_scale == scale
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_flux_equals_the_library_with_dynamic_shifting():
    torch.manual_seed(5)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = autoencoder_of(shift_factor=0.1, scaling_factor=0.4)
    pipe = quiet(diffusers.FluxPipeline(scheduler, vae, text_encoder(), tokenizer(), None, None, network))
    options = {"num_inference_steps": STEPS, "strength": 0.6, "guidance_scale": 3.0, "output_type": "latent"}
    options["prompt_embeds"] = torch.randn(1, 6, 32, generator=seeded(1))
    options["pooled_prompt_embeds"] = torch.randn(1, 32, generator=seeded(2))
    picture, other = references(1), img2img(pipe)
    encoded = autoencoder(pipe.vae).encode(2 * picture - 1)
    # The library draws from the autoencoder's distribution: ours is its mode.
    other.vae.encode = lambda x, encode=other.vae.encode: transformers.utils.ModelOutput(
        latents=encode(x).latent_dist.mode()
    )
    wanted = other(image=picture, height=16, width=16, generator=seeded(), **options).images
    wanted = other._unpack_latents(wanted, 16, 16, other.vae_scale_factor)
    options |= {"t0": 1.0, "area": 2, "sigmas": np.linspace(1, 1 / STEPS, STEPS).tolist(), "height": 16}
    found = SDDMPipeline.from_pipe(pipe)(image=encoded, generator=seeded(), **options).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["SD, DDIM", "SD3, flow matching"])
def test_guided_steps_of_latents_lie_on_the_manifold(case):
    pipe, _ = made(case)
    ref, states = latents(), {}

    def keep(pipe, i, t, state):
        states[i] = state["latents"].clone()

    SDDMPipeline.from_pipe(pipe)("a photo", ref, num_inference_steps=STEPS, strength=0.8, t0=0.3, area=4,
                                 output_type="latent", energy="dct", callback_on_step_end=keep)  # fmt: skip
    assert len(states) == 8
    alpha_bars, (mean, var) = scheduler_process(pipe.scheduler, STEPS)[0].alphas_cumprod, block_statistics(ref, 4)
    for i in range(3):  # above t0, the state is on the manifold of the next step
        wanted = diffuse_statistics(mean, var, float(alpha_bars[STEPS - 4 - i]))
        found = block_statistics(states[i], 4)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-3)


def test_a_run_with_pictures_prompts_and_refusals(tmp_path):
    pipe, _ = made("SD, DDIM")
    ours = SDDMPipeline.from_pipe(pipe)
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    options = {"num_inference_steps": 4, "area": 2, "generator": seeded()}
    images = ours(["a dog", "a cat"], [picture, picture], num_images_per_prompt=2, **options).images
    assert len(images) == 4 and images[0].size == (16, 16)
    for wrong, parameter in (
        ({"prompt": None}, "prompt"), ({"prompt": ["a", "b", "c"]}, "prompt"), ({"strength": 1.5}, "strength"),
        ({"energy": "vgg"}, "weights"), ({"height": 15}, "image_size"), ({"prompt_embedings": latents()}, "prompt"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            ours(**{"prompt": "a dog", "image": [picture, picture], **options, **wrong})
        assert caught.value.parameter == parameter, wrong
    with pytest.raises(InputError, match="it can be"):
        SDDMTextPipeline(diffusers.DDPMPipeline(unet=None, scheduler=diffusers.DDPMScheduler()))
    pipe.scheduler = diffusers.LCMScheduler()
    with pytest.raises(InputError, match="consistency"):
        ours("a dog", picture, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("SD, DDIM", "SD3, flow matching"):
        made(name)[0].save_pretrained(root / name.split(",")[0])
    make_references(root / "ref", ["a.png", "b/c.png", "d.png"])
    return root


def flags_of(data, model, out, *flags, prompt="a photo of a dog"):
    return ["--model_path", data / model, "--base_samples", data / "ref", "--save_dir", out, "--timestep_respacing", 6,
            "--prompt", prompt, "--guidance_scale", 5, "--batch_size", 1, "--device", "cpu", *flags]  # fmt: skip


def run(data, script, model, out, *flags):
    """The pictures of a command."""
    assert run_script(script, *flags_of(data, model, out, *flags)) == 0
    return pictures(out)


GUIDED = ("--range_t", 0.3, "--area", 4, "--start_t", 0.8)


def test_folders_are_translated_alike_by_two_processes_and_translator(data, tmp_path):
    one = run(data, "ae_sample", "SD", tmp_path / "out", *GUIDED)
    assert one.keys() == {"a.png", "b/c.png", "d.png"} and one["a.png"].shape == (16, 16, 3)
    content = record(tmp_path / "out")
    assert content["settings"]["prompt"] == "a photo of a dog" and content["settings"]["energy"] == []
    assert content["model_evaluations"] == 2 * 5  # with and without the prompt
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               ROOT / "scripts" / "ae_sample.py", *flags_of(data, "SD", tmp_path / "two", *GUIDED)]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = pictures(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError) as caught:
        run_script("ae_sample", *flags_of(data, "SD", tmp_path / "out", *GUIDED, prompt="a cat"))
    assert "--prompt was" in message("ae_sample", caught.value)
    options = {"range_t": 0.3, "area": 4, "start": 0.8, "prompt": "a photo of a dog", "guidance_scale": 5.0}
    translate = Translator(data / "SD", steps=6, device="cpu", **options)
    image = np.asarray(translate(data / "ref" / "d.png", name="d.png")).astype(int)
    assert abs(image - one["d.png"]).max() <= 1


def test_baselines_and_prompts_of_each_picture(data, tmp_path):
    sdedit = run(data, "sdedit_sample", "SD3", tmp_path / "sdedit", "--t", 0.5)
    assert run(data, "ilvr_sample", "SD", tmp_path / "ilvr", "--down_N", 4, "--range_t", 3).keys() == sdedit.keys()
    table, texts = tmp_path / "prompts.csv", tmp_path / "texts"
    table.write_text("a.png,a cat\nb/c,a house\n", encoding="utf-8")
    (texts / "b").mkdir(parents=True)
    (texts / "a.txt").write_text("a cat")
    (texts / "b" / "c.txt").write_text("a house")
    named, beside = (
        run(data, "sdedit_sample", "SD3", tmp_path / each.name[0], "--t", 0.5, "--prompt_file", each)
        for each in (table, texts)
    )
    assert (named["a.png"] != sdedit["a.png"]).any() and np.array_equal(named["d.png"], sdedit["d.png"])
    assert all(np.array_equal(beside[name], named[name]) for name in named)
    for flags, words in (
        (("--area", 4, "--energy", "dse", "--dsepath", table), "--energy is 'dse'; it compares pixels"),
        (("--area", 4, "--details_t", 2), "--details_t is 2; it finds thin features of pixels"),
        (("--timestep_respacing", "ddim5"), "--timestep_respacing is 'ddim5'"),
    ):
        with pytest.raises(InputError) as caught:
            run_script("ae_sample", *flags_of(data, "SD", tmp_path / "wrong", *flags))
        assert words in message("ae_sample", caught.value)


def test_the_documents_examples_run_with_a_small_model(data, tmp_path, monkeypatch):
    """The command and the Python of docs/models.md with a prompt, for a folder in the place of the Hub's id."""
    made("XL, DDIM")[0].save_pretrained(tmp_path / "xl")
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    hub = "stabilityai/stable-diffusion-xl-base-1.0"
    blocks = [block for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) if hub in block]
    command, python = (block.replace(hub, str(tmp_path / "xl")) for block in blocks)
    words = shlex.split(command.replace("\\\n", " ").replace("my_dogs", str(data / "ref")))
    words[0], words[1] = sys.executable, str(ROOT / words[1])
    small = ["--area", "4", "--timestep_respacing", "4", "--save_dir", str(tmp_path / "out")]
    done = subprocess.run([*words, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pictures(tmp_path / "out")) == 3
    monkeypatch.chdir(tmp_path)
    make_references(tmp_path, ["dog.png"])
    exec(python.replace("area=16", "area=4, num_inference_steps=4"), {})
    assert (tmp_path / "cat.png").exists()
