"""Write a checkpoint in another format: a diffusers folder, or a .safetensors file that describes itself."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError, display_name, log, one_line
from ..run.files import write_json, write_text
from .diffusers import CONFIG, INDEX, SCHEDULER, WEIGHTS, to_diffusers
from .loading import contiguous, load_model, save_model, write_safetensors
from .reconcile import ModelInfo

TOLERANCE = 2e-5
"""How far the written model's output may be from the original's, relative to the larger of 1 and the largest value."""

README = """---
library_name: diffusers
tags: [unconditional-image-generation, diffusers]
{licence}---

# {title}

Written by SDDM's `scripts/convert.py` from `{source}`. {variance}

```python
from diffusers import DDPMPipeline

image = DDPMPipeline.from_pretrained("{title}")().images[0]
```
"""


def convert(
    model_path: str | os.PathLike, save_dir: str | os.PathLike, *, drop_variance: bool = False, **flags: Any
) -> ModelInfo:
    """Write a model as a diffusers folder, or as our format where `save_dir` ends with .safetensors.

    drop_variance: keep the mean's channels of a model that learned variances. flags: as for `load_model`. The result
    is read back and compared for one input before it gets its name. Raises InputError, also where `save_dir` exists.
    """
    target = os.path.normpath(os.fspath(save_dir))
    parent = os.path.dirname(target) or "."
    if os.path.lexists(target):
        raise InputError("it exists; give another name", parameter="save_dir", value=target)
    if not os.path.isdir(parent):
        raise InputError(f"there is no folder {display_name(parent)}", parameter="save_dir", value=target)
    model, info = load_model(model_path, **flags)
    state, written, channels = dict(model.state_dict()), info, info.flags.get("in_channels", 3)
    if drop_variance and info.flags.get("learn_sigma"):
        last = "out.2" if info.model_type == "ADM" else "conv_out"
        state |= {f"{last}.{end}": state[f"{last}.{end}"][:channels] for end in ("weight", "bias")}
        written = replace(info, flags={**info.flags, "learn_sigma": False})
    elif drop_variance:
        log.info("%s has learned no variance; there is nothing to drop", display_name(info.path))
    texts = {name: text for name, text in info.metadata.items() if name not in ("format", "flags", "model_type")}
    texts |= {"scheduler": json.dumps(info.scheduler)} if info.scheduler else {}
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=parent) as beside:
            partial = os.path.join(beside, os.path.basename(target))
            if target.endswith(".safetensors"):
                save_model(partial, state, model_type=info.model_type, flags=written.flags, metadata=texts)
            else:
                _write_folder(partial, state, written, dropped=written is not info)
            _compare(partial, target, model, info, channels)
            os.rename(partial, target)
    except OSError as error:
        raise InputError(f"it cannot be written: {error.strerror}", parameter="save_dir", value=target) from None
    return info


def _write_folder(folder: str, state: Mapping[str, torch.Tensor], info: ModelInfo, dropped: bool) -> None:
    tensors, config, scheduler, index = to_diffusers(state, info)
    write_json(os.path.join(folder, INDEX), index)
    write_json(os.path.join(folder, "unet", CONFIG), config)
    write_json(os.path.join(folder, "scheduler", SCHEDULER), scheduler)
    write_safetensors(os.path.join(folder, "unet", f"{WEIGHTS}.safetensors"), contiguous(tensors), {"format": "pt"})
    licence = info.metadata.get("license") or info.metadata.get("licence")
    text = README.format(
        licence=f"license: {json.dumps(one_line(licence))}\n" if licence else "",
        title=one_line(os.path.basename(folder)),
        source=one_line(os.path.basename(os.path.normpath(info.path))),
        variance="The variance that it learned was dropped." if dropped else "",
    )
    write_text(os.path.join(folder, "README.md"), text)


def _compare(written: str, target: str, model: torch.nn.Module, info: ModelInfo, channels: int) -> None:
    """Raise InputError unless the written model computes what the original does."""
    if info.model_type == "ENCODER":
        return
    again, _ = load_model(written)
    side = info.flags["image_size"]
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([info.flags["diffusion_steps"] // 2])
    extra = {"y": torch.zeros(1, dtype=torch.long)} if info.flags["class_cond"] else {}
    extra |= {"low_res": x} if info.flags.get("super_res") else {}
    with torch.no_grad():
        before, after = model(x, t, **extra)[:, :channels], again(x, t, **extra)[:, :channels]
    difference = float((after - before).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(before.abs().max())):
        what = f"would differ from the original by {difference:.1e}; it was not written"
        raise InputError(f"{display_name(target)} {what}")
    log.info("%s: read back, it differs from the original by at most %.1e", display_name(target), difference)
