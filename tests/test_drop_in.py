"""Code written for guided-diffusion finds what it expects, and golden numbers of the published package hold.

The golden file was computed once with openai/guided-diffusion on random weights; see docs/drop_in.md.
"""

import argparse
import importlib
import inspect
import math
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import golden
from safetensors.torch import save_file
from tiny import make_references

from guided_diffusion import dist_util, script_util
from guided_diffusion.errors import InputError
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.image_datasets import _list_image_files_recursively, load_data, load_image, to_tensor
from guided_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_gaussian_diffusion, create_model, sr_create_model_and_diffusion
from guided_diffusion.unet import SuperResModel
from resizer import Resizer

NAMES = """
dist_util: load_state_dict dev setup_dist sync_params
logger: configure log get_dir dumpkvs logkv logkv_mean logkvs getkvs warn info debug error scoped_configure profile_kv
train_util: TrainLoop log_loss_dict parse_resume_step_from_filename find_resume_checkpoint find_ema_checkpoint
fp16_util: MixedPrecisionTrainer convert_module_to_f16 convert_module_to_f32
script_util: classifier_and_diffusion_defaults sr_create_model_and_diffusion sr_model_and_diffusion_defaults NUM_CLASSES
script_util: create_classifier_and_diffusion create_model add_dict_to_argparser args_to_dict create_classifier
script_util: model_and_diffusion_defaults create_model_and_diffusion classifier_defaults create_gaussian_diffusion
image_datasets: load_data _list_image_files_recursively
resample: create_named_schedule_sampler UniformSampler LossAwareSampler LossSecondMomentResampler ScheduleSampler
respace: SpacedDiffusion space_timesteps
unet: UNetModel SuperResModel EncoderUNetModel
"""
METHODS = """
calc_bpd_loop _scale_timesteps q_sample q_mean_variance p_sample p_sample_loop ddim_sample ddim_sample_loop
p_sample_loop_progressive ddim_sample_loop_progressive p_mean_variance condition_mean condition_score
ddim_reverse_sample training_losses _vb_terms_bpd _prior_bpd _predict_xstart_from_eps _predict_eps_from_xstart
"""


LOOP = "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress"
FORK = "skip_timesteps init_image randomize_class cond_fn_with_grad"


def test_names():
    for line in NAMES.strip().split("\n"):
        module, names = line.split(": ")
        found = importlib.import_module(f"guided_diffusion.{module}")
        assert not [name for name in names.split() if not hasattr(found, name)]
    assert not [name for name in METHODS.split() if not hasattr(GaussianDiffusion, name)]


ORDER = {
    "p_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs",
    "ddim_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs eta",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs eta",
    "p_sample_loop": f"{LOOP} {FORK}",
    "p_sample_loop_progressive": f"{LOOP} {FORK}",
    "ddim_sample_loop": f"{LOOP} eta {FORK}",
    "ddim_sample_loop_progressive": f"{LOOP} eta {FORK}",
    "calc_bpd_loop": "model x_start clip_denoised model_kwargs",
    "training_losses": "model x_start t model_kwargs noise",
}


def test_order_of_arguments():
    for name, expected in ORDER.items():
        assert inspect.getfullargspec(getattr(GaussianDiffusion, name)).args[1:] == expected.split(), name


both_loops = pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])


# ---- golden numbers -------------------------------------------------------------------------------------------------


def cond_fn(x, t, y=None):
    slope = (1 + t.float() / 1000) * y.float()
    return (0.5 - x) * slope[:, None, None, None]


@pytest.fixture(params=[False, True], ids=["fixed variance", "learned variance"])
def published(request):
    """The golden numbers of a process, with the model and the process that gave them."""
    data = golden("drop_in")
    prefix = f"learned={request.param}/"
    numbers = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    weight = data["model.weight"][: 6 if request.param else 3]

    def model(x, t, y=None):
        h = torch.nn.functional.conv2d(x, weight, padding=1)
        return (h * (1 + t.to(x.dtype) / 2000)[:, None, None, None]).tanh()

    return numbers, model, create_gaussian_diffusion(learn_sigma=request.param, timestep_respacing="20")


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


