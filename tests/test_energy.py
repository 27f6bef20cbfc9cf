"""Energies and their gradients: golden numbers, the plain formulas under autograd, and what an energy must not do."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import TimedEncoder, golden, golden_encoder, golden_index, golden_names
from torch.nn import functional as F

from guided_diffusion import energy as energies
from guided_diffusion import methods
from guided_diffusion.checkpoint import load_model, save_model
from guided_diffusion.checkpoint.targets import class_number
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.respace import matching_timestep
from resizer import Resizer

# Layer numbers of the convolutions of vgg_normalised.pth up to relu3_1, with their channels.
VGG_CONVOLUTIONS = {0: (3, 3), 2: (3, 64), 5: (64, 64), 9: (64, 128), 12: (128, 128), 16: (128, 256)}


def vgg_weights(prefix=""):
    """Random weights in the layout of vgg_normalised.pth."""
    generator, state = torch.Generator().manual_seed(5), {}
    for layer, (inputs, outputs) in VGG_CONVOLUTIONS.items():
        side = 3 if layer else 1
        weight = torch.randn(outputs, inputs, side, side, generator=generator)
        state[f"{prefix}{layer}.weight"] = weight * (2 / (inputs * side**2)) ** 0.5
        state[f"{prefix}{layer}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    return state


def vgg_features(x, level):
    """relu{level}_1, written out."""
    state = vgg_weights()

    def convolution(x, layer):
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect") if layer else x
        return F.conv2d(padded, state[f"{layer}.weight"], state[f"{layer}.bias"])

    x = F.relu(convolution(convolution(x, 0), 2))
    if level == 2:
        x = F.max_pool2d(F.relu(convolution(x, 5)), 2, ceil_mode=True)
        x = F.relu(convolution(x, 9))
    return x


def dct_features(x):
    """Every colour channel filtered with the nine outer products of the 3-point DCT-II basis, border mirrored."""
    cosines = [[math.cos(k * (2 * n + 1) * math.pi / 6) for n in range(3)] for k in range(3)]
    basis = torch.tensor([[v * ((1 if k == 0 else 2) / 3) ** 0.5 for v in row] for k, row in enumerate(cosines)])
    filters = torch.stack([torch.outer(a, b) for a in basis for b in basis])[:, None]
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return torch.cat([F.conv2d(x[:, c : c + 1], filters) for c in range(x.shape[1])], dim=1)


def blocks_of(features, x, ref, blocks, *options):
    """sum (f - BAdaIN(f, f_ref))^2 per image, block by block; differentiable through both occurrences of f."""
    f, f_ref = features(x, *options), features(ref, *options)
    h, w, total = f.shape[2] // blocks, f.shape[3] // blocks, 0
    for i, j in itertools.product(range(blocks), repeat=2):
        block = (..., slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w))
        a, b = f[block], f_ref[block]
        m_a, m_b = (v.mean(dim=(2, 3), keepdim=True) for v in (a, b))
        s_a, s_b = ((v.var(dim=(2, 3), keepdim=True) + 1e-5).sqrt() for v in (a, b))
        total = total + (a - ((a - m_a) / s_a * s_b + m_b)).square().sum(dim=(1, 2, 3))
    return total


def evaluate(energy, ref, x, t=None, alpha_bar=1.0):
    energy.prepare(ref)
    return energy.energy_and_grad(x, t, alpha_bar)


def assert_relative(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def pair(n=2, size=16, channels=3):
    """x (noisy) and ref (an image in [-1, 1])."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(n, channels, size, size, generator=generator)
    return x, torch.rand(x.shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", golden_names("energy_"))
def test_golden(name):
    data, config = golden(name), golden_index()[name]
    if "vgg" in name:
        weights = {key: value for key, value in data.items() if key.startswith("encoder.")}
        energy = energies.vgg(weights, config["blocks"])
    else:
        energy = energies.dse(golden_encoder()) if "dse" in name else energies.low_pass(config["down_N"])
    value, grad = evaluate(energy, data["ref"], data["x"], data.get("t"))
    assert_relative(value.sum() if "vgg" in name else value, data["energy"])
    assert_relative(grad, data["grad"])


def smooth(x, down_n):
    """The low-pass filter of EGSDE."""
    small = Resizer(x.shape, 1 / down_n, kernel="linear")(x)
    return Resizer(small.shape, down_n, kernel="linear")(small)


def features(x):
    return TimedEncoder().middle_features(x, T)


def cosine(a, b):
    return ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean(dim=(1, 2))


def cross_entropy(x, labels):
    logits = TimedEncoder()(x, T)
    return torch.stack([logits[n].exp().sum().log() - logits[n, label] for n, label in enumerate(labels)])


T = torch.tensor([10, 900])
# Energies, their plain formulas for images and reference, and the side of the images.
FORMULAS = [
    (lambda: energies.vgg(vgg_weights(), 8, 1), lambda x, ref: blocks_of(vgg_features, x, ref, 8, 1), 16),
    (lambda: energies.vgg(vgg_weights(), 4, 2), lambda x, ref: blocks_of(vgg_features, x, ref, 4, 2), 15),
    (lambda: energies.dct(1), lambda x, ref: blocks_of(dct_features, x, ref, 1), 16),
    (lambda: energies.dct(8), lambda x, ref: blocks_of(dct_features, x, ref, 8), 16),
    (lambda: energies.low_pass(1), lambda x, ref: (x - ref).square().sum((1, 2, 3)), 16),
    (lambda: energies.low_pass(4), lambda x, ref: (smooth(x, 4) - smooth(ref, 4)).square().sum((1, 2, 3)), 16),
    (lambda: energies.dse(TimedEncoder()), lambda x, ref: cosine(features(x), features(ref)), 16),
    (lambda: energies.classifier(TimedEncoder(), 3), lambda x, ref: cross_entropy(x, [3, 3]), 16),
    (lambda: energies.classifier(TimedEncoder(), torch.tensor([3, 0])), lambda x, ref: cross_entropy(x, [3, 0]), 16),
]


@pytest.mark.parametrize("make, formula, size", FORMULAS)
def test_energies_equal_their_plain_formulas(make, formula, size):
    x, ref = pair(size=size)
    value, grad = evaluate(make(), ref, x, T)
    expected = formula(x.requires_grad_(), ref)
    assert_relative(value, expected)
    assert_relative(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("make", [lambda: energies.dct(4), lambda: energies.low_pass(4)])
def test_latents_of_any_number_of_channels(make):
    """The energy of several channels is the sum over them."""
    x, ref = pair(channels=4)
    value, grad = evaluate(make(), ref, x, T, 0.5)
    each = [evaluate(make(), ref[:, [k]], x[:, [k]], T, 0.5) for k in range(4)]
    assert_relative(value, sum(value for value, _ in each))
    assert_relative(grad, torch.cat([grad for _, grad in each], dim=1))


@pytest.mark.parametrize("make", [lambda: energies.low_pass(4), lambda: energies.dse(TimedEncoder())])
def test_a_noised_reference_is_the_reference_at_alpha_bar(make):
    """prepare(ref, noise) at alpha_bar asks for the same as prepare(ref_t) at 1."""
    (x, ref), alpha_bar = pair(), 0.3
    noise, energy = torch.randn_like(ref), make()
    energy.prepare(ref, noise)
    actual = energy.energy_and_grad(x, T, alpha_bar)
    expected = evaluate(make(), alpha_bar**0.5 * ref + (1 - alpha_bar) ** 0.5 * noise, x, T, 1.0)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    # Preparing without noise afterwards forgets it.
    for a, b in zip(evaluate(energy, ref, x, T, alpha_bar), evaluate(make(), ref, x, T, alpha_bar)):
        assert torch.equal(a, b)


MAKERS = {
    "vgg": lambda: energies.vgg(vgg_weights(), 4, 2),
    "dct": lambda: energies.dct(4),
    "dse": lambda: energies.dse(TimedEncoder()),
    "low_pass": lambda: energies.low_pass(4),
    "classifier": lambda: energies.classifier(TimedEncoder(), 2),
}
every_energy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_energy
def test_images_do_not_see_each_other_and_are_left_alone(make):
    x, ref = pair(n=3)
    before, t = (x.clone(), ref.clone()), torch.tensor([5, 300, 900])
    together = evaluate(make(), ref, x, t, 0.5)
    assert together[0].shape == (3,) and together[1].shape == x.shape
    assert torch.equal(x, before[0]) and torch.equal(ref, before[1])
    assert not any(tensor.requires_grad for tensor in (x, *together))
    for i in range(3):
        alone = evaluate(make(), ref[i : i + 1], x[i : i + 1], t[i : i + 1], 0.5)
        torch.testing.assert_close(alone[0][0], together[0][i], atol=1e-5, rtol=1e-5)
        assert_relative(alone[1][0], together[1][i])


@every_energy
def test_constant_images_give_finite_numbers(make):
    x, ref = pair()
    flat = torch.zeros_like(x)
    for given, reference in ((x, flat - 1), (flat, flat), (flat + 0.5, ref)):
        for value in evaluate(make(), reference, given, torch.tensor([0, 999]), 0.5):
            assert value.isfinite().all()


def test_vgg_from_a_file_with_any_prefix(tmp_path):
    path = tmp_path / "vgg_normalised.pth"
    torch.save(vgg_weights("vgg.features."), path)
    x, ref = pair()
    expected = evaluate(energies.vgg(vgg_weights(), 4, 2), ref, x)
    actual = evaluate(energies.vgg(str(path), 4, 2), ref, x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"0.bias": None}, "0.bias .* nothing"),
        ({"2.weight": torch.zeros(64, 3, 5, 5)}, r"2.weight .* \(64, 3, 5, 5\)"),
        ({"decoder.0.bias": torch.zeros(3)}, "0.bias .* several"),
    ],
)
def test_vgg_file_that_does_not_fit(tmp_path, change, words):
    path, state = tmp_path / "other.pth", vgg_weights() | change
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(InputError, match=f"other.pth is not AdaIN's vgg_normalised.pth: {words}$"):
        energies.vgg(str(path), level=2)


