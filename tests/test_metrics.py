"""Metrics: agreement with pytorch-fid and lpips, and the properties that the definitions promise."""

import json
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from guided_diffusion import evaluation, image_datasets
from guided_diffusion.checkpoint import load_model
from guided_diffusion.ddpm import Model
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import Evaluation, distances, pairs
from guided_diffusion.evaluation import features as extractors
from guided_diffusion.evaluation import images as reading
from guided_diffusion.evaluation.table import of_kind

SEEDS = st.integers(0, 2**32 - 1)


def features(seed, n, d, shift=0.0):
    """Correlated features [n, d] with many zeros, as those of a network after a ReLU."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(rng.normal(size=(n, d)) @ mixing + shift, 0)


def moments(x):
    return x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))


def frechet_distance(mean1, cov1, mean2, cov2):
    """From covariances [D, D]."""
    roots = [distances.root_of_covariance(cov) for cov in (cov1, cov2)]
    return distances.frechet_of_roots(mean1, roots[0], mean2, roots[1])


# Fréchet distance


@pytest.mark.parametrize("n, d", [(500, 24), (40, 96)])
def test_frechet_distance_equals_pytorch_fid(n, d, monkeypatch):
    """Under SciPy versions with and without the `disp` argument that pytorch-fid passes."""
    from pytorch_fid import fid_score

    sqrtm = fid_score.linalg.sqrtm
    monkeypatch.setattr(
        fid_score.linalg, "sqrtm", lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0)
    )
    x, y = features(1, n, d), features(2, n, d, shift=0.3)
    expected = fid_score.calculate_frechet_distance(*moments(x), *moments(y))
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 8), st.floats(0.1, 10))
def test_frechet_distance_is_symmetric_and_moves_with_its_space(seed, d, scale):
    rng = np.random.default_rng(seed)
    x, y = features(seed, 40, d), features(seed + 1, 6, d, shift=0.5)
    rotation, offset = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.normal(size=d)
    distance = frechet_distance(*moments(x), *moments(y))
    assert distances.fid(x, y) == pytest.approx(distance, rel=1e-6, abs=1e-6)
    assert frechet_distance(*moments(y), *moments(x)) == pytest.approx(distance, rel=1e-8, abs=1e-9)
    moved = frechet_distance(*moments(x @ rotation + offset), *moments(y @ rotation + offset))
    assert moved == pytest.approx(distance, rel=1e-8, abs=1e-9)
    scaled = frechet_distance(*moments(scale * x), *moments(scale * y))
    assert scaled == pytest.approx(scale**2 * distance, rel=1e-8, abs=1e-9)
    assert frechet_distance(*moments(x), *moments(x)) == pytest.approx(0, abs=1e-9)


# Kernel distance


def mmd2_by_loops(x, y):
    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y])


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_kernel_distance_equals_its_definition(seed):
    """Counts stand for repeated rows."""
    rng = np.random.default_rng(seed)
    x, y = features(seed, 8, 3), features(seed + 1, 6, 3, shift=0.2)
    value, std = distances.kernel_distance(x, y)
    assert value == pytest.approx(mmd2_by_loops(x, y), rel=1e-8, abs=1e-9) and math.isnan(std)
    counts_x = rng.multinomial(8, np.full(8, 1 / 8), size=2).astype(float)
    counts_y = rng.multinomial(6, np.full(6, 1 / 6), size=2).astype(float)
    values = distances._mmd2(x, y, counts_x, counts_y)
    for value, cx, cy in zip(values, counts_x, counts_y):
        expected = mmd2_by_loops(np.repeat(x, cx.astype(int), axis=0), np.repeat(y, cy.astype(int), axis=0))
        assert value == pytest.approx(expected, rel=1e-8, abs=1e-9)


# Confidence


def test_interval_of_the_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(8)
    covered = 0
    for seed in range(200):
        low, high = distances.bootstrap_mean(rng.exponential(size=60), replicates=200, confidence=0.9, seed=seed)
        covered += low < 1 < high
    assert 0.82 < covered / 200 < 0.95


@pytest.mark.parametrize("kind", ["frechet", "frechet of a known target", "kernel"])
def test_intervals_of_distances_hold_the_estimate_and_narrow(kind):
    widths = []
    for n in (60, 960):
        x, y = features(11, n, 4), features(12, n, 4, shift=0.5)
        if kind == "kernel":
            estimate, bootstrap = distances.kernel_distance(x, y)[0], distances.bootstrap_kernel
        else:
            estimate, bootstrap = distances.fid(x, y), partial(distances.bootstrap_distance, distances.fid)
        target = distances.gaussian_of_features(y) if "known" in kind else y
        low, high = bootstrap(x, target, estimate, replicates=100)
        assert low < estimate < high
        widths.append(high - low)
    assert 2 < widths[0] / widths[1] < 8  # 16 times the images: a quarter of the width


def test_subsets_and_resamples_estimate_the_whole_however_many_are_in_memory(monkeypatch):
    x, y = features(6, 300, 8), features(7, 300, 8, shift=0.3)
    whole = distances.kernel_distance(x, y)[0]
    mean, std = distances.kernel_distance(x, y, subset_size=100, subsets=200, seed=1)
    assert abs(mean - whole) < 0.2 * whole and 0 < std < whole
    monkeypatch.setattr(distances, "KERNEL_ROWS", 7)
    monkeypatch.setattr(distances, "RESAMPLED", 30 * 600)
    again = distances.kernel_distance(x, y, subset_size=100, subsets=200, seed=1)
    assert again == pytest.approx((mean, std), rel=1e-10)
    low, high = distances.bootstrap_kernel(x, y, whole, replicates=50)
    assert low < whole < high


# Paired metrics


def paired_metrics(a, b):
    """Every metric of pairs that needs no network."""
    return {m.name: pairs.measure(m.name, m.compute, a, b) for m in of_kind("paired") if m.compute}


def images(seed, n=2, size=20):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_paired_metrics_are_symmetric_and_blind_to_flips(seed):
    a, b = images(seed), images(seed + 1)
    values = paired_metrics(a, b)
    for other in (paired_metrics(b, a), paired_metrics(a.flip(3), b.flip(3))):
        for name in ("l2", "mse", "psnr", "ssim"):
            torch.testing.assert_close(other[name], values[name], rtol=1e-9, atol=1e-5 if name == "ssim" else 1e-9)
    torch.testing.assert_close(values["l2"] ** 2, values["mse"] * a[0].numel())
    torch.testing.assert_close(values["psnr"], -20 * torch.log10(values["mse"].sqrt()))
    flat = paired_metrics(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6))
    assert flat["ssim"].item() == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), rel=1e-4)
    assert flat["psnr"].item() == pytest.approx(20, abs=1e-5) and math.isnan(flat["msssim"].item())


# Extractors


@pytest.fixture(scope="module")
def inception_path(tmp_path_factory):
    """Random weights in the format of pytorch-fid's file, which cannot be downloaded everywhere."""
    from pytorch_fid import inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state_dict: None)
        model = inception.fid_inception_v3()
    torch.manual_seed(0)
    state = tiny.random_state(model, lambda weight: (2 / weight[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, path)
    return path


def test_inception_statistics_equal_pytorch_fid(inception_path, tmp_path, monkeypatch):
    from pytorch_fid import fid_score, inception

    folder = tiny.make_references(tmp_path / "images", ["0.png", "1.png", "2.png"], size=64)
    options = Evaluation(targets=folder, inception_path=inception_path, native_size=True, device="cpu")
    evaluation.target_statistics(options, tmp_path / "own.npz")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(inception_path))
    model = inception.InceptionV3()
    expected = fid_score.compute_statistics_of_path(str(folder), model, 2, 2048, "cpu", num_workers=0)
    found = fid_score.compute_statistics_of_path(str(tmp_path / "own.npz"), model, 2, 2048, "cpu")
    for value, reference in zip(found, expected):
        assert np.abs(reference).max() > 1e-4  # the random network lets the images through
        np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_male2female_images_are_resized_twice_and_normalised(tmp_path):
    from torchvision import transforms

    path = tmp_path / "face.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)).save(path)
    sizes = [transforms.Resize([256, 256]), transforms.Resize([299, 299]), transforms.ToTensor()]
    published = transforms.Compose([*sizes, transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    extractor = extractors.Extractor("inception", torch.nn.Identity())
    read, description = evaluation.reader(extractor, Evaluation(protocol="egsde-male2female"))
    torch.testing.assert_close(read(path), published(Image.open(path)))
    assert "ImageNet" in description


def test_model_of_this_project_as_extractor(tmp_path):
    path = tiny.make_model(tmp_path / "model.safetensors")
    model = load_model(str(path))[0].eval()
    extractor = extractors.feature_extractor(str(path))
    assert extractor.image_size == 16 and "t = 50" in extractor.name
    x = images(0, n=3, size=16)
    with torch.no_grad():
        expected = model.middle_features(2 * x - 1, torch.full((3,), 50)).mean(dim=(2, 3))
        torch.testing.assert_close(extractor.extract(x), expected)
    _, description = evaluation.reader(extractor)
    assert description.endswith("; images at 16x16, others resized by PIL bicubic (crop if not square)")
    with pytest.raises(InputError, match="^native_size is True"):
        evaluation.reader(extractor, Evaluation(native_size=True))
    path = tmp_path / "ddpm.safetensors"
    model = Model(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), image_size=16)
    save_file(model.state_dict(), path, {"model_type": "DDPM", "flags": json.dumps({"image_size": 16})})
    with pytest.raises(InputError, match="^features is .*an ADM model"):
        extractors.feature_extractor(str(path))


def test_lpips_equals_the_package(tmp_path, monkeypatch):
    import lpips
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    file = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), file)
    a, b = images(0, size=64), images(1, size=64)
    distance = pairs.load_lpips("squeeze")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = lpips.LPIPS(net="squeeze", verbose=False)(2 * a - 1, 2 * b - 1).flatten()
        assert distance(a, a).tolist() == [0, 0]
        torch.testing.assert_close(distance(a, b), expected)
    assert (expected > 0).all()


