"""notebooks/quickstart.ipynb: its code runs in its folder, its committed outputs are its own, small and clean."""

import base64
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

# Executes cells as a kernel does, one namespace for all. IPython is not needed: `display` keeps pictures in a folder.
KERNEL = """
import json, sys, types
out, cells = sys.argv[1], json.load(sys.stdin)
shown = []
def display(picture):
    picture.save(f"{out}/{len(shown):02}.png")
    shown.append(picture)
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].display = display
space = {"__name__": "__main__"}
for cell in cells:
    exec(compile(cell, "cell", "exec"), space)
import numpy
def asymmetry(picture):
    pixels = numpy.asarray(picture, float)
    return float(abs(pixels - pixels[:, ::-1]).mean())
fast = space["Translator"](preset="fast", upscale=False)  # the folder has no upscaler
pair = [numpy.asarray(each("ref_imgs/cat_face.png", seed=0), float) for each in (space["own"], fast)]
facts = {
    "picture": space["picture"].size,
    "asymmetry": [asymmetry(space[name]) for name in ("plain", "mirrored")],
    "registered": "mirror" in space["ENERGIES"],
    "difference": float(abs(pair[0] - pair[1]).max()),
}
print("FACTS", json.dumps(facts))
"""


def execute(cells, folder, out):
    """Cells in a process of their own, started in a folder; returns facts about what they made, and its pictures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", KERNEL, out]
    run = subprocess.run(command, cwd=folder, env=environment, input=json.dumps(cells), capture_output=True, text=True,
                         timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.split("FACTS ")[1])
    return facts, [np.asarray(Image.open(path).convert("RGB")) for path in sorted(out.glob("*.png"))]


def committed_pictures():
    """The pictures in the notebook, in order, as arrays."""
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")) for picture in found]


def test_all_cells_run_in_the_notebooks_folder(tmp_path):
    facts, pictures = execute(CODE, ROOT / "notebooks", tmp_path)
    assert facts["picture"] == [256, 256] and facts["registered"]
    plain, mirrored = facts["asymmetry"]
    assert mirrored < 0.9 * plain  # the energy gets what it asks for
    assert facts["difference"] <= 2  # grey levels: the checkpoint and the diffusers folder are the same model
    committed = committed_pictures()
    assert [each.shape for each in pictures] == [each.shape for each in committed]
    # Other machines round otherwise, which the noisy beginnings of a trajectory show most.
    assert np.abs(pictures[0].astype(int) - committed[0]).mean() < 2


def test_committed_outputs_are_whole_small_and_clean():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for cell in CELLS:
        assert not [output for output in cell.get("outputs", []) if output["output_type"] == "error"]
        assert cell["metadata"] == {}
    prose = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users)/", prose)
