"""One-channel models: what a model of three equal channels computes, in every command, file format and energy."""

import numpy as np
import pytest
import tiny
import tiny_training
import torch
from PIL import Image
from scripts_in_process import load_script, run_script

from guided_diffusion import Translator, energy
from guided_diffusion.checkpoint import ModelFlags, load_model, load_state_dict, save_model
from guided_diffusion.checkpoint.loading import convert
from guided_diffusion.checkpoint.targets import TargetOptions, load_target
from guided_diffusion.codec import Grey
from guided_diffusion.ddpm import Model
from guided_diffusion.dist_util import Ranks, connect
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.methods import METHODS, Translation
from guided_diffusion.script_util import create_classifier, create_model
from guided_diffusion.target import Batch

GREY = {**tiny.MODEL, "in_channels": 1}
NAMES = ("colour.png", "grey.png")


def grey_model(path, **flags):
    """A one-channel checkpoint of random weights; returns its state dict."""
    torch.manual_seed(0)
    flags = {**GREY, **flags}
    state = tiny.random_state(create_model(**flags))
    save_model(path, state, model_type="ADM", flags={**flags, **tiny.PROCESS})
    return state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A grey model, its twin of three channels, an extractor, and a colour and a grey reference; read only."""
    root = tmp_path_factory.mktemp("grey")
    state = grey_model(root / "grey.safetensors")
    # The twin sees the mean of its channels and predicts three equal ones.
    twin = {**state, "input_blocks.0.0.weight": state["input_blocks.0.0.weight"].expand(-1, 3, -1, -1) / 3}
    twin |= {f"out.2.{end}": state[f"out.2.{end}"].repeat_interleave(3, 0) for end in ("weight", "bias")}
    save_model(root / "twin.safetensors", twin, model_type="ADM", flags={**tiny.MODEL, **tiny.PROCESS})
    tiny.make_encoder(root / "dse.safetensors", 2, head="I2Iout")
    tiny.make_references(root / "ref", NAMES)
    Image.open(root / "ref" / "grey.png").convert("L").save(root / "ref" / "grey.png")
    return root


def test_codec_gives_pillows_luma_and_three_equal_channels(data):
    picture = Image.open(data / "ref" / "colour.png")
    x = Grey().encode(to_tensor([np.asarray(picture)]))
    assert x.shape == (1, 1, tiny.SIZE, tiny.SIZE)
    luma = (x[0, 0] + 1) * 127.5
    assert (luma - torch.from_numpy(np.array(picture.convert("L")))).abs().max() <= 0.51
    decoded = Grey().decode(x)
    assert decoded.shape == (1, 3, tiny.SIZE, tiny.SIZE)
    torch.testing.assert_close(Grey().encode(decoded), x)


METHOD_OPTIONS = {
    "sddm": {"range_t": 2, "blocks": 4}, "sddm released": {"range_t": 2, "blocks": 4, "variant": "released"},
    "ilvr": {"range_t": 2, "down_n": 4}, "sdedit": {"start": 4},
    "egsde": {"start": 4, "down_n": 4, "ls": 0, "li": 0.1}, "unconditional": {},
}  # fmt: skip


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_methods_give_what_a_twin_of_three_equal_channels_gives(name, data):
    kind, made = METHODS[name.split()[0]], []
    ref = torch.rand(2, 1, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1)).expand(-1, 3, -1, -1)
    for model in ("grey", "twin"):
        options = TargetOptions(model_path=str(data / f"{model}.safetensors"))
        target = load_target(options, ModelFlags(timestep_respacing="6"), torch.device("cpu"))
        generator = torch.Generator().manual_seed(2)

        def noise(shape, generator=generator):
            return torch.randn(shape[0], 1, *shape[2:], generator=generator).expand(shape).clone()

        energies = [energy.dct(4), energy.low_pass(4)] if kind.takes_energies else []
        translation = Translation(kind(**METHOD_OPTIONS[name]), target, energies)
        made.append(translation(Batch(ref, NAMES), noise=noise))
    assert made[0].shape == made[1].shape == (2, 3, tiny.SIZE, tiny.SIZE)
    # Rounding differs, and the minimum-norm points of the released variant are sensitive to it.
    torch.testing.assert_close(*made, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["vgg", "dse", "classifier"])
def test_networks_of_three_channels_see_grey_as_equal_channels(name):
    torch.manual_seed(0)
    network = create_classifier(**tiny.ENCODER, num_class=3)
    network.load_state_dict(tiny.random_state(network))
    weights = {key: torch.randn_like(value) for key, value in energy._vgg_layers(1).state_dict().items()}
    made = {"vgg": energy.vgg(weights, 4), "dse": energy.dse(network), "classifier": energy.classifier(network, 1)}
    each, found = made[name], {}
    x, ref = torch.randn(2, 2, 1, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))
    for channels in (1, 3):
        each.prepare(ref.expand(-1, channels, -1, -1))
        found[channels] = each.energy_and_grad(x.expand(-1, channels, -1, -1), torch.tensor([3, 700]), 0.5)
    torch.testing.assert_close(found[1][0], found[3][0])
    assert found[1][1].shape == x.shape
    torch.testing.assert_close(found[1][1], found[3][1].sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_channels_that_contradict_a_file_are_refused(data, tmp_path):
    mixed = load_state_dict(data / "twin.safetensors")
    mixed["out.2.weight"], mixed["out.2.bias"] = mixed["out.2.weight"][:1], mixed["out.2.bias"][:1]
    torch.save(mixed, tmp_path / "mixed.pt")
    for path, flags, says in (
        (data / "grey.safetensors", {"in_channels": 3}, "have in_channels=1"),
        (data / "twin.safetensors", {"in_channels": 1}, "have in_channels=3"),
        (data / "grey.safetensors", {"in_channels": 4}, "1 or 3"),
        (tmp_path / "mixed.pt", {"image_size": tiny.SIZE}, "input_blocks.0.0.weight has shape"),
    ):
        with pytest.raises(InputError, match=says):
            load_model(path, **flags)


@pytest.mark.parametrize("kind", ["ADM", "DDPM"])
@pytest.mark.parametrize("learned", [False, True])
def test_files_and_folders_of_diffusers_give_the_same_model_again(kind, learned, tmp_path):
    flags = {**GREY, "learn_sigma": learned}
    if kind == "ADM":
        network = create_model(**flags)
    else:
        shape = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "image_size": tiny.SIZE}
        network = Model(ch=32, in_channels=1, out_ch=1 + learned, **shape)
        flags = {"image_size": tiny.SIZE, "in_channels": 1, "learn_sigma": learned}
    network.load_state_dict(tiny.random_state(network))
    file, folder, again, mean = (tmp_path / name for name in ("m.safetensors", "folder", "again.safetensors", "mean"))
    save_model(file, network, model_type=kind, flags={**flags, **tiny.PROCESS})
    convert(file, folder)
    convert(folder, again)
    convert(file, mean, drop_variance=True)
    x, t = torch.randn(2, 1, tiny.SIZE, tiny.SIZE), torch.tensor([3, 700])
    for path in (file, folder, again, mean):
        model, info = load_model(path)
        assert (info.model_type, info.flags["in_channels"]) == (kind, 1)
        assert info.flags["learn_sigma"] == (learned and path != mean)
        with torch.no_grad():
            wanted = network.eval()(x, t)[:, : 1 if path == mean else 2]
            torch.testing.assert_close(model(x, t), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, flags", [
    ("ae_sample", ("--range_t", 2, "--area", 4, "--energy", "dct,dse")), ("egsde_sample", ("--t", 4, "--down_N", 4)),
])  # fmt: skip
def test_sampling_grey_and_colour_pictures(name, flags, data, tmp_path):
    flags += ("--model_path", data / "grey.safetensors", "--base_samples", data / "ref", "--save_dir", tmp_path / "out")
    flags += ("--dsepath", data / "dse.safetensors", "--timestep_respacing", 6, "--batch_size", 1, "--device", "cpu")
    assert run_script(name, *flags) == 0
    files = [tmp_path / "out" / each for each in NAMES]
    for file in files:
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("L", (tiny.SIZE, tiny.SIZE)) and len(image.getcolors()) > 8
    assert tiny.record(tmp_path / "out")["settings"]["in_channels"] == 1
    if name != "ae_sample":
        return
    options = {"range_t": 2, "area": 4, "energy": "dct,dse", "encoder": str(data / "dse.safetensors")}
    translate = Translator(data / "grey.safetensors", steps=6, device="cpu", **options)
    for file in files:
        assert np.array_equal(np.asarray(translate(data / "ref" / file.name)), load_image(file, tiny.SIZE))
    x = Grey().encode(translate.read(data / "ref" / "grey.png"))
    assert np.array_equal(np.asarray(translate(x[0], name="grey.png")), load_image(files[1], tiny.SIZE))


def test_images_and_likelihoods(data, tmp_path):
    flags = ("--model_path", data / "grey.safetensors", "--timestep_respacing", 4, "--device", "cpu")
    assert run_script("image_sample", *flags, "--save_dir", tmp_path / "made", "--num_samples", 2, "--npz", "True") == 0
    made = np.load(next((tmp_path / "made").glob("*.npz")))["arr_0"]
    assert made.shape == (2, tiny.SIZE, tiny.SIZE, 3) and (made[..., :1] == made).all()

    nll = tmp_path / "nll"
    module = load_script("image_nll")
    given = module.create_parser().parse([*map(str, flags), "--data_dir", str(data / "ref"), "--save_dir", str(nll)])
    assert module.evaluate(given, connect(Ranks())) == 0
    assert len((nll / "bpd.csv").read_text().splitlines()) == 3


TRAIN = tiny_training.words(
    "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 8 --num_head_channels 32 "
    "--image_size 16 --batch_size 2 --lr 1e-3 --save_interval 10 --sample_interval 10 --sample_respacing 2 "
    "--num_samples 2 --ema_rate 0.9 --device cpu --learn_sigma True --cache memory"
)


@pytest.fixture
def train(data):
    """Calls image_train in this process."""

    def run(save_dir, steps, *flags):
        places = ("--data_dir", data / "ref", "--save_dir", save_dir, "--iterations", steps)
        return tiny_training.train("image_train", *places, *flags)

    return run


def test_training_resumes_bit_for_bit_and_keeps_its_channels(train, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps, flags in (
        (whole, 20, ("--in_channels", 1)), (parts, 10, ("--in_channels", 1)), (parts, 20, ("--resume", "auto")),
    ):  # fmt: skip
        assert train(folder, steps, *TRAIN, *flags) == 0
    for name in ("model000020.pt", "ema_0.9_000020.pt", "model.safetensors"):
        expected, found = (load_state_dict(folder / name) for folder in (whole, parts))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert load_model(parts / "model.safetensors")[1].flags["in_channels"] == 1
    with pytest.raises(InputError, match="in_channels=1"):
        train(parts, 30, *TRAIN, "--resume", "auto", "--in_channels", 3)
    with Image.open(parts / "samples" / "000020.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels[..., :1] == pixels).all()


@pytest.mark.parametrize("learned", [False, True])
def test_colour_models_become_grey_ones(train, learned, tmp_path):
    flags = {**tiny.MODEL, "learn_sigma": learned}
    torch.manual_seed(0)
    colour = create_model(**flags)
    colour.load_state_dict(tiny.random_state(colour))
    start, made = tmp_path / "colour.safetensors", tmp_path / "run" / "model.safetensors"
    save_model(start, colour, model_type="ADM", flags={**flags, **tiny.PROCESS})
    run = ("--batch_size", 2, "--save_interval", 1, "--lr", 1e-30, "--ema_rate", 0, "--export_dtype", "fp32")
    run += ("--device", "cpu", "--in_channels")
    assert train(tmp_path / "run", 1, "--resume_checkpoint", start, *run, 1) == 0
    x, t = torch.randn(2, 1, tiny.SIZE, tiny.SIZE), torch.tensor([3, 700])
    with torch.no_grad():
        wanted = colour.eval()(x.expand(-1, 3, -1, -1), t).unflatten(1, (-1, 3)).mean(2)
        torch.testing.assert_close(load_model(made)[0](x, t), wanted, rtol=0, atol=1e-5)
    # It is another run that goes on from an export; a run's own checkpoints keep their channels.
    assert train(tmp_path / "next", 1, "--resume_checkpoint", made, *run, 1) == 0
    with pytest.raises(InputError, match="in_channels=1") as error:
        train(tmp_path / "other", 1, "--resume_checkpoint", made, *run, 3)
    assert error.value.parameter == "in_channels"
