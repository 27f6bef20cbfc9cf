"""Serve the page: its flags, its port, its environment, and the command that it shows."""

import contextlib
import errno
import filecmp
import hashlib
import logging
import os
import shlex
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError, first_line
from ..options import Checked, option
from ..presets import ROOT
from .main import say

if TYPE_CHECKING:
    from ..web.page import Upload
    from ..web.translate import Settings


@dataclass(frozen=True)
class WebOptions(Checked):
    """Where the page is served, and what it offers."""

    port: int = option(7860, "port of the page; 0 for any free port", least=0, most=65535)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all network interfaces", metavar="ADDRESS")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto")
    precision: str = option("fp32", "default precision of the page", choices=("fp32", "bf16", "fp16", "auto"))
    examples: str = option("ref_imgs", "folder of example images; none for no examples", metavar="FOLDER")
    max_side: int = option(4096, "maximum height and width of uploaded images", least=1)


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises InputError where it is in use or the address is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            reason = f"the page cannot be served there ({first_line(error)})"
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(f"{reason}; 0 chooses a free port", parameter="port", value=port) from None
            raise InputError(reason, parameter="host", value=host) from None
        return probe.getsockname()[1]


def warn_of_strangers(host: str) -> None:
    """One line where others than this machine's users can reach the page."""
    if not host.startswith(("127.", "localhost", "::1", "[::1]")):
        say(f"warning: with --host {host}, anyone on the network can use this page; it has no login")


@contextlib.contextmanager
def private_environment(offline: bool) -> Iterator[str]:
    """Set Gradio's environment before its import: no telemetry, a temporary folder; offline: no Hugging Face Hub."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("NO_PROXY", "no_proxy"):  # Gradio looks at its own page first
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1,::1"]))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
    with tempfile.TemporaryDirectory(prefix="sddm_page_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield folder


def command_line(
    model: str, picture: "Upload", settings: "Settings", *, root: str = ROOT, examples: str | None = None,
    device: str = "auto",
) -> str:  # fmt: skip
    """The command that gives the page's pixels, for a shell in the folder `root`; several seeds are a loop.

    A picture of the folder `examples` is given by its path, others by their name.
    """
    path, name = os.path.join(examples, picture.name) if examples else "", picture.name
    if os.path.isfile(path) and filecmp.cmp(path, picture.path, shallow=False):
        name = _seen_from(root, path)
    flags = {"model_path": _seen_from(root, model), "base_samples": f"./{name}" if name.startswith("-") else name}
    flags_of = {"steps": "timestep_respacing", "start": "start_t", "details": "details_t"}
    usual = {"start": 1, "details": 1, "variant": "manifold", "sampler": "ancestral", "precision": "fp32"}
    usual |= {"class_index": None, "device": "auto"}
    for setting, value in {**vars(settings), "device": device}.items():
        if setting not in ("seed", "count") and (setting not in usual or usual[setting] != value):
            flags[flags_of.get(setting, setting)] = f"{value:g}" if isinstance(value, float) else str(value)
    text = " ".join(f"--{flag} {shlex.quote(value)}" for flag, value in flags.items())
    # A folder of its own, since the command refuses one that holds a run with other flags.
    folder = f"output/web_{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    seed = settings.seed if settings.count == 1 else "$seed"
    run = f"python scripts/ae_sample.py {text} --seed {seed} --save_dir {folder}_{seed}"
    return run if settings.count == 1 else f"for seed in {' '.join(map(str, settings.seeds))}; do {run}; done"


def _seen_from(root: str, path: str) -> str:
    """A path relative to a folder that holds it, else absolute; what is no file, such as a Hub id, as it is."""
    if not os.path.exists(path):
        return path
    relative = os.path.relpath(path, root)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative
