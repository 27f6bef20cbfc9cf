"""The upscaler: its codec, its file, its training pairs, and a run that is killed and resumes."""

import signal

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from scripts_in_process import message
from tiny_training import end_at, finish, start, train
from torch.nn import functional as F

from guided_diffusion.checkpoint import load_state_dict
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import to_tensor, to_uint8
from guided_diffusion.training.data import batch_numbers, list_images
from guided_diffusion.training.upscaling import UpscalerImages, UpscalerOptions
from guided_diffusion.upscaler import Upscaler, load_upscaler

LARGE, FACTOR, SMALL, CROP = 32, 4, 8, 5
RUN = ["--large_size", LARGE, "--crop", CROP, "--channels", 8, "--depth", 1, "--batch_size", 4, "--iterations", 200,
       "--lr_anneal_steps", 200, "--lr_warmup_steps", 5, "--lr", 1e-2, "--save_interval", 20, "--log_interval", 50,
       "--ema_rate", 0.9, "--noise", 0, "--blur", 0, "--model", "tiny", "--device", "cpu"]  # fmt: skip


def gain(upscaler, truth):
    """Decibels by which `decode` of the shrunk truth is nearer to it than bicubic interpolation."""
    small = upscaler.encode(truth)
    made, plain = upscaler.decode(small), F.interpolate(small, scale_factor=FACTOR, mode="bicubic")
    return 10 * ((plain - truth).square().mean() / (made - truth).square().mean()).log10()