def test_golden_guidance(published):
    numbers, model, diffusion = published
    x, t, kwargs = numbers["x"], numbers["t"], {"y": numbers["y"]}
    out = diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs)
    for key, value in out.items():
        close(value, numbers[f"p_mean_variance/{key}"])
    close(diffusion.condition_mean(cond_fn, out, x, t, kwargs), numbers["condition_mean"])
    conditioned = diffusion.condition_score(cond_fn, out, x, t, kwargs)
    # x_0 is the noise times sqrt(1 / alpha_bar - 1), which is large at the last step.
    close(conditioned["pred_xstart"], numbers["condition_score/pred_xstart"], atol=1e-3)
    close(conditioned["mean"], numbers["condition_score/mean"], atol=1e-4)
    assert set(conditioned) == set(out) and conditioned["pred_xstart"] is not out["pred_xstart"]
    close(diffusion.ddim_reverse_sample(model, x, t, model_kwargs=kwargs)["sample"], numbers["ddim_reverse_sample"])
    with pytest.raises(InputError, match="eta is 0.5; only the deterministic path, 0, can be reversed"):
        diffusion.ddim_reverse_sample(model, x, t, model_kwargs=kwargs, eta=0.5)


@both_loops
def test_golden_guided_loops(published, name):
    numbers, model, diffusion = published
    kwargs = {"y": numbers["y"][:2]}
    torch.manual_seed(5)
    found = getattr(diffusion, name)(model, (2, 3, 8, 8), cond_fn=cond_fn, model_kwargs=kwargs, device="cpu")
    close(found, numbers[name], atol=1e-4)
    # The same by position.
    torch.manual_seed(5)
    noise = torch.randn(2, 3, 8, 8)
    again = getattr(diffusion, name)(model, (2, 3, 8, 8), noise, True, None, cond_fn, kwargs, "cpu", True)
    assert torch.equal(again, found)


def test_golden_likelihood(published):
    numbers, model, diffusion = published
    torch.manual_seed(6)
    found = diffusion.calc_bpd_loop(model, numbers["x0"])
    assert set(found) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name in ("prior_bpd", "xstart_mse", "mse"):
        close(found[name], numbers[f"calc_bpd_loop/{name}"], atol=1e-4)
    expected = numbers["calc_bpd_loop/vb"]
    close(found["vb"][:, :-1], expected[:, :-1], atol=1e-4)
    close(found["total_bpd"], found["vb"].sum(1) + found["prior_bpd"])
    # The first step's likelihood is an integral of a Gaussian: exact here, approximated by a tanh there.
    torch.testing.assert_close(found["vb"][:, -1], expected[:, -1], atol=0, rtol=0.02)


def test_golden_super_resolution():
    data = {key[3:]: value for key, value in golden("drop_in").items() if key.startswith("sr/")}
    model = SuperResModel(
        16, 3, 32, 6, 1, (2,), channel_mult=(1, 1), num_heads=2, use_scale_shift_norm=True, resblock_updown=True,
        num_classes=4,
    )  # fmt: skip
    model.load_state_dict({key[6:]: value.float() for key, value in data.items() if key.startswith("model/")})
    with torch.no_grad():
        found = model.eval()(data["x"], data["t"], low_res=data["low_res"], y=data["y"])
    close(found, data["output"], atol=2e-5)


def test_seeded_initial_weights():
    """They are drawn in the published package's order: sums of magnitudes that it gave."""
    torch.manual_seed(0)
    flags = {"channel_mult": "1,2", "attention_resolutions": "8", "num_heads": 4, "use_scale_shift_norm": True}
    weights = create_model(16, 32, 1, **flags).state_dict()
    for name, expected in (
        ("input_blocks.0.0.weight", 84.19082832632921), ("middle_block.0.in_layers.2.weight", 769.0769744870915),
        ("middle_block.2.in_layers.2.weight", 769.1935277791156), ("output_blocks.3.0.in_layers.2.weight", 382.9597644585858),  # noqa: E501
    ):  # fmt: skip
        assert float(weights[name].double().abs().sum()) == pytest.approx(expected, rel=1e-9), name


# ---- guidance and likelihood ----------------------------------------------------------------------------------------


class Gaussian(torch.nn.Module):
    """The exact noise predictor of data N(0, 1) at original timesteps: eps = sqrt(1 - alpha_bar) x."""

    def __init__(self, diffusion):
        super().__init__()
        self.scale = torch.zeros(1000)
        self.scale[diffusion.timestep_map] = torch.from_numpy(diffusion.sqrt_one_minus_alphas_cumprod).float()

    def forward(self, x, t):
        return self.scale[t][:, None, None, None] * x


