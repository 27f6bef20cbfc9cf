"""Losses and gradients of training are those of the plain formulas, and draws depend on sample numbers only."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import FLAGS, draw, gradients, make_loop, rows, train_step

from guided_diffusion.checkpoint import load_model
from guided_diffusion.dist_util import Ranks
from guided_diffusion.errors import InputError
from guided_diffusion.resample import (
    LogNormalSampler,
    LossSecondMomentResampler,
)
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion
from guided_diffusion.training import files
from guided_diffusion.training.config import GridOptions, TrainConfig, learning_rate
from guided_diffusion.training.data import (
    TrainImages,
    class_labels,
    counter_noise,
    list_images,
    random_bits,
    random_uniform,
    sample_noise,
)
from guided_diffusion.training.loop import grid_sampler
from guided_diffusion.training.losses import classifier_loss, evaluate, loss_weights, means_by_quarter
from guided_diffusion.training.start import Start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen pictures of four squares each, in two folders."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(16):
        draw(folder / ("first" if i < 8 else "second") / f"{i:02d}.png", i)
    return folder


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "weighting, formula",
    [
        ({}, lambda snr: 1.0),
        ({"p2_gamma": 0.5, "p2_k": 2.0}, lambda snr: 1 / (2 + snr) ** 0.5),
        ({"min_snr_gamma": 5.0}, lambda snr: min(snr, 5) / snr),
    ],
)
def test_gradient_is_that_of_the_plain_formula(folder, tmp_path, weighting, formula):
    loop, diffusion = make_loop(folder, tmp_path, weighting=weighting, batch_size=4)
    actual, numbers, x = gradients(loop)

    uniform = random_uniform(0, "timestep", numbers)
    eps = sample_noise(0, numbers, (3, 8, 8), "cpu")
    loss = 0
    for i in range(4):
        step = int(uniform[i] * 100)
        alpha_bar = float(np.prod(1 - diffusion.betas[: step + 1]))
        x_t = math.sqrt(alpha_bar) * x[i : i + 1] + math.sqrt(1 - alpha_bar) * eps[i : i + 1]
        error = loop.model(x_t, torch.tensor([step])) - eps[i : i + 1]
        loss = loss + formula(alpha_bar / (1 - alpha_bar)) * error.square().mean() / 4
    assert_all_close(actual, torch.autograd.grad(loss, loop.params))


@pytest.mark.parametrize(
    "predicts, of_error_of_x_0", [("predict_xstart", lambda snr: 1), ("predict_v", lambda snr: snr + 1)]
)
def test_min_snr_weight_of_other_predictions(predicts, of_error_of_x_0):
    """v - v' = (x_0' - x_0) (snr + 1)^(1/2), where both belong to the same x_t."""
    diffusion = create_gaussian_diffusion(steps=50, **{predicts: True})
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    expected = np.minimum(snr, 5) / of_error_of_x_0(snr)
    np.testing.assert_allclose(loss_weights(diffusion, min_snr_gamma=5.0).numpy(), expected, rtol=1e-6)


def test_weighting_leaves_the_variance_term_alone(folder, tmp_path):
    flags = {**FLAGS, "learn_sigma": True}
    loop, diffusion = make_loop(folder, tmp_path, flags=flags, weighting={"p2_gamma": 1.0}, batch_size=4)
    x, t = torch.rand(4, 3, 8, 8), torch.tensor([0, 10, 50, 99])
    noise = torch.randn(4, 3, 8, 8)
    terms = loop.losses(loop.model, x, t, noise, None)
    weights = loss_weights(diffusion, p2_gamma=1.0)[t]
    assert (terms["vb"] != 0).all()
    torch.testing.assert_close(terms["loss"], weights * terms["mse"] + terms["vb"])


def test_microbatches_give_the_gradient_of_the_batch(folder, tmp_path):
    whole = gradients(make_loop(folder, tmp_path, batch_size=8)[0])[0]
    parts = gradients(make_loop(folder, tmp_path, batch_size=8, microbatch=3)[0])[0]
    assert_all_close(parts, whole)


def test_classifier_gradient_is_that_of_cross_entropy(folder, tmp_path):
    torch.manual_seed(0)
    model = create_classifier(8, classifier_width=32, classifier_depth=1, channel_mult="1,2", num_class=2,
                              classifier_attention_resolutions="4", head="I2Iout")  # fmt: skip
    diffusion = create_gaussian_diffusion(steps=100)
    x, y, t = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 30, 60, 99])
    noise = torch.randn(4, 3, 8, 8)
    terms = classifier_loss(diffusion)(model, x, t, noise, y)
    logits = model(diffusion.q_sample(x, t, noise=noise), t)
    plain = -torch.log(torch.exp(logits[range(4), y]) / torch.exp(logits).sum(dim=1))
    torch.testing.assert_close(terms["loss"], plain)
    assert torch.equal(terms["acc"], ((logits[:, 1] > logits[:, 0]).long() == y).float())


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(folder, tmp_path):
    loop, _ = make_loop(folder, tmp_path, batch_size=4, grad_clip=1e-3)
    unclipped = torch.cat([g.flatten() for g in gradients(loop)[0]])
    loop.optimizer.zero_grad()
    seen = []
    loop.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in loop.params])))
    train_step(loop, np.arange(4))
    torch.testing.assert_close(seen[0], unclipped / unclipped.norm() * 1e-3, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("warmup", [True, False])
def test_averages_follow_their_formula(folder, tmp_path, warmup):
    loop, _ = make_loop(folder, tmp_path, batch_size=2, ema_rate="0.9,0.15", lr=1e-3, ema_warmup=warmup)
    expected = {rate: [p.detach().clone() for p in loop.params] for rate in ("0.9", "0.15")}
    for at in range(3):
        train_step(loop, np.arange(2 * at, 2 * at + 2))
        for rate, values in expected.items():
            r = min(float(rate), (1 + at) / (10 + at)) if warmup else float(rate)
            expected[rate] = [r * value + (1 - r) * p.detach() for value, p in zip(values, loop.params)]
    for rate, values in expected.items():
        assert_all_close(loop.ema[rate], values)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gradients_stay_close(folder, tmp_path, precision):
    exact = torch.cat([g.flatten() for g in gradients(make_loop(folder, tmp_path, batch_size=4)[0])[0]])
    loop, _ = make_loop(folder, tmp_path, batch_size=4, precision=precision)
    rough = torch.cat([g.flatten() for g in gradients(loop)[0]]) / loop.scaler.get_scale()
    assert all(p.dtype == torch.float32 for p in loop.params)
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


def test_learning_rate_schedules():
    constant = TrainConfig(lr=1e-3)
    assert [learning_rate(constant, step) for step in (0, 10**6)] == [1e-3, 1e-3]
    linear = TrainConfig(lr=1.0, lr_anneal_steps=100, lr_warmup_steps=10)
    assert [learning_rate(linear, step) for step in (0, 50, 75, 100)] == pytest.approx([0.1, 0.5, 0.25, 0.0])
    cosine = dataclasses.replace(linear, lr_schedule="cosine")
    assert [learning_rate(cosine, step) for step in (25, 50, 100)] == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), count=st.integers(1, 12), cut=st.integers(1, 12))
def test_draws_depend_on_the_sample_number_only(seed, start, count, cut):
    numbers = np.arange(start, start + count)
    for numbered in (
        lambda n: random_uniform(seed, "flip", n),
        lambda n: sample_noise(seed, n, (2, 3), "cpu").numpy(),
        lambda n: counter_noise(random_bits(seed, "noise", n), (3, 5), "cpu").numpy(),
    ):
        whole = numbered(numbers)
        parts = [numbered(numbers[at : at + cut]) for at in range(0, count, cut)]
        assert np.array_equal(whole, np.concatenate(parts))


def test_draws_are_uniform_normal_and_independent_between_purposes():
    numbers = np.arange(20000)
    flips, steps = random_uniform(1, "flip", numbers), random_uniform(1, "timestep", numbers)
    for values in (flips, steps):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared with 19 degrees of freedom, p < 0.001
    assert abs(np.corrcoef(flips, steps)[0, 1]) < 0.03
    noise = sample_noise(1, np.arange(500), (64,), "cpu")
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.03


@settings(deadline=None, max_examples=25)
@given(keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), side=st.integers(1, 9))
def test_noise_of_gpus_is_splitmix_and_box_muller(keys, side):
    """Against the same in NumPy's unsigned integers and float64."""
    pairs = (3 * side**2 + 1) // 2
    with np.errstate(over="ignore"):
        counters = np.arange(1, pairs + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = np.array(keys, np.uint64)[:, None] + counters
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x = x ^ x >> np.uint64(31)
    radius = np.sqrt(-2 * np.log(((x >> np.uint64(32)).astype(float) + 1) / 2**32))
    angle = (x & np.uint64(0xFFFFFFFF)).astype(float) * (2 * np.pi / 2**32)
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, : 3 * side**2]
    found = counter_noise(np.array(keys, np.uint64), (3, side, side), "cpu")
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.reshape(len(keys), 3, side, side), atol=5e-5)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_every_epoch_shows_every_image_once(folder, cache):
    images = TrainImages(list_images(folder), 8, cache=cache, seed=3)
    numbers = [np.arange(at, at + 5) for at in range(0, 35, 5)]
    shown = torch.cat([x for _, x, _ in images.batches(iter(numbers), "cpu")])
    expected = torch.stack([images.read(i) for i in range(16)]).float() / 127.5 - 1
    which = [int((x == expected).flatten(1).all(dim=1).nonzero()) for x in shown]
    assert sorted(which[:16]) == sorted(which[16:32]) == list(range(16)) and which[:16] != which[16:32]
    assert which == images.indices(np.arange(35)).tolist()