# Images and pairs


def test_images_are_resized_by_bicubic_or_as_when_sampling(tmp_path):
    rng = np.random.default_rng(0)
    square, wide = (Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in ((50, 50, 3), (30, 50, 3)))
    square.save(tmp_path / "square.png")
    wide.save(tmp_path / "wide.png")
    expected = {("square.png",): square, ("square.png", 20): square.resize((20, 20), Image.Resampling.BICUBIC)}
    for resize in ("crop", "pad", "stretch"):
        expected["wide.png", 20, resize] = image_datasets.load_image(tmp_path / "wide.png", 20, resize=resize)
    for (name, *how), image in expected.items():
        found = (reading.read_image(tmp_path / name, *how) * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, image)


def references(*names):
    return [image_datasets.Reference(f"folder/{name}", name) for name in names]


@pytest.mark.parametrize(
    "outputs, others, how, expected",
    [
        ("a.png cats/b.png", "cats/b.jpg a.webp", "stem", "a.png-a.webp cats/b.png-cats/b.jpg"),
        ("1.png 10.png 2.png", "001.png 002.png 003.png", "order", "1.png-001.png 2.png-002.png 10.png-003.png"),
        ("1.png 10.png 2.png", "001.png 002.png 010.png", "number", "1.png-001.png 10.png-010.png 2.png-002.png"),
    ],
)
def test_pairs_by_name_number_and_order(outputs, others, how, expected):
    found, found_how = pairs.pair(references(*outputs.split()), references(*others.split()), parameter="truth")
    assert found_how == how and [f"{a.name}-{b.name}" for a, b in found] == expected.split()


def test_pairs_that_do_not_fit_are_refused():
    outputs = references("0.png", "1.png")
    with pytest.raises(InputError, match=r"counts differ .2 and 3"):
        pairs.pair(outputs, references("x.png", "y.png", "z.png"), parameter="truth")
    with pytest.raises(InputError, match="2 have no partner"):
        pairs.pair(outputs, references("0.png", "y.png"), parameter="truth")
    with pytest.raises(InputError, match=r"truth, folder/a.jpg and folder/a.png share one name"):
        pairs.pair(references("a.png"), references("a.jpg", "a.png"), parameter="truth")
    found, how = pairs.pair(references("a.png", "b.png"), references("b.png", "c.png"), parameter="truth", partial=True)
    assert how == "stem" and [(a.name, b.name) for a, b in found] == [("b.png", "b.png")]


def test_import_is_light():
    heavy = "{'scipy', 'torchvision', 'mpi4py', 'pytorch_fid', 'pytorch_msssim', 'lpips', 'matplotlib'}"
    code = f"import sys, guided_diffusion.evaluation; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
