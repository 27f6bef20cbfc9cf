"""Make the pictures of docs/ and the table of presets in docs/usage.md again.

examples:
  python docs/make.py
  python docs/make.py presets
  python docs/make.py range_t_area demo --model_path output/target/model.safetensors
"""

import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

from PIL import Image, ImageDraw, ImageFont

from guided_diffusion import Translator
from guided_diffusion.checkpoint import load_model
from guided_diffusion.cli.flags import Given, Parser, preset_flags
from guided_diffusion.errors import InputError, fitting
from guided_diffusion.options import Checked, option
from guided_diffusion.presets import PRESETS, preset_options
from guided_diffusion.run.files import write_bytes, write_text
from guided_diffusion.runtime import pick_device
from guided_diffusion.training.config import GridOptions
from guided_diffusion.training.loop import grid_sampler
from guided_diffusion.training.start import Start

WIDTH, GAP, TEXT = 800, 4, 15  # pixels; 800 is the width of GitHub's pages
LARGEST = 450_000
SHOWN = ("cat_face", "dog_face", "fish", "frog_face", "mushroom", "watermelon")  # in demo.png
AREAS, SHARES = (32, 16, 8, 4), (0.1, 0.2, 0.3, 0.4, 0.5)
SAMPLES = 50  # of samples.png
INK, PAPER = "#222222", "white"
TABLE = re.compile(r"(<!-- presets: made by docs/make\.py -->\n).*?(<!-- end of presets -->)", re.DOTALL)