def test_half_of_the_images_are_flipped_the_same_ones_whenever(folder):
    images, numbers = TrainImages(list_images(folder), 8, random_flip=True), np.arange(200)
    _, flipped, _ = next(images.batches(iter([numbers]), "cpu"))
    straight = [images.read(i).float() / 127.5 - 1 for i in images.indices(numbers)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, straight)]
    assert all(a or torch.equal(x, y) for a, x, y in zip(mirrored, flipped, straight))
    assert 70 < sum(mirrored) < 130
    again = next(images.batches(iter([numbers[50:60]]), "cpu"))[1]
    assert torch.equal(again, flipped[50:60])


def steps(number, alphas_cumprod=None):
    """As much of a diffusion process as schedule samplers need."""
    return types.SimpleNamespace(num_timesteps=number, alphas_cumprod=alphas_cumprod)


def test_loss_second_moment_sampler_is_unbiased_and_prefers_large_losses():
    sampler = LossSecondMomentResampler(steps(4), history_per_term=2, uniform_prob=0.1)
    assert sampler.weights().tolist() == [1, 1, 1, 1]
    sampler.update_with_all_losses([0, 1, 2, 3] * 2, [1, 2, 3, 4, 1, 2, 3, 4])
    sampler.update_with_all_losses([3, 3], [10, 10])  # the oldest losses of step 3 are forgotten
    p = np.array([1, 2, 3, 10]) / 16 * 0.9 + 0.1 / 4
    np.testing.assert_allclose(sampler.weights(), p)
    uniform = (np.arange(100000) + 0.5) / 100000
    t, weights = sampler.sample(len(uniform), "cpu", uniform)
    np.testing.assert_allclose(np.bincount(t.numpy()) / len(t), p, atol=1e-4)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert float((losses[t] * weights).mean()) == pytest.approx(4.0, rel=1e-3)


