"""The logger: what guided-diffusion's wrote, in its files."""

import csv
import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, and no logger of another test."""
    for variable in [variable for names in dist_util.LAUNCHERS for variable in names[1:]]:
        monkeypatch.delenv(variable, raising=False)
    for variable in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(logger.Logger, "CURRENT", None)


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run(tmp_path, capsys):
    logger.configure(str(tmp_path), ["stdout", "log", "csv", "json"])
    logger.log("hello", 1)
    logger.logkv("step", 0)
    logger.logkv_mean("loss", 1.0)
    logger.logkv_mean("loss", torch.tensor(3.0))
    assert logger.getkvs()["loss"] == 2
    assert logger.dumpkvs() == {"step": 0, "loss": 2}
    logger.logkvs({"step": 1, "loss": 5.0, "extra, new": 2})
    logger.dumpkvs()
    logger.dumpkvs()  # nothing was noted: no row
    assert rows(tmp_path) == [
        {"loss": "2.0", "step": "0", "extra, new": ""}, {"loss": "5.0", "step": "1", "extra, new": "2"}
    ]  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert records == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 5.0, "extra, new": 2}]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "log.txt").read_text()
    assert f"Logging to {tmp_path}\nhello 1\n" in printed
    assert "-------------------\n| loss | 2        |\n| step | 0        |\n-------------------\n" in printed
    assert logger.get_dir() == str(tmp_path)


def test_a_resumed_run_continues_the_table(tmp_path):
    for step, key in ((1, "a"), (2, "b")):
        logger.configure(str(tmp_path), ["csv"])
        logger.logkvs({"step": step, key: 1})
        logger.dumpkvs()
    assert rows(tmp_path) == [{"a": "1", "step": "1", "b": ""}, {"a": "", "step": "2", "b": "1"}]


def test_levels(tmp_path):
    logger.configure(str(tmp_path), ["log"])
    logger.debug("quiet")
    logger.info("heard")
    logger.warn("loud")
    logger.error("louder")
    assert (tmp_path / "log.txt").read_text() == f"Logging to {tmp_path}\nheard\nloud\nlouder\n"


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "new"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    logger.logkv("x", 1)  # the first use configures
    logger.dumpkvs()
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    logger.configure()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["log-rank003.txt", "progress.csv"]


def test_bad_formats_and_folders(tmp_path):
    with pytest.raises(InputError) as caught:
        logger.configure(str(tmp_path), ["xml"])
    assert (caught.value.parameter, caught.value.value) == ("format_strs", "xml")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="dir is .*file'; it cannot be written"):
        logger.configure(str(tmp_path / "file"))


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    with pytest.raises(InputError, match="pip install tensorboard"):
        logger.configure(str(tmp_path), ["tensorboard"])
    writer = Mock()
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Mock(return_value=writer))
    )
    logger.configure(str(tmp_path), ["tensorboard"])
    for step in (1, 2):
        logger.logkvs({"loss": 0.5 * step, "step": torch.tensor(step), "note": "text"})
        logger.dumpkvs()
    calls = [call.args for call in writer.add_scalar.call_args_list]
    assert calls == [("loss", 0.5, 1), ("step", 1.0, 1), ("loss", 1.0, 2), ("step", 2.0, 2)]


def test_a_scope_has_its_own_folder_and_profiles_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    logger.configure(str(tmp_path / "a"), ["csv"])
    with logger.scoped_configure(str(tmp_path / "b"), ["csv"]):
        assert logger.get_dir() == str(tmp_path / "b")
        for _ in range(2):
            with logger.profile_kv("x"):
                logger.logkv("loss", 1)
        assert logger.dumpkvs().keys() == {"loss", "wait_x"}
    assert logger.get_dir() == str(tmp_path / "a") and not logger.getkvs()
