"""Strangers' data sets (labels, archives, damaged pictures), and what a resumed run says of other options."""

import copy
import dataclasses
import itertools
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from tiny_training import RUN, draw, draw_pets, make_loop, train, words

from guided_diffusion import runtime
from guided_diffusion.errors import InputError
from guided_diffusion.training import config as options
from guided_diffusion.training import files
from guided_diffusion.training.data import TrainImages, class_labels, folder_names, labelled_images, list_images


@pytest.fixture
def folder(tmp_path):
    return draw_pets(tmp_path / "pictures")


@pytest.mark.parametrize("name", ["{i:04d}_small.png", "video{i}/frame.png", "dog.png"])
def test_pictures_that_would_be_classes_of_their_own_are_refused(tmp_path, name):
    for i in range(4):
        draw(tmp_path / name.format(i=i))
    with pytest.raises(InputError, match="into a folder"):
        class_labels(list_images(str(tmp_path)))


def test_classes_of_version_0_1_are_read(tmp_path):
    (tmp_path / "train.json").write_text('{"model": {"num_class": 2}, "flags": {"classes": ["a", "b"]}}')
    assert files.read_run(str(tmp_path)).classes == ["a", "b"]


def test_domains_are_called_by_what_tells_their_folders_apart(folder, tmp_path):
    assert folder_names(["/a/cat", "/b/dog"]) == ["cat", "dog"]
    assert folder_names(["/e/cat/train", "/e/dog/train", "/e/fox/train"]) == ["cat", "dog", "fox"]
    assert folder_names(["/a/x", "/a/y", "/b/x"]) == ["a-x", "a-y", "b-x"]
    assert labelled_images(None, f"{folder}/cat,{folder}/dog")[1](None)[1] == ["source", "target"]
    shutil.copytree(folder / "cat", tmp_path / "wild")
    references, label = labelled_images(None, f"{folder}/cat,{tmp_path}/wild,{folder}/dog")
    labels, names = label(None)
    assert names == ["cat", "wild", "dog"] and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [reference.name.split("/")[0] for reference in references] == [names[label] for label in labels]
    link = tmp_path / "link"
    link.symlink_to(folder / "cat")
    with pytest.raises(InputError) as error:
        labelled_images(None, f"{folder}/cat,{link}")
    assert error.value.parameter == "domains"


def test_classes_come_from_file_names(tmp_path, caplog):
    for name in ("val_1.png", "cat_1.png", "cat_2.png"):
        draw(tmp_path / name)
    labels, names = class_labels(list_images(tmp_path))
    assert names == ["cat", "val"] and labels.tolist() == [0, 0, 1] and "val taken for classes" in caplog.text
    with pytest.raises(InputError, match=r"val_1.png: its class 'val' is not among"):
        class_labels(list_images(tmp_path), ["cat"])


def test_a_run_that_numbered_its_classes_as_texts_resumes_with_them(tmp_path):
    for name, i in itertools.product(("10", "2"), range(2)):
        draw(tmp_path / "data" / name / f"{i}.png")
    base = ["--data_dir", tmp_path / "data", "--save_dir", tmp_path / "run", *RUN, "--class_cond", "True"]
    train("image_train", *base, "--iterations", 1)
    assert files.read_run(str(tmp_path / "run")).classes == ["2", "10"]
    path = tmp_path / "run" / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": ["10", "2"]}))
    train("image_train", *base, "--iterations", 2, "--resume", "auto")
    assert files.read_run(str(tmp_path / "run")).classes == ["10", "2"]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_labels_of_dataset_json_count_and_not_its_buckets(tmp_path, packed):
    labels = [["00000/img0.png", 10], ["00000/img1.png", 2], ["00001/img2.png", 10], ["00001/img3.png", 2]]
    for i, (name, _) in enumerate(labels):
        draw(tmp_path / "set" / name, i)
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": labels}))
    plain = TrainImages(list_images(str(tmp_path / "set")), 8)
    if packed:
        shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    references = list_images(str(tmp_path / ("set.zip" if packed else "set")))
    found, names = class_labels(references)
    assert names == ["2", "10"] and found.tolist() == [1, 0, 1, 0]
    images = TrainImages(references, 8, labels=found, cache="none", num_workers=2)
    _, x, y = next(images.batches(iter([np.arange(4)]), "cpu"))
    assert torch.equal(x, next(plain.batches(iter([np.arange(4)]), "cpu"))[1])
    assert y.tolist() == found[images.indices(np.arange(4))].tolist()