def test_lognormal_sampler_draws_normal_log_noise_levels_with_weight_one():
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    log_sigma = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)
    uniform = (np.arange(20000) + 0.5) / 20000
    t, weights = LogNormalSampler(steps(1000, alphas_cumprod), 0.3, 0.7).sample(len(uniform), "cpu", uniform)
    drawn = log_sigma[t.numpy()]
    assert drawn.mean() == pytest.approx(0.3, abs=0.02)
    assert drawn.std() == pytest.approx(0.7, abs=0.02)
    assert np.mean(drawn < 0.3 - 0.7) == pytest.approx(0.1587, abs=0.01)
    assert (weights == 1).all()
    # a level far outside the schedule: the nearest steps are left, not nothing
    far, _ = LogNormalSampler(steps(1000, alphas_cumprod), 1000.0, 0.5).sample(3, "cpu", np.array([0.0, 0.5, 0.999]))
    assert far.min() > 950


def test_tiny_model_memorises_eight_images(folder, tmp_path):
    references = list_images(folder)
    known, unknown = TrainImages(references[:8], 8), TrainImages(references[8:], 8)
    loop, diffusion = make_loop(
        folder, tmp_path, images=known, nonzero=False, batch_size=16, lr=2e-3, lr_anneal_steps=300, lr_warmup_steps=10,
        lr_schedule="cosine", ema_rate="0.95", log_interval=30, save_interval=100, keep=2,
    )  # fmt: skip
    assert loop.run() and files.saved_steps(tmp_path) == [200, 300]
    assert len(list(tmp_path.glob("*.pt"))) == 6  # of the newest two checkpoints
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert len(losses) == 20 and losses[-1] < 0.2 * losses[0]

    def error(images):
        (_, x, _), t = next(images.ordered_batches(8, "cpu")), torch.full((8,), 10)
        x_t = diffusion.q_sample(x, t, noise=sample_noise("test", np.arange(8), x.shape[1:], "cpu"))
        with torch.no_grad():
            return (diffusion.xstart_from_eps(x_t, t, loop.averaged_model()(x_t, t)) - x).square().mean()

    assert error(known) < error(unknown) / 2


