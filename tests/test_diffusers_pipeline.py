"""SDDMPipeline and the library's own networks agree with ours; only where diffusers is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DIR, golden_index
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from guided_diffusion import energy, sddm
from guided_diffusion.checkpoint import load_model, save_model
from guided_diffusion.checkpoint.export import convert
from guided_diffusion.checkpoint.pipelines import autoencoder, scheduler_process
from guided_diffusion.diffusers_pipeline import SDDMPipeline
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.script_util import create_diffusion

ROOT = Path(__file__).resolve().parent.parent
FOLDER = GOLDEN_DIR / "diffusers"
NAMES = ("ddpm_eps", "butterflies", "v_cosine", "old_layout", "class_cond", "adm_scale_shift", "mixed")
MODELS = [name for name in NAMES if (FOLDER / name).is_dir()]
SMALL = {"num_inference_steps": 6, "t0": 0.34, "area": 4, "output_type": "pt"}

pytestmark = pytest.mark.slow


def own(pipe):
    return pipe.vqvae if pipe.vqvae is not None else pipe.vae


def pipeline(path):
    pipe = SDDMPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return pipeline(FOLDER / "ddpm_eps")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def references(count=2, side=16):
    return torch.rand(count, 3, side, side, generator=seeded(3))


# ---- SDDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_whole_runs_are_those_of_our_networks(name):
    labels = [1, 4] if name == "class_cond" else None
    found = pipeline(FOLDER / name)(references(), **SMALL, class_labels=labels, generator=seeded()).images
    model, info = load_model(FOLDER / name)
    spacing = "trailing6" if name == "v_cosine" else "leading6"
    flags = {**info.flags, "sigma_small": info.choose("sigma_small"), "timestep_respacing": spacing}
    generator = seeded()
    expected = sddm.sample(
        model if labels is None else lambda x, t: model(x, t, torch.tensor(labels)),
        create_diffusion(**flags),
        2 * references() - 1,
        blocks=4,
        range_t=2,
        energies=[energy.dct(4)],
        clip_denoised=info.choose("clip_denoised"),
        noise=lambda shape: torch.randn(shape, generator=generator),
    )
    assert (expected.clamp(-1, 1) / 2 + 0.5 - found).abs().max() <= 5e-5


def test_pictures_of_all_kinds(pipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = (to_tensor([load_image(tmp_path / "a.png", 16)]) + 1) / 2
    expected = pipe(tensor, **SMALL, generator=seeded()).images
    for given_image in (
        Image.open(tmp_path / "a.png"), [Image.open(tmp_path / "a.png").convert("RGBA")], [tensor[0]], 2 * tensor - 1,
        tensor.permute(0, 2, 3, 1).numpy(), [tensor[0].permute(1, 2, 0).numpy()],
    ):  # fmt: skip
        torch.testing.assert_close(pipe(given_image, **SMALL, generator=seeded()).images, expected, rtol=0, atol=1e-5)
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
    seen = []

    def callback(given_pipe, i, t, tensors):
        assert given_pipe is pipe
        seen.append((i, t, tensors["latents"].clone()))
        if len(seen) == 4:
            given_pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])} if len(seen) == 3 else None

    images = pipe(references(1), **SMALL, callback_on_step_end=callback, generator=seeded()).images
    assert [(i, t) for i, t, _ in seen] == [(0, 830), (1, 664), (2, 498), (3, 332)]
    torch.testing.assert_close(images, (seen[-1][2].clamp(-1, 1) + 1) / 2)
    # A state of zeros has one look, whatever came before it.
    again = []

    def watch(given_pipe, i, t, tensors):
        again.append(tensors["latents"].clone())

    pipe(references(1), **SMALL, generator=seeded(), callback_on_step_end=watch)
    assert not torch.equal(seen[3][2], again[3]) and torch.equal(seen[1][2], again[1])


def test_energies_by_name_and_as_objects(pipe):
    by_name = pipe(references(), **SMALL, energy="dct", generator=seeded()).images
    as_object = pipe(references(), **SMALL, energy=[energy.dct(4)], generator=seeded()).images
    without = pipe(references(), **SMALL, energy=[], generator=seeded()).images
    assert torch.equal(by_name, as_object) and not torch.equal(by_name, without)


@pytest.mark.parametrize("options, parameter", [
    ({"area": 5}, "area"), ({"t0": 1.5}, "t0"), ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 1001}, "num_inference_steps"), ({"energy": "vggg"}, "energy"),
    ({"class_labels": 3}, "class_labels"), ({"num_images_per_image": 0}, "num_images_per_image"),
    ({"image": references(1, 8)[:, :2]}, "image"), ({"num_inference_steps": 5.5}, "num_inference_steps"),
    ({"strength": 0.0}, "strength"), ({"generator": [seeded()] * 3}, "generator"),
    ({"latents": references(1, 8)}, "latents"), ({"energy": 5}, "energy"), ({"energy": "vgg"}, "weights"),
    ({"image": [references(1), 3]}, "image"), ({"image": 255 * references()}, "image"), ({"image": []}, "image"),
    ({"image": "cat.png"}, "image"),
    ({"callback_on_step_end_tensor_inputs": ["image"]}, "callback_on_step_end_tensor_inputs"),
], ids=str)  # fmt: skip
def test_what_the_pipeline_refuses(options, parameter, pipe):
    with pytest.raises(InputError) as caught:
        pipe(**{"image": references(), **SMALL, **options})
    assert caught.value.parameter == parameter


def test_saving_loading_and_other_pipelines(pipe, tmp_path):
    expected = pipe(references(), **SMALL, generator=seeded()).images
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline(tmp_path / "saved")(references(), **SMALL, generator=seeded()).images, expected)
    other = SDDMPipeline.from_pipe(diffusers.DDPMPipeline.from_pretrained(FOLDER / "ddpm_eps"))
    other.set_progress_bar_config(disable=True)
    assert torch.equal(other(references(), **SMALL, generator=seeded()).images, expected)
    assert load_model(tmp_path / "saved")[1].model_type == "DDPM"  # and the command line reads it


def test_network_in_half_precision(pipe):
    half = pipeline(FOLDER / "ddpm_eps").to(torch.bfloat16)
    options = {**SMALL, "energy": [], "num_inference_steps": 3}
    images = half(references(), **options, generator=seeded()).images
    assert images.dtype == torch.float32
    assert (images - pipe(references(), **options, generator=seeded()).images).abs().mean() < 0.05


def test_schedulers_of_other_processes_are_refused(pipe):
    with pytest.raises(InputError, match="consistency"):
        SDDMPipeline(pipe.unet, diffusers.LCMScheduler())
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="rescale_betas_zero_snr"):
        SDDMPipeline(pipe.unet, scheduler)(references(), **SMALL)


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_schedulers_of_ddpms_process_give_their_timesteps(name, pipe):
    other = SDDMPipeline(pipe.unet, getattr(diffusers, f"{name}Scheduler")())
    other.set_progress_bar_config(disable=True)
    times = []
    other(references(1), **SMALL, callback_on_step_end=lambda p, i, t, k: times.append(t))
    assert times == sorted(set(times), reverse=True)
    assert set(times) == {round(float(t)) for t in other.scheduler.timesteps if t >= 0}


def test_settings_of_schedulers_that_clip_or_hold_betas(pipe):
    betas = np.linspace(1e-4, 2e-2, 1000)
    for scheduler, clip in (
        (diffusers.HeunDiscreteScheduler(clip_sample=True, clip_sample_range=2.0), 2.0),
        (diffusers.HeunDiscreteScheduler(), False),
        (diffusers.DDPMScheduler(trained_betas=betas), True),
    ):
        process, found, _ = scheduler_process(scheduler, 10, latent=False)
        assert found == clip and process.num_timesteps >= 10
    assert process.alphas_cumprod[-1] == pytest.approx(np.cumprod(1 - betas)[process.timestep_map[-1]])


# ---- latent models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["vqvae", "vae"])
def latent(request, tmp_path_factory):
    """A folder of a tiny latent model with random weights."""
    torch.manual_seed(0)
    common = {"norm_num_groups": 8, "layers_per_block": 1}
    channels = 3 if request.param == "vqvae" else 4
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **common,
    )  # fmt: skip
    blocks = {
        "block_out_channels": (16, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": channels, **common,
    }  # fmt: skip
    kinds = {"vqvae": diffusers.VQModel, "vae": diffusers.AutoencoderKL}
    autoencoder = kinds[request.param](**blocks)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    pipe = SDDMPipeline(unet, scheduler, **{request.param: autoencoder})
    folder = tmp_path_factory.mktemp(request.param) / "ldm"
    pipe.save_pretrained(folder)
    return folder


def test_latent_models_encode_translate_and_decode(latent):
    pipe = pipeline(latent)
    options = {**SMALL, "area": 2}
    images = pipe(references(side=16), **options, generator=seeded()).images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    latents = pipe(references(side=16), **{**options, "output_type": "latent"}, generator=seeded()).images
    assert latents.shape[2:] == (8, 8)
    assert torch.equal((autoencoder(own(pipe)).decode(latents).clamp(-1, 1) + 1) / 2, images)
    # The blocks are those of the latent grid: at t0 = 0 the latents have the reference's means and deviations.
    guided = pipe(references(side=16), **{**options, "t0": 0.0, "output_type": "latent"}, generator=seeded()).images
    ref = autoencoder(own(pipe)).encode(2 * references(side=16) - 1)
    plain = pipe(references(side=16), **{**options, "t0": 1.0, "output_type": "latent"}, generator=seeded()).images

    def means(x):
        return torch.nn.functional.avg_pool2d(x, 4)

    assert (means(guided) - means(ref)).abs().mean() < (means(plain) - means(ref)).abs().mean()
    with pytest.raises(InputError) as caught:
        pipe(references(side=16), **{**options, "area": 16})
    assert caught.value.parameter == "area"


def test_pictures_have_the_autoencoders_size(latent):
    assert pipeline(latent)(Image.new("RGB", (50, 30)), **{**SMALL, "area": 2}).images.shape == (1, 3, 16, 16)


def test_latent_folders_are_refused_where_pixels_are_needed(latent):
    with pytest.raises(InputError, match="latent diffusion model"):
        load_model(latent)


# ---- the library's networks ------------------------------------------------------------------------------------------


def test_exports_are_the_same_function_in_the_library(tmp_path):
    from conftest import golden

    name = "unet_updown_scaleshift_learnsigma"
    data, flags = golden(name), golden_index()[name]["flags"]
    state = {key.removeprefix("model."): value for key, value in data.items() if key.startswith("model.")}
    save_model(tmp_path / "m.safetensors", state, model_type="ADM", flags=flags)
    convert(tmp_path / "m.safetensors", tmp_path / "folder")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        output = pipe.unet(data["input.x"], data["input.t"]).sample
    assert (output - data["output"]).abs().max() <= 2e-5 * max(1, data["output"].abs().max())
    assert pipe.scheduler.config.variance_type == "learned_range"


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
    residual = draw(st.booleans())
    base = draw(st.sampled_from([16, 32]))
    widths = [base * draw(st.sampled_from([1, 1, 2])) for _ in range(draw(st.integers(1, 3)))]
    widths[0] = base
    kinds = [draw(st.sampled_from(["attention", "resnet" if residual else "plain"])) for _ in widths]
    sines_first = draw(st.booleans())
    shifts = draw(st.sampled_from(["default", "scale_shift"]))
    groups = draw(st.sampled_from([4, 8, 16]))
    return {
        "sample_size": 8, "block_out_channels": widths, "layers_per_block": draw(st.integers(1, 2)),
        "down_block_types": [BLOCKS[kind].format("Down") for kind in kinds],
        "up_block_types": [BLOCKS[kind].format("Up") for kind in reversed(kinds)],
        "downsample_type": "resnet" if residual else "conv", "upsample_type": "resnet" if residual else "conv",
        "downsample_padding": draw(st.sampled_from([0, 1])), "flip_sin_to_cos": not sines_first,
        "freq_shift": int(sines_first), "norm_eps": draw(st.sampled_from([1e-5, 1e-6])), "norm_num_groups": groups,
        "attn_norm_num_groups": draw(st.sampled_from([None, groups])), "resnet_time_scale_shift": shifts,
        "attention_head_dim": draw(st.sampled_from([None, 8])), "num_class_embeds": draw(st.sampled_from([None, 4])),
    }  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(config=configurations(), seed=st.integers(0, 1000))
def test_any_network_of_the_family_is_ours(config, seed, tmp_path_factory):
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("family") / "unet"
    unet.save_pretrained(folder)
    model, info = load_model(folder)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    labels = torch.tensor([0, 3]) if config["num_class_embeds"] else None
    with torch.no_grad():
        expected = unet.eval()(x, t, class_labels=labels).sample
        output = model(x, t) if labels is None else model(x, t, labels)
    assert (output - expected).abs().max() <= 2e-5 * max(1, expected.abs().max()), (info.model_type, json.dumps(config))


def test_the_commands_never_import_the_library():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from guided_diffusion.checkpoint import load_model; "
        "load_model(sys.argv[2]); sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, ROOT, FOLDER / "ddpm_eps"], check=False).returncode == 0