@pytest.mark.parametrize("labels, said", [
    (None, "has no class"), ([["a/0.png", 1]], "has no class"), ([["a/0.png", [1, 0]]], "dataset.json")
])  # fmt: skip
def test_a_dataset_json_without_labels_is_one_line(tmp_path, labels, said):
    for i in range(2):
        draw(tmp_path / "a" / f"{i}.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(InputError, match=said):
        class_labels(list_images(str(tmp_path)))


def test_archives_that_are_none_are_one_line(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(InputError, match=r"a\.zip is damaged or not a \.zip data set"):
        list_images(str(tmp_path / "a.zip"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("0.png", b"%!PS-Adobe-3.0 EPSF-3.0")
    with pytest.raises(InputError, match=r"b\.zip/0\.png: not an image"):
        TrainImages(list_images(str(tmp_path / "b.zip")), 8).read(0)


def test_a_damaged_picture_late_in_training_loses_no_step(folder, tmp_path):
    references = list_images(str(folder))
    images = TrainImages(references, 8, cache="none")
    last = references[images.indices(np.arange(8))[-1]]
    with open(last.path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\nnothing")
    loop, _ = make_loop(folder, tmp_path / "run", images=images, batch_size=2, iterations=6)
    with pytest.raises(InputError, match=f"{last.name}: .*skip_damaged"):
        loop.run()
    assert files.saved_steps(str(tmp_path / "run")) == [3]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_skipped_pictures_are_replaced_by_their_class_and_counted(folder, tmp_path, caplog, cache):
    for name in ("cat/0.png", "dog/7.png"):
        (folder / name).write_bytes(b"")
    references = list_images(str(folder))
    images = TrainImages(references, 8, labels=class_labels(references)[0], cache=cache, skip_damaged=True)
    loop, _ = make_loop(folder, tmp_path / "run", images=images, batch_size=2, iterations=8)
    loop.losses = lambda model, x, t, noise, y: {"loss": next(model.parameters()).mean() * torch.ones(len(x))}
    assert loop.run()
    assert "2 images could not be read and were skipped" in caplog.text and caplog.text.count("skipped /") == 2
    assert torch.equal(images.read(0), images.read(1)) and torch.equal(images.read(7), images.read(4))
    shutil.rmtree(folder / "dog")
    with pytest.raises(InputError, match="no image of .*dog.*can be read"):
        images.read(5)


PARTS = [
    options.TrainConfig(), options.DataOptions(), options.ClassOptions(), options.LossOptions(), options.GridOptions(),
    options.ClassifierRunOptions(), options.SuperResOptions(),
]  # fmt: skip
RUNTIME = words(
    "save_dir microbatch iterations compile deterministic log_interval save_interval sample_interval"
    " eval_interval keep resume resume_checkpoint export export_dtype cache num_workers val_data_dir val_domains"
    " num_samples sample_respacing device use_fp16 classifier_use_fp16 anneal_lr"
)


def test_every_option_that_changes_what_is_learned_is_recorded_and_compared(tmp_path, caplog):
    """A new option is compared, unless it is added to the list above."""
    for name in ("model000001.pt", "opt000001.pt"):
        (tmp_path / name).touch()
    flags = {"image_size": 8, "dropout": 0.0, "timestep_respacing": ""}
    files.write_run(str(tmp_path), flags, PARTS)
    assert not caplog.text
    for at, field in [(at, field) for at, part in enumerate(PARTS) for field in dataclasses.fields(part)]:
        value, changed = getattr(PARTS[at], field.name), copy.deepcopy(PARTS)
        other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"
        object.__setattr__(changed[at], field.name, other)
        caplog.clear()
        if field.name in files.OTHER_TASK:
            with pytest.raises(InputError) as error:
                files.write_run(str(tmp_path), flags, changed, writes=False)
            assert error.value.parameter == field.name
        else:
            files.write_run(str(tmp_path), flags, changed, writes=False)
            assert (f": {field.name} " in caplog.text) == (field.name not in RUNTIME), field.name
    files.write_run(str(tmp_path), {**flags, "dropout": 0.5, "timestep_respacing": "10"}, PARTS, writes=False)
    assert "dropout 0.5 (before 0.0), timestep_respacing '10' (before '')" in caplog.text


def test_other_images_under_the_same_names_are_announced(folder, tmp_path, caplog):
    base = ["--save_dir", tmp_path / "run", *RUN, "--resume", "auto", "--data_dir", folder, "--iterations"]
    train("image_train", *base, 1)
    train("image_train", *base, 2)
    assert "before" not in caplog.text
    shutil.copy(folder / "dog" / "5.png", folder / "cat" / "0.png")
    with open(folder / "cat" / "1.png", "ab") as file:
        file.write(b"\0" * 100)
    train("image_train", *base, 3, "--batch_size", 1)
    assert "another size of the data than before" in caplog.text and "another joint batch" in caplog.text


def test_an_older_run_goes_on_without_the_warm_up_of_its_average(folder, tmp_path):
    make_loop(folder, tmp_path, batch_size=1, iterations=1)[0].run()
    path = tmp_path / "opt000001.pt"
    content = torch.load(path)
    for saved, expected in (({"ema_warmup": True}, True), ({}, False)):
        content["train"] = {**{k: v for k, v in content["train"].items() if k != "ema_warmup"}, **saved}
        torch.save(content, path)
        again, _ = make_loop(folder, tmp_path, batch_size=1)
        again._resume(str(tmp_path / "model000001.pt"))
        assert again.ema_warmup is expected


def test_precision_of_a_cpu_that_emulates_bf16(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "best_precision", lambda device: "fp32")
    runtime._warn_of_emulation.cache_clear()
    cpu = torch.device("cpu")
    assert runtime.pick_precision("auto", cpu) == "fp32" and not caplog.text
    assert [runtime.pick_precision("bf16", cpu) for _ in "ab"] == ["bf16", "bf16"]
    assert caplog.text.count("emulates bf16") == 1
    runtime._warn_of_emulation.cache_clear()