@dataclass(frozen=True)
class Pictures(Checked):
    """Options of the pictures."""

    preset: str = option("emoji", "recommended flags by name", metavar="NAME")
    model_path: str | None = option(None, "another model than the preset's", metavar="PATH")
    base_samples: str = option(str(ROOT / "ref_imgs"), "drawings to translate", metavar="DIR")
    drawing: str = option("cat_face.png", "the drawing of range_t_area.png", metavar="NAME")
    steps: int | None = option(None, "another number of steps than the preset's, for a trial", least=1)
    seed: int = option(0, "seed of the noise")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", metavar="NAME")
    out: str = option(str(ROOT / "docs"), "folder for the pictures", metavar="DIR")

    def translator(self, **options: object) -> Translator:
        """The preset's translator with other options."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return Translator(self.model_path, preset=self.preset, device=self.device, **{**steps, **options})

    def drawings(self) -> list[Path]:
        """All drawings, by name."""
        return sorted(Path(self.base_samples).glob("*.png"))


class Sheet:
    """A white picture for cells with captions."""

    def __init__(self, height: int, width: int = WIDTH) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def picture(self, picture: Image.Image, left: float, top: float, side: int) -> None:
        """A picture in a cell, enlarged or reduced."""
        self.image.paste(
            picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (round(left), round(top))
        )

    def text(self, text: str, x: float, y: float, anchor: str = "ma", size: int = TEXT) -> None:
        """A text at a point; anchor: as Pillow's, "ma" for centred below it."""
        self.draw.text((x, y), text, INK, ImageFont.load_default(size), anchor)

    def save(self, path: str) -> None:
        """A PNG of at most about LARGEST bytes: with all colours where that suffices, else with 256, dithered."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", optimize=True)
        if buffer.tell() > LARGEST:
            buffer = io.BytesIO()
            palette = self.image.quantize(256)
            self.image.quantize(palette=palette).save(buffer, "PNG", optimize=True)
        write_bytes(path, buffer.getvalue())


def range_t_area(options: Pictures) -> Sheet:
    """One drawing over both flags: rows of blocks, columns of T0."""
    label, side = 62, 118
    source = Path(options.base_samples) / options.drawing
    left, top = side + 2 * GAP + label, 2 * TEXT + 24
    sheet = Sheet(top + len(AREAS) * (side + GAP) + TEXT + 14)
    middle = top + (len(AREAS) * (side + GAP) - side) / 2
    with Image.open(source) as image:
        sheet.picture(image, 0, middle, side)
    sheet.text("the drawing", side / 2, middle + side + 6)
    centre = left + len(SHARES) * (side + GAP) / 2
    sheet.text("range_t: how early guidance ends. Larger: more realistic, further from the drawing", centre, 2)
    sheet.text(
        "area: blocks a side whose colours follow the drawing. Smaller: freer", centre, sheet.image.height - TEXT - 6
    )
    for column, share in enumerate(SHARES):
        sheet.text(f"{share:g}", left + column * (side + GAP) + side / 2, TEXT + 14)
    for row, area in enumerate(AREAS):
        y = top + row * (side + GAP)
        sheet.text(f"area {area}", left - 8, y + side / 2, "rm")
        for column, share in enumerate(SHARES):
            made = options.translator(area=area, range_t=share, details=None)(source, seed=options.seed)
            sheet.picture(made, left + column * (side + GAP), y, side)
    return sheet


def pairs(
    options: Pictures, title: str, side: int, columns: int, names: Sequence[str] = (), **changed: object
) -> Sheet:
    """Every drawing, or those with the names, with its translation beside it."""
    drawings = [path for path in options.drawings() if not names or path.stem in names]
    columns = min(columns, len(drawings))
    top, rows = TEXT + 12, -(-len(drawings) // columns)
    sheet = Sheet(top + rows * (side + GAP), 2 * columns * (side + GAP))
    translate = options.translator(**changed)
    for column in range(columns):
        for half, name in enumerate(("drawing", title)):
            sheet.text(name, (2 * column + half) * (side + GAP) + side / 2, 4)
    for n, (path, made) in enumerate(zip(drawings, translate(drawings, seed=options.seed))):
        x, y = n % columns * 2 * (side + GAP), top + n // columns * (side + GAP)
        with Image.open(path) as image:
            sheet.picture(image, x, y, side)
        sheet.picture(made, x + side + GAP, y, side)
    return sheet


def samples(options: Pictures) -> Sheet:
    """Samples of the model without a reference."""
    columns = 10
    side = WIDTH // columns - GAP
    path = options.model_path or preset_options(options.preset, "sddm")["model_path"]
    network, info = load_model(path, device=pick_device(options.device))
    grid = GridOptions(num_samples=SAMPLES, sample_respacing=str(options.steps or 100))
    draw = grid_sampler(Start(network, info.model_type, info.flags), grid, options.seed)
    sheet = Sheet(-(-SAMPLES // columns) * (side + GAP))
    for n, picture in enumerate(draw(network)):
        place = n % columns * (side + GAP), n // columns * (side + GAP)
        sheet.picture(Image.fromarray(picture), *place, side)
    return sheet


def presets_table() -> str:
    """The table of presets, in Markdown."""
    lines = ["| preset | for | sets |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        words = [word.removeprefix(str(ROOT) + os.sep) for word in preset_flags(name, "sddm")]
        lines.append(f"| `{name}` | {preset.about} | `{' '.join(words)}` |")
    return "\n".join(lines) + "\n"


def with_presets(text: str) -> str:
    """A document with its table of presets up to date."""
    return TABLE.sub(lambda match: match[1] + presets_table() + match[2], text)


SHEETS = {
    "range_t_area": range_t_area,
    "demo": partial(pairs, title="3D", side=256, columns=2, names=SHOWN),  # at the size that the demo gives
    "half_schedule": partial(pairs, title="T0 = 0.5 T", side=96, columns=4, range_t=0.5, details=None),
    "samples": samples,
}


def make(given: Given) -> int:
    options = given.options(Pictures)
    for name in given.names or ("presets", *SHEETS):
        if name == "presets":
            page = ROOT / "docs" / "usage.md"
            write_text(str(page), with_presets(page.read_text(encoding="utf-8")))
        elif name in SHEETS:
            SHEETS[name](options).save(os.path.join(options.out, f"{name}.png"))
        else:
            raise InputError(fitting(name, ["presets", *SHEETS]), parameter="names", value=name)
        command.say(f"{name} is made", sys.stdout)
    return command.DONE


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="[NAME ...] [flags]")
    parser.usage = "python docs/make.py [NAME ...] [flags]"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to make: presets, {', '.join(SHEETS)} (all)")
    parser.add(Pictures, title="pictures")
    return parser


if __name__ == "__main__":
    command.run(make, create_parser(), ranks="none")