@both_loops
def test_guidance_samples_the_posterior(name):
    """Data N(0, 1) and a likelihood N(y; x_0, s^2): samples have the posterior's mean, y / (1 + s^2)."""
    diffusion = create_gaussian_diffusion(sigma_small=True)
    y, s2 = 1.0, 3.0
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod).float()

    def gradient(x, t):
        # p(y | x_t) is N(sqrt(alpha_bar) x_t, 1 - alpha_bar + s^2).
        a = alpha_bar[t][:, None, None, None]
        return a.sqrt() * (y - a.sqrt() * x) / (1 - a + s2)

    torch.manual_seed(0)
    shape = (64, 1, 8, 8)
    x = getattr(diffusion, name)(Gaussian(diffusion), shape, clip_denoised=False, cond_fn=gradient, device="cpu")
    assert float(x.mean()) == pytest.approx(y / (1 + s2), abs=0.05)
    assert float(x.std()) == pytest.approx(math.sqrt(s2 / (1 + s2)), abs=0.05)


@both_loops
def test_guidance_through_the_model(name):
    """With cond_fn_with_grad, autograd through the exact model gives the gradient of log N(y; E[x_0 | x_t], s^2)."""
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    y, s2, seen = 0.3, 5.0, []
    root = torch.from_numpy(diffusion.sqrt_alphas_cumprod).float()

    def by_hand(x, t):  # E[x_0 | x_t] = sqrt(alpha_bar) x_t; t are original timesteps, 111 apart
        a = root[t // 111][:, None, None, None]
        return a * (y - a * x) / s2

    def by_autograd(x, t, out):
        seen.append(t.tolist())
        likelihood = -(out["pred_xstart"] - y).square().sum() / (2 * s2)
        return torch.autograd.grad(likelihood, x)[0]

    model, outs = Gaussian(diffusion), []
    for options in ({"cond_fn": by_hand}, {"cond_fn": by_autograd, "cond_fn_with_grad": True}):
        torch.manual_seed(0)
        with torch.inference_mode():  # in which nothing could be differentiated
            steps = getattr(diffusion, f"{name}_progressive")(model, (2, 1, 4, 4), clip_denoised=False, **options)
            outs.append(list(steps))
    first, second = outs
    torch.testing.assert_close(second[-1]["sample"], first[-1]["sample"], atol=1e-4, rtol=1e-4)
    assert not second[-1]["sample"].requires_grad and not second[-1]["sample"].is_inference()
    # The fork gives step indices, and the prediction before DDIM's guidance.
    assert seen == [[i, i] for i in reversed(range(10))]
    assert torch.allclose(first[0]["pred_xstart"], second[0]["pred_xstart"]) == (name == "p_sample_loop")


@both_loops
def test_a_loop_that_starts_at_an_image(published, name):
    _, model, diffusion = published
    noise, image = torch.randn(2, 2, 3, 8, 8).unbind()
    for init in (image, None):
        x = diffusion.q_sample(torch.zeros_like(noise) if init is None else init, torch.full((2,), 12), noise)
        torch.manual_seed(0)
        found = getattr(diffusion, name)(model, noise.shape, noise, skip_timesteps=7, init_image=init)
        torch.manual_seed(0)
        for i in reversed(range(13)):
            x = getattr(diffusion, name.removesuffix("_loop"))(model, x, torch.full((2,), i))["sample"]
        assert torch.equal(found, x)
    with pytest.raises(InputError, match="skip_timesteps is 20; .* 0 to 19"):
        getattr(diffusion, name)(model, noise.shape, noise, skip_timesteps=20)


def test_classes_drawn_at_each_step():
    labels = []

    def model(x, t, y):
        labels.append(y.tolist())
        return torch.zeros_like(x)

    model.num_classes = 3
    given = {"y": torch.tensor([5, 5])}
    diffusion = create_gaussian_diffusion(timestep_respacing="30")
    diffusion.p_sample_loop(model, (2, 3, 4, 4), model_kwargs=given, randomize_class=True)
    assert len(labels) == 30 and {label for pair in labels for label in pair} == {0, 1, 2}
    assert given["y"].tolist() == [5, 5]


@pytest.mark.parametrize("mean", ModelMeanType)
def test_data_of_any_rank(mean):
    types = {"model_mean_type": mean, "model_var_type": ModelVarType.LEARNED_RANGE}
    diffusion = GaussianDiffusion(betas=np.linspace(0.01, 0.2, 10), **types)

    def model(x, t):
        return torch.cat([x, x], 1)

    for shape in ((4, 6), (2, 3, 4, 5, 6)):
        x, t = torch.randn(shape), torch.randint(0, 10, shape[:1])
        for values in (diffusion.q_posterior_mean_variance(x, x, t), diffusion.q_mean_variance(x, t)):
            assert [value.shape for value in values] == [x.shape] * 3
        assert diffusion.p_sample_loop(model, shape).shape == shape
        assert diffusion.training_losses(model, x, t)["loss"].shape == shape[:1]
        assert diffusion.calc_bpd_loop(model, x)["vb"].shape == (shape[0], 10)


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
def test_hooks_fire_without_gradients(scale_shift):
    model = create_model(16, 32, 1, channel_mult="1,2", attention_resolutions="8", use_scale_shift_norm=scale_shift)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        plain = model.eval()(x, t)
    # guided-diffusion calls a block's second sequence piece by piece, too, where the embedding scales and shifts.
    silent = {id(b.out_layers) for b in model.modules() if scale_shift and hasattr(b, "out_layers")}
    modules = {n: m for n, m in model.named_modules() if not isinstance(m, torch.nn.ModuleList) and id(m) not in silent}
    for grad in (False, True):
        seen = set()
        handles = [m.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, m in modules.items()]
        with torch.set_grad_enabled(grad):
            assert torch.equal(model(x, t), plain)
        assert seen == modules.keys()
        for handle in handles:
            handle.remove()


SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}