@pytest.mark.parametrize(
    "make, size, parameter, value, words",
    [
        (energies.dct, 24, "blocks", 5, "feature map size"),
        (lambda blocks: energies.vgg(vgg_weights(), blocks, 2), 16, "blocks", 8, "feature map size 8"),
        (energies.low_pass, 16, "down_n", 0, "at least 1"),
        (energies.low_pass, 16, "down_n", 3, "16"),
        (lambda level: energies.vgg(vgg_weights(), level=level), 16, "level", 6, "1 to 5"),
    ],
)
def test_options_that_do_not_suit_the_features(make, size, parameter, value, words):
    with pytest.raises(InputError, match=words) as error:
        make(value).prepare(pair(size=size)[1])
    assert (error.value.parameter, error.value.value) == (parameter, value)


LINEAR = {"diffusion_steps": 1000, "noise_schedule": "linear", "rescale_timesteps": False}


@pytest.mark.parametrize("name, steps, rescale, asked", [("cosine", 1000, False, 57), ("linear", 400, True, 142.5)])
def test_networks_with_a_schedule_of_their_own_are_asked_at_its_timestep_of_the_noise_level(
    name, steps, rescale, asked
):
    (x, ref), encoder = pair(), TimedEncoder()
    timestep = matching_timestep(
        LINEAR, {"diffusion_steps": steps, "noise_schedule": name, "rescale_timesteps": rescale}
    )
    alpha_bar = float((1 - get_named_beta_schedule(name, steps)).cumprod()[57])
    for energy in (energies.dse(encoder, timestep), energies.classifier(encoder, 2, timestep)):
        evaluate(energy, ref, x, T, alpha_bar)
    assert torch.allclose(torch.stack(encoder.timesteps), torch.tensor(float(asked))) and len(encoder.timesteps) == 3


# --- options


def target_of(**flags):
    """A target of no network: options of energies need its sizes and flags."""
    info = SimpleNamespace(flags={**tiny.PROCESS, "rescale_timesteps": False, **flags})
    return SimpleNamespace(shape=(3, tiny.SIZE, tiny.SIZE), device=torch.device("cpu"), info=info, fuse=False)


@pytest.mark.parametrize("name", ["dse", "classifier"])
def test_checkpoints_are_asked_at_their_own_timesteps(tmp_path, name):
    """Made from a file: trained on the linear schedule, for a model of the linear or the cosine one; or refused."""
    path = str(tiny.make_encoder(tmp_path / "encoder.safetensors", 3, **({"head": "I2Iout"} if name == "dse" else {})))
    parameter, more = ("encoder", {}) if name == "dse" else ("classifier", {"target_class": 1})
    options = methods.ENERGIES.pick(name)(**{parameter: path}, **more)
    assert options.create(target_of(noise_schedule="linear")).timestep is None
    alpha_bar = float((1 - get_named_beta_schedule("linear", 1000)).cumprod()[123])
    assert options.create(target_of(noise_schedule="cosine")).timestep(alpha_bar) == 123
    larger, model = target_of(), str(tiny.make_model(tmp_path / "model.safetensors"))
    larger.shape = (3, 32, 32)
    for wrong, given, target in ((path, options, larger), (model, replace(options, **{parameter: model}), target_of())):
        with pytest.raises(InputError) as error:
            given.create(target)
        assert (error.value.parameter, error.value.value) == (parameter, wrong)