def random_upscaler(**options):
    """An upscaler in which every weight matters."""
    torch.manual_seed(0)
    upscaler = Upscaler(**{"factor": FACTOR, "channels": 8, "blocks": 2, "model": "tiny", **options})
    return upscaler.requires_grad_(False).apply(lambda m: [p.normal_(std=0.1) for p in m.parameters(recurse=False)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(large pictures of three bars, small copies of half of them in which green is 0)."""
    large, copies = (tmp_path_factory.mktemp(name) for name in ("large", "copies"))
    for i in range(8):
        bars = np.random.default_rng(i).integers(0, 256, (1, 3, 3), dtype=np.uint8)
        picture = Image.fromarray(bars).resize((LARGE, LARGE), Image.Resampling.NEAREST)
        picture.save(large / f"{i}.png")
        if i % 2:
            copy = np.array(picture.resize((SMALL, SMALL), Image.Resampling.LANCZOS)) * np.uint8([1, 0, 1])
            Image.fromarray(copy).save(copies / f"{i}.png")
    return large, copies


def test_encode_is_pillows_lanczos():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(pixels).resize((16, 12), Image.Resampling.LANCZOS)).astype(int)
    actual = to_uint8(Upscaler(FACTOR).encode(to_tensor([pixels])))[0].astype(int)
    assert np.abs(actual - expected)[3:-3, 3:-3].max() <= 1  # borders are mirrored, and cut off in Pillow
    edge = torch.ones(1, 3, 32, 32).index_fill(3, torch.arange(13), -1.0)
    assert Upscaler(FACTOR).encode(edge).abs().max() == 1  # overshoot is clipped
    with pytest.raises(InputError, match="sides must be multiples of 4"):
        Upscaler(FACTOR).encode(torch.zeros(1, 3, 30, 32))


def test_decode_begins_as_bicubic():
    x = torch.randn(2, 3, 6, 9)
    plain = F.interpolate(x, scale_factor=FACTOR, mode="bicubic")
    assert torch.equal(Upscaler(FACTOR).decode(x), plain)
    out = random_upscaler().decode(x)
    assert out.shape == (2, 3, 24, 36) and not torch.allclose(out, plain)


def test_file_gives_back_the_network_and_others_are_refused(tmp_path):
    upscaler, path = random_upscaler(factor=3, channels=6, blocks=3), tmp_path / "a.safetensors"
    state, x = upscaler.state_dict(), torch.randn(1, 3, 5, 5)
    save_file(state, path, metadata=upscaler.metadata())
    loaded = load_upscaler(path)
    assert (loaded.factor, loaded.model) == (3, "tiny") and not loaded.decode(x).requires_grad
    assert torch.allclose(loaded.decode(x), upscaler.decode(x), atol=1e-6)
    for change, entries, reason in (
        ({}, {"model_type": "JUDGE"}, "UPSCALER"), ({}, {"factor": "2"}, "shape"), ({"more": x}, {}, "more"),
        ({"tail.bias": torch.full((27,), torch.nan)}, {}, "NaN"),
    ):  # fmt: skip
        save_file({**state, **change}, path, metadata={**upscaler.metadata(), **entries})
        with pytest.raises(InputError, match=f"a.safetensors.*{reason}"):
            load_upscaler(path)


def test_pairs_are_aligned_crops_of_pictures_and_copies(folders):
    options = UpscalerOptions(data_dir=str(folders[0]), copies=str(folders[1]), large_size=LARGE, crop=CROP, blur=0)
    images = UpscalerImages(list_images(options.data_dir), options, seed=3)
    x = next(images.batches(batch_numbers(0, 256), "cpu"))[1]
    small, large = x[:, :3], F.pixel_shuffle(x[:, 3:], FACTOR)
    copied = (small[:, 1] == -1).all((1, 2)) & ~(large[:, 1] == -1).all((1, 2))
    assert 0.15 < copied.float().mean() < 0.35  # half of the samples of half of the pictures
    error = (small - F.avg_pool2d(large, FACTOR)).abs()[:, [0, 2]]
    assert error[~copied].mean() < 0.08 and error[copied].mean() < 0.08  # misplaced crops differ by 0.3
    assert torch.equal(x[7:9], next(images.batches(batch_numbers(7, 2), "cpu"))[1])  # a function of the sample number


def test_training_beats_bicubic_and_survives_a_kill(folders, tmp_path):
    flags = {name: ["--data_dir", folders[0], "--save_dir", tmp_path / name, *RUN] for name in ("whole", "killed")}
    train("upscaler_train", *flags["whole"])
    upscaler = load_upscaler(tmp_path / "whole" / "model.safetensors")
    truths = to_tensor([np.array(Image.open(path)) for path in folders[0].glob("*.png")])
    assert gain(upscaler, truths) > 0.5 and upscaler.model == "tiny"

    process = start("scripts/upscaler_train.py", *flags["killed"])
    end_at(process, tmp_path / "killed" / "model000040.pt", signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    train("upscaler_train", *flags["killed"], "--resume", "auto")
    expected, actual = (load_state_dict(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_flags_that_do_not_fit(folders, tmp_path):
    Image.new("RGB", (SMALL, SMALL)).save(tmp_path / "unknown.png")
    common = ["--data_dir", folders[0], "--save_dir", tmp_path / "run", *RUN]
    for flags, reason in (
        (["--crop", 9], "--crop is 9; it can be at most the small side, 8"),
        (["--copies", tmp_path], "it has no image under the name of one in --data_dir"),
    ):
        with pytest.raises(InputError) as error:
            train("upscaler_train", *common, *flags)
        assert reason in message("upscaler_train", error.value) and not (tmp_path / "run").exists()


def test_committed_upscaler_draws_crisp_outlines():
    upscaler = load_upscaler(ROOT / "models" / "fluent3d_upscaler.safetensors")
    assert (upscaler.factor, upscaler.model) == (4, "fluent3d_64")
    x = torch.linspace(-1, 1, 256)
    disc = (((x[:, None] ** 2 + x**2).sqrt() - 0.7) * 128).clamp(0, 1) * 2 - 1  # an edge one pixel wide
    assert gain(upscaler, torch.stack([disc, disc * 0.5 + 0.5, torch.ones_like(disc)])[None]) > 3
