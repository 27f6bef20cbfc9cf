"""What a training run leaves in its folder: checkpoints under guided-diffusion's names, exports, and progress.csv.

A checkpoint of step N is `ema_{rate}_{N:06d}.pt`, `opt{N:06d}.pt` and, written last, `model{N:06d}.pt`: where the
model is, the others are whole. Every file appears at once or not at all.
"""

import csv
import io
import json
import os
import re
import time

import torch

from ..errors import UserError
from ..run.files import write_atomically, write_json
from ..run.record import versions


def write_bytes(path, data):
    """Write a file such that nobody ever sees a part of it, not even after a power cut."""

    def write(file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

    write_atomically(path, write)


def make_folder(folder, flag):
    """Create a folder that is to be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: permission denied; name a folder that can be written to")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint_path(folder, kind, step):
    """File of one part of a checkpoint: kind is `model`, `opt` or `ema_{rate}_`."""
    return os.path.join(folder, f"{kind}{step:06d}.pt")


def parse_resume_step_from_filename(path):
    """The step in a name like model010000.pt; None for any other name."""
    match = re.fullmatch(r"model(\d{6,})\.pt", os.path.basename(path))
    return int(match[1]) if match else None


def saved_steps(folder):
    """Steps of the complete checkpoints in a folder, ascending; [] where there is no folder."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    steps = [parse_resume_step_from_filename(name) for name in names]
    return sorted(step for step in steps if step is not None and f"opt{step:06d}.pt" in names)


def save_checkpoint(folder, step, model_state, ema_states, optimizer_state):
    """Write the files of one checkpoint; ema_states is a dict from the rate, as the flag spells it, to a state dict."""
    states = {f"ema_{rate}_": state for rate, state in ema_states.items()}
    for kind, state in {**states, "opt": optimizer_state, "model": model_state}.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(checkpoint_path(folder, kind, step), buffer.getvalue())


def remove_old_checkpoints(folder, keep):
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for step in saved_steps(folder)[:-keep] if keep else ():
        parts = [name for name in os.listdir(folder) if re.fullmatch(rf"(ema_.*_|opt){step:06d}\.pt", name)]
        # The model goes first: without it the rest is no checkpoint any more.
        for name in (f"model{step:06d}.pt", *parts):
            os.unlink(os.path.join(folder, name))


def load_optimizer_file(path):
    """The content of opt*.pt: an optimizer's state dict, with the entry `train` in files of this project."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated and foreign files raise whatever the unpickler trips over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no optimizer state: {reason[:200]}") from error
    if not isinstance(content, dict) or not {"state", "param_groups"} <= set(content):
        raise UserError(f"{path} is no optimizer state: it lacks the entries state and param_groups")
    return content


def export_model(path, state, metadata, dtype):
    """Write a .safetensors file that `checkpoint.load_model` reads without flags; metadata: dict of texts."""
    from safetensors.torch import save

    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in state.items()
    }
    write_bytes(path, save(tensors, metadata={"format": "pt", **metadata}))


def read_run_flags(folder):
    """Model flags of the run in a folder, from its train.json; {} where there is none."""
    path = os.path.join(folder, "train.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and give all model flags again") from error


def write_run(folder, model_flags, other_flags):
    """Write train.json, the record of a run: its model's flags, all others, and the versions it runs with."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"model": model_flags, "flags": other_flags, "versions": versions(), "started": started}
    write_json(os.path.join(folder, "train.json"), record)


# ---- progress -------------------------------------------------------------------------------------------------------


class ProgressLog:
    """progress.csv, one row per logged step, and the same numbers for TensorBoard where it is installed.

    step: where the run starts; later rows, which a killed run may have left, are dropped.
    """

    def __init__(self, folder, step, tensorboard=None):
        self.path = os.path.join(folder, "progress.csv")
        self.rows = [row for row in self._read() if int(row["step"]) <= step]
        self.columns = list(self.rows[0]) if self.rows else []
        self._rewrite()
        self.tensorboard = (
            tensorboard(os.path.join(folder, "tensorboard"), purge_step=step + 1) if tensorboard else None
        )

    def _read(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval=None))
        # A kill can cut the last row off in the middle.
        return [row for row in rows if None not in row.values() and row.get("step", "").isdecimal()]

    def write(self, row):
        """Add a row: a dict of numbers by column, among them `step`."""
        self.rows.append({name: _text(value) for name, value in row.items()})
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(self.rows[-1])
        if self.tensorboard:
            for name, value in row.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, row["step"])

    def _rewrite(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if self.columns:
            writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())

    def close(self):
        """Flush what TensorBoard has not written yet."""
        if self.tensorboard:
            self.tensorboard.close()


def _text(value):
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def find_tensorboard():
    """TensorBoard's SummaryWriter, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