@pytest.mark.parametrize(
    "make, parameter",
    [
        (lambda: methods.VGG(level=6, weights=__file__), "level"),
        (lambda: methods.VGG(weights="no such file"), "weights"),
        (lambda: methods.DCT(blocks=0), "blocks"),
        (lambda: methods.DSE(), "encoder"),
        (lambda: methods.Classifier(target_class=1), "classifier"),
        (lambda: methods.Classifier(classifier=__file__).create(None), "target_class"),
    ],
)
def test_options_that_do_not_fit(make, parameter):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.parameter == parameter


def test_a_class_by_name_or_number():
    info = SimpleNamespace(flags={"num_class": 3}, metadata={"classes": '["cat", "dog", "wild"]'}, path="classifier.pt")
    assert [class_number(given, info, "target_class") for given in ("cat", "wild", 0, 2, "1")] == [0, 2, 0, 2, 1]
    for given in ("bird", "Cat", "", 3, -1, "3", "-1", "1.5"):
        with pytest.raises(InputError, match="0 to 2.*cat, dog, wild") as error:
            class_number(given, info, "target_class")
        assert (error.value.parameter, error.value.value) == ("target_class", given)
    info.metadata = {"classes": ["2", "0", "1"]}
    assert class_number("2", info, "y") == 0  # a name that looks like a number is a name


def test_a_class_by_name_reaches_the_energy(tmp_path):
    path = tmp_path / "classifier.safetensors"
    network, info = load_model(tiny.make_encoder(path, 3))
    save_model(path, network, model_type="ENCODER", flags=info.flags, metadata={"classes": '["cat", "dog", "wild"]'})
    energy = methods.Classifier(classifier=str(path), target_class="wild").create(target_of())
    energy.prepare(torch.zeros(2, 3, 16, 16))
    assert energy.labels.tolist() == [2, 2]