def test_configuration_keys_of_ddrm(recwarn):
    keys = {"type": "openai", "out_channels": 3, "resamp_with_conv": True, "var_type": "fixedsmall"}
    assert create_model(**SMALL, **keys, learn_sigma=True).out_channels == 6 and not recwarn.list
    with pytest.warns(UserWarning, match="out_channels=3 has no effect; the network is made for 1 or 2"):
        assert create_model(**SMALL, **keys, learn_sigma=True, in_channels=1).out_channels == 2
    with pytest.raises(TypeError, match="mystery"):
        create_model(**SMALL, mystery=1)


def test_number_of_classes_that_the_importer_sets(monkeypatch):
    monkeypatch.setattr(script_util, "NUM_CLASSES", 10)
    assert script_util.create_model_and_diffusion(**SMALL, class_cond=True)[0].num_classes == 10
    classifier = script_util.create_classifier(16, classifier_width=32, classifier_depth=1, channel_mult="2,2")
    assert classifier.out_channels == 10


def test_options_of_a_fork_are_named(recwarn):
    """DDPM-IP's script passes `input_pertub` to no function: its own package takes it from the flags."""
    names = {"input_pertub": 0.1, "mystery": 0.0, "save_dir": "out", "learn_sigma": True}
    args = argparse.Namespace(**script_util.model_and_diffusion_defaults() | names)
    assert args.save_dir  # read by the script: not lost
    found = script_util.args_to_dict(args, script_util.model_and_diffusion_defaults().keys())
    assert set(found) == set(script_util.model_and_diffusion_defaults())
    (warning,) = recwarn
    assert str(warning.message) == "input_pertub=0.1 has no effect: this guided_diffusion has no such option"


def test_sizes_of_super_resolution():
    with pytest.raises(InputError, match="large_size is 96"):
        sr_create_model_and_diffusion(large_size=96)


def test_resizer_interface():
    x = torch.rand(2, 3, 12, 8)
    resizer = Resizer(x.shape, 0.5).to("cpu")
    assert isinstance(resizer, torch.nn.Module)
    assert torch.equal(resizer(x), Resizer(x.shape, 0.5, None, "cubic")(x))
    assert Resizer(x.shape, output_shape=(6, 4))(x).equal(resizer(x))
    assert Resizer(x.shape, output_shape=(2, 3, 5, 9))(x).shape == (2, 3, 5, 9)
    assert Resizer(x.shape, [2, 1, 1])(x).shape == (2, 6, 12, 8)
    # Without antialiasing, shrinking by 2 with the box kernel picks samples instead of averaging them.
    assert torch.isin(Resizer(x.shape, 0.5, kernel="box", antialiasing=False)(x), x).all()
    for arguments in ({}, {"output_shape": (3,)}, {"output_shape": (0, 3)}):
        with pytest.raises(ValueError):
            Resizer(x.shape, **arguments)