def test_exported_model_loads_without_flags_and_samples(folder, tmp_path):
    flags = {**FLAGS, "noise_schedule": "cosine", "channel_mult": "1,2", "num_heads": 2}
    loop, _ = make_loop(folder, tmp_path, flags=flags, batch_size=2, ema_rate="0.5", lr=1e-3)
    loop.metadata = {"model_type": "ADM", "flags": json.dumps(flags)}
    train_step(loop, np.arange(2))
    loop.save()
    model, info = load_model(tmp_path / "model.safetensors")
    assert info.model_type == "ADM" and info.assumed == () and info.flags.items() >= flags.items()
    assert info.metadata["training"].startswith("1 steps, 2 images")
    for value, average in zip(model.parameters(), loop.ema["0.5"]):
        torch.testing.assert_close(value, average, rtol=2e-3, atol=2e-3)
    assert any(not torch.equal(value, trained) for value, trained in zip(model.parameters(), loop.params))
    images = grid_sampler(Start(model, "ADM", info.flags), GridOptions(num_samples=3, sample_respacing="4"), 0)(model)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8


def test_diverged_run_ends_without_a_checkpoint(folder, tmp_path):
    loop, _ = make_loop(folder, tmp_path, batch_size=2, lr=1e30, iterations=5, log_interval=100)
    with pytest.raises(InputError, match="not finite any more at step 2") as error:
        loop.run()
    assert error.value.parameter == "lr" and files.saved_steps(tmp_path) == []


def test_held_out_accuracy_by_quarter_of_the_timesteps(folder):
    images = TrainImages(list_images(folder), 8, labels=class_labels(list_images(folder))[0])

    def knows_early_steps(model, x, t, noise, y):
        return {"loss": t / 100, "acc": (t < 50).float()}

    parts = [evaluate(None, knows_early_steps, images, 100, "cpu", TrainConfig(), Ranks(r, 2)) for r in (0, 1)]
    totals = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert totals["acc"][:, 1].sum() == 16
    means = means_by_quarter(totals, prefix="val_")
    assert [means[f"val_acc_q{q}"] for q in range(4)] == [1, 1, 0, 0] and means["val_loss_q3"] > 0.75


def test_progress_log_drops_rows_after_the_resumed_step(tmp_path):
    log = files.ProgressLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1 / step})
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("15\n15,1,2\nx,1\n" + "9" * 5000 + ",1\n40,0.0")  # left by an editor; cut off by a kill
    again = files.ProgressLog(tmp_path, 20)
    again.write({"step": 30, "loss": 0.5, "val_acc": 1.0})
    assert (tmp_path / "progress.csv").read_text() == "step,loss,val_acc\n10,0.1,\n20,0.05,\n30,0.5,1\n"