# ---- training -------------------------------------------------------------------------------------------------------


def test_schedule_samplers():
    diffusion = create_gaussian_diffusion(timestep_respacing="5")
    np.random.seed(0)
    t, weights = create_named_schedule_sampler("uniform", diffusion).sample(100, "cpu")
    np.random.seed(0)
    assert t.tolist() == np.random.choice(5, size=100, p=np.full(5, 0.2)).tolist() and weights.tolist() == [1.0] * 100
    assert isinstance(create_named_schedule_sampler("loss-second-moment", diffusion), LossSecondMomentResampler)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_mixed_precision_trainer(use_fp16, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3))
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, initial_lg_loss_scale=10.0)
    optimizer = torch.optim.AdamW(trainer.master_params, lr=1e-2)
    x, losses = torch.randn(4, 3, 8, 8), []
    for _ in range(40):
        trainer.zero_grad()
        loss = (model(x).float() - 1).square().mean()
        trainer.backward(loss)
        assert trainer.optimize(optimizer)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.master_params)
    state = trainer.master_params_to_state_dict([p + 1 for p in trainer.master_params])
    assert all(torch.equal(state[name], p + 1) for name, p in model.named_parameters())
    if use_fp16:
        assert trainer.lg_loss_scale == pytest.approx(10 + 40 * 1e-3, abs=1e-3)
        before = [p.clone() for p in trainer.master_params]
        trainer.backward(model(x).sum() * float("inf"))
        assert not trainer.optimize(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.master_params))
        assert trainer.lg_loss_scale < 10


# ---- data -----------------------------------------------------------------------------------------------------------


def test_load_data(tmp_path):
    pictures = make_references(tmp_path, ["dog_1.png", "cat_2.png", "b/ant_3.png", "a.png", "a/bee_4.png"])
    paths = _list_image_files_recursively(str(pictures))
    order = ["a/bee_4.png", "a.png", "b/ant_3.png", "cat_2.png", "dog_1.png"]
    assert paths == [str(pictures / name) for name in order]
    options = {"class_cond": True, "deterministic": True, "random_flip": False}
    data = load_data(data_dir=str(pictures), batch_size=2, image_size=8, **options)
    batches = [next(data) for _ in range(5)]
    assert all(x.shape == (2, 3, 8, 8) and x.dtype == torch.float32 for x, _ in batches)
    # Two passes of five images in batches of two: none is left out.
    assert [label for _, kwargs in batches for label in kwargs["y"].tolist()] == [2, 0, 1, 3, 4] * 2
    expected = to_tensor([load_image(path, 8) for path in paths] * 2)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected)
    with pytest.raises(InputError, match="data_dir"):
        load_data(data_dir="", batch_size=1, image_size=8)
    (pictures / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        next(load_data(data_dir=str(pictures), batch_size=5, image_size=8))


# ---- processes ------------------------------------------------------------------------------------------------------


def test_state_dicts_are_loaded_safely(tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert dist_util.load_state_dict(str(tmp_path / name), map_location="cpu")["a"].equal(state["a"])

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(InputError, match="without running code"):
        dist_util.load_state_dict(str(tmp_path / "evil.pt"), weights_only=False)


def test_process_group_of_one(monkeypatch):
    for variable in [variable for names in dist_util.LAUNCHERS for variable in names[1:]]:
        monkeypatch.delenv(variable, raising=False)
    dist_util.setup_dist()
    try:
        dist_util.setup_dist({"gpu": 0})  # as forks call it
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        gathered = [torch.zeros(2)]
        dist.all_gather(gathered, torch.ones(2))
        assert gathered[0].tolist() == [1, 1]
        dist_util.sync_params([torch.nn.Parameter(torch.ones(2))])
        assert dist_util.dev().type in ("cpu", "cuda")
    finally:
        dist.destroy_process_group()


def test_leftover_variables_end_in_an_error(monkeypatch, caplog):
    """RANK and the others of a run that is no more: a line after a while, then an error, not a day of silence."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist_util, "STARTUP_TIMEOUT", 2.0)
    monkeypatch.setattr(dist_util, "PATIENCE", 0.3)
    with pytest.raises(InputError, match=r"cannot reach the others.*unset RANK and WORLD_SIZE"):
        dist_util.open_store(dist_util.ranks())
    assert "rank 1 of 2 has been waiting for" in caplog.text and str(port) in caplog.text
