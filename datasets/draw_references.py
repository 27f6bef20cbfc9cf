"""Draw the demo's reference pictures: flat, emoji-like motifs on white, our own designs.

    python datasets/draw_references.py [--out ref_imgs] [--size 256]

Every picture is a list of filled shapes in a 256 x 256 plane (x to the right, y downwards). A shape is a closed
polygon, a list of (x, y); curves are sampled finely. Pictures are rasterised at SUPERSAMPLING times their size and
reduced with a Lanczos filter. Nothing is random: the same Pillow version always writes the same bytes.

The motifs are made for a model that sees 64 x 64 pixels: they fill the frame, use two to seven flat colours, and have
no outlines, no thin lines and no gradients.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from PIL import Image, ImageChops, ImageDraw

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError
from guided_diffusion.options import check, option

PLANE = 256  # side of the plane in which the shapes below are given
SUPERSAMPLING = 8
SMALLEST, LARGEST = 16, 1024  # --size; drawing the largest takes 0.5 GB of memory

WHITE = "#ffffff"
INK = "#3a2a2e"
YELLOW = "#ffc933"
ORANGE = "#ff9a2e"
RED = "#f0323c"
DARK_RED = "#a81c2c"
PINK = "#ff8fa3"
ROSE = "#f25c78"
GREEN = "#4cb944"
DARK_GREEN = "#2b8a3e"
BLUE = "#2f8df0"
DARK_BLUE = "#1c5fc4"
SKY = "#bfe6ff"
BROWN = "#8a5230"
CREAM = "#fff0d6"


class Canvas:
    """A white square picture of `size` pixels on which polygons of the 256 x 256 plane are filled in turn."""

    def __init__(self, size):
        self.size = size
        self.scale = size * SUPERSAMPLING / PLANE
        side = size * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), WHITE)

    def fill(self, shape, colour, within=None):
        """Fill the polygon `shape` with `colour`; with `within`, only the part that lies inside that polygon too."""
        if within is None:
            ImageDraw.Draw(self.image).polygon(self._pixels(shape), fill=colour)
            return
        self.image.paste(colour, mask=ImageChops.darker(self._mask(shape), self._mask(within)))

    def fill_both(self, shape, colour, within=None):
        """Fill `shape` and its mirror image about the vertical axis of the plane."""
        self.fill(shape, colour, within)
        self.fill(mirrored(shape), colour, within)

    def finished(self):
        """The antialiased picture, an RGB image of size x size."""
        return self.image.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _pixels(self, shape):
        return [(x * self.scale, y * self.scale) for x, y in shape]

    def _mask(self, shape):
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon(self._pixels(shape), fill=255)
        return mask


# Shapes: each function returns a polygon.


def ellipse(cx, cy, rx, ry, turn=0, start=0, end=360):
    """An ellipse, or the segment of it that a chord cuts off.

    `turn` turns it clockwise, in degrees; `start` and `end` are angles in degrees from the x axis, clockwise.
    """
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    steps = 180
    points = []
    for k in range(steps + 1):
        angle = math.radians(start + (end - start) * k / steps)
        x, y = rx * math.cos(angle), ry * math.sin(angle)
        points.append((cx + cos * x - sin * y, cy + sin * x + cos * y))
    return points


def circle(cx, cy, radius):
    return ellipse(cx, cy, radius, radius)


def bezier(start, control_1, control_2, end, steps=48):
    """Points of the cubic Bezier curve, both ends included."""
    points = []
    for k in range(steps + 1):
        t = k / steps
        weights = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        corners = start, control_1, control_2, end
        points.append(tuple(sum(w * c[axis] for w, c in zip(weights, corners)) for axis in (0, 1)))
    return points


def smooth(corners):
    """A closed curve through all `corners`, tangent at each to the chord of its neighbours (Catmull-Rom spline)."""
    n = len(corners)
    points = []
    for k in range(n):
        before, a, b, after = (corners[(k + offset) % n] for offset in (-1, 0, 1, 2))
        control_1 = a[0] + (b[0] - before[0]) / 6, a[1] + (b[1] - before[1]) / 6
        control_2 = b[0] - (after[0] - a[0]) / 6, b[1] - (after[1] - a[1]) / 6
        points += bezier(a, control_1, control_2, b)[:-1]
    return points


def rounded(corners, radius):
    """A polygon whose corners are rounded, each from `radius` before it to `radius` behind it (at most half a side)."""
    n = len(corners)
    points = []
    for k in range(n):
        corner = corners[k]
        enter = _towards(corner, corners[k - 1], radius)
        leave = _towards(corner, corners[(k + 1) % n], radius)
        # Control points at 0.55 of the way to the corner: nearly a circular arc where the corner is a right angle.
        points += bezier(enter, _mix(enter, corner, 0.55), _mix(leave, corner, 0.55), leave, steps=24)
    return points


def box(left, top, right, bottom, radius):
    """An axis-parallel rectangle with rounded corners."""
    return rounded([(left, top), (right, top), (right, bottom), (left, bottom)], radius)


def band(curve, width):
    """A stroke of the given width along an open curve, with round ends."""
    left, right = [], []
    for k, (x, y) in enumerate(curve):
        dx = curve[min(k + 1, len(curve) - 1)][0] - curve[max(k - 1, 0)][0]
        dy = curve[min(k + 1, len(curve) - 1)][1] - curve[max(k - 1, 0)][1]
        length = math.hypot(dx, dy)
        nx, ny = -dy / length * width / 2, dx / length * width / 2
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    return left + _cap(left[-1], right[-1]) + right[::-1] + _cap(right[0], left[0])


def mirrored(shape):
    return [(PLANE - x, y) for x, y in shape]


def turned(shape, degrees, cx=128, cy=128):
    """`shape` turned clockwise about (cx, cy)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(cx + cos * (x - cx) - sin * (y - cy), cy + sin * (x - cx) + cos * (y - cy)) for x, y in shape]


def _mix(a, b, share):
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def _towards(a, b, distance):
    return _mix(a, b, min(distance / math.hypot(b[0] - a[0], b[1] - a[1]), 0.5))


def _cap(a, b):
    """Points of the half circle from a to b that bulges to the side on which a band ends."""
    cx, cy = _mix(a, b, 0.5)
    return [turned([a], -180 * k / 16, cx, cy)[0] for k in range(1, 16)]


# Pictures: each function draws one motif on a canvas.


def smiling_face(canvas):
    mouth = ellipse(128, 140, 70, 76, start=0, end=180)
    canvas.fill(circle(128, 128, 119), YELLOW)
    canvas.fill_both(ellipse(46, 142, 21, 16), ORANGE)
    canvas.fill_both(ellipse(86, 92, 17, 25), INK)
    canvas.fill(rounded(mouth[::12], 8), DARK_RED)
    canvas.fill(box(68, 130, 188, 162, 8), WHITE, within=rounded(mouth[::12], 8))
    canvas.fill(ellipse(128, 214, 44, 30), RED, within=rounded(mouth[::12], 8))


def cat_face(canvas):
    fur, stripe = "#ffab40", "#e2711d"
    head = smooth(
        [
            (128, 42),
            (190, 54),
            (238, 112),
            (244, 174),
            (204, 228),
            (128, 244),
            (52, 228),
            (12, 174),
            (18, 112),
            (66, 54),
        ]
    )
    canvas.fill_both(rounded([(34, -4), (128, 62), (8, 150)], 26), fur)
    canvas.fill_both(rounded([(43, 30), (96, 66), (32, 110)], 16), PINK)
    canvas.fill(head, fur)
    canvas.fill(band([(128, 30), (128, 80)], 20), stripe, within=head)
    canvas.fill_both(band([(90, 36), (96, 70)], 18), stripe, within=head)
    canvas.fill_both(band([(0, 150), (36, 154)], 18), stripe, within=head)
    canvas.fill_both(band([(8, 190), (46, 184)], 18), stripe, within=head)
    canvas.fill_both(ellipse(76, 126, 21, 26), INK)
    canvas.fill(circle(69, 116, 8), WHITE)
    canvas.fill(circle(173, 116, 8), WHITE)
    canvas.fill_both(ellipse(99, 190, 38, 33), WHITE)
    canvas.fill(ellipse(128, 208, 28, 20), WHITE)
    canvas.fill(rounded([(102, 154), (154, 154), (128, 186)], 12), ROSE)
    canvas.fill_both(band(bezier((128, 182), (128, 206), (106, 214), (90, 200)), 11), INK)


def dog_face(canvas):
    fur, ear = "#d9934a", "#7b4526"
    canvas.fill(
        smooth(
            [
                (128, 14),
                (188, 32),
                (214, 96),
                (218, 168),
                (184, 226),
                (128, 242),
                (72, 226),
                (38, 168),
                (42, 96),
                (68, 32),
            ]
        ),
        fur,
    )
    canvas.fill_both(smooth([(80, 16), (88, 44), (62, 92), (58, 150), (34, 172), (12, 148), (10, 92), (34, 36)]), ear)
    canvas.fill(
        smooth(
            [
                (128, 20),
                (146, 60),
                (156, 120),
                (190, 150),
                (196, 190),
                (166, 222),
                (128, 230),
                (90, 222),
                (60, 190),
                (66, 150),
                (100, 120),
                (110, 60),
            ]
        ),
        CREAM,
    )
    canvas.fill_both(ellipse(84, 108, 18, 22), INK)
    canvas.fill(circle(78, 100, 7), WHITE)
    canvas.fill(circle(166, 100, 7), WHITE)
    canvas.fill(box(106, 180, 150, 250, 22), ROSE)
    canvas.fill_both(band(bezier((128, 176), (126, 202), (96, 208), (82, 190)), 10), INK)
    canvas.fill(smooth([(128, 136), (158, 140), (162, 158), (128, 184), (94, 158), (98, 140)]), INK)


def frog_face(canvas):
    head = smooth(
        [
            (128, 58),
            (206, 72),
            (246, 136),
            (238, 196),
            (188, 234),
            (128, 242),
            (68, 234),
            (18, 196),
            (10, 136),
            (50, 72),
        ]
    )
    canvas.fill_both(circle(64, 62, 50), GREEN)
    canvas.fill(head, GREEN)
    canvas.fill(ellipse(128, 244, 100, 56), "#b8e986", within=head)
    canvas.fill_both(circle(64, 62, 36), WHITE)
    canvas.fill_both(circle(68, 64, 22), INK)
    canvas.fill_both(ellipse(40, 156, 21, 17), PINK)
    canvas.fill_both(ellipse(112, 116, 7, 9), DARK_GREEN)
    canvas.fill(band(bezier((70, 148), (90, 196), (166, 196), (186, 148)), 15), INK)


def fish(canvas):
    body = smooth([(6, 132), (46, 78), (110, 56), (170, 84), (212, 132), (170, 180), (110, 208), (46, 186)])
    canvas.fill(
        smooth([(182, 132), (212, 74), (244, 50), (250, 70), (236, 132), (250, 194), (244, 214), (212, 190)]), ORANGE
    )
    canvas.fill(smooth([(70, 84), (88, 28), (138, 10), (180, 30), (172, 60), (164, 104)]), ORANGE)
    canvas.fill(smooth([(84, 184), (94, 232), (134, 250), (164, 232), (152, 176)]), ORANGE)
    canvas.fill(body, BLUE)
    canvas.fill(band(bezier((104, 30), (124, 90), (124, 174), (104, 234)), 26), YELLOW, within=body)
    canvas.fill(band(bezier((164, 50), (182, 104), (182, 160), (164, 214)), 22), YELLOW, within=body)
    canvas.fill(circle(62, 116, 24), WHITE)
    canvas.fill(circle(58, 117, 15), INK)


def apple(canvas):
    half = (
        bezier((128, 80), (94, 48), (14, 50), (12, 138))
        + bezier((12, 138), (12, 204), (62, 256), (98, 248))
        + bezier((98, 248), (110, 246), (118, 242), (128, 242))
    )
    canvas.fill(half + mirrored(half)[::-1], RED)
    canvas.fill(ellipse(56, 122, 16, 34, turn=24), "#ff8a80")
    canvas.fill(band(bezier((128, 98), (128, 66), (120, 42), (106, 22)), 19), BROWN)
    canvas.fill(
        bezier((136, 66), (134, 12), (176, -4), (228, 8)) + bezier((228, 8), (222, 60), (184, 84), (136, 66)), GREEN
    )


def watermelon(canvas):
    def wedge(radius, rounding):
        arc = ellipse(128, 2, radius, radius, start=59, end=121)
        return rounded([(128, 2), *arc[::20]], rounding)

    whole = wedge(246, 12)
    canvas.fill(whole, DARK_GREEN)
    canvas.fill(wedge(214, 0), "#d6f5a8", within=whole)
    canvas.fill(wedge(198, 0), "#fb4a59", within=whole)
    seed = smooth([(128, 54), (138, 75), (128, 86), (118, 75)])
    for degrees, distance in ((0, 0), (-14, 48), (14, 48), (-18, 98), (0, 94), (18, 98)):
        canvas.fill(turned([(x, y + distance) for x, y in seed], degrees, 128, 2), INK)


def heart(canvas):
    half = bezier((118, 240), (40, 188), (8, 142), (8, 90)) + bezier((8, 90), (8, 4), (104, -8), (128, 56))
    tip = bezier((138, 240), (132, 245), (124, 245), (118, 240))
    canvas.fill(half + mirrored(half)[::-1] + tip, RED)
    canvas.fill(ellipse(62, 76, 20, 34, turn=38), "#ff8a92")


def house(canvas):
    canvas.fill(box(178, 22, 216, 116, 6), BROWN)
    canvas.fill(box(32, 96, 224, 248, 10), "#ffdf9e")
    canvas.fill(rounded([(128, 0), (254, 124), (240, 140), (16, 140), (2, 124)], 18), "#ef5234")
    canvas.fill(box(54, 168, 110, 248, 8), BROWN)
    canvas.fill(circle(94, 210, 7), YELLOW)
    canvas.fill(box(134, 160, 204, 218, 8), WHITE)
    canvas.fill(box(143, 169, 195, 209, 4), "#4fb0ff")


def car(canvas):
    canvas.fill(rounded([(46, 150), (70, 22), (182, 22), (228, 150)], 36), BLUE)
    canvas.fill(rounded([(68, 114), (84, 48), (122, 48), (122, 114)], 10), SKY)
    canvas.fill(rounded([(142, 114), (142, 48), (172, 48), (200, 114)], 10), SKY)
    canvas.fill(rounded([(4, 112), (226, 108), (252, 136), (252, 208), (4, 208)], 24), BLUE)
    canvas.fill(box(4, 176, 252, 212, 17), DARK_BLUE)
    canvas.fill(box(222, 130, 252, 162, 12), YELLOW)
    canvas.fill(box(4, 130, 24, 162, 9), RED)
    canvas.fill_both(circle(66, 198, 44), INK)
    canvas.fill_both(circle(66, 198, 19), "#dfe4ea")


def flower(canvas):
    for k in range(6):
        canvas.fill(turned(ellipse(128, 60, 46, 56), 60 * k), "#ff6fae")
    for k in range(6):
        canvas.fill(turned(ellipse(128, 78, 18, 36), 60 * k), "#d93a86")
    canvas.fill(circle(128, 128, 44), YELLOW)
    canvas.fill(circle(128, 128, 22), ORANGE)


def star(canvas):
    def points(radius, rounding):
        corners = []
        for k in range(10):
            distance = radius if k % 2 == 0 else radius * 0.53
            angle = math.radians(36 * k - 90)
            corners.append((128 + distance * math.cos(angle), 138 + distance * math.sin(angle)))
        return rounded(corners, rounding)

    canvas.fill(points(140, 26), "#ffb31a")
    canvas.fill(points(92, 18), "#ffdb4d")


def mushroom(canvas):
    cap = smooth(
        [(128, 6), (200, 26), (246, 90), (248, 140), (212, 158), (128, 164), (44, 158), (8, 140), (10, 90), (56, 26)]
    )
    canvas.fill(
        smooth([(90, 140), (166, 140), (172, 190), (190, 232), (160, 249), (96, 249), (66, 232), (84, 190)]), "#f7d9a8"
    )
    canvas.fill(ellipse(128, 156, 48, 22), "#d9a566")
    canvas.fill(cap, RED)
    canvas.fill(circle(108, 64, 32), WHITE)
    canvas.fill(circle(192, 92, 24), WHITE)
    canvas.fill(circle(42, 114, 20), WHITE)
    canvas.fill(circle(128, 132, 17), WHITE)


def ice_cream(canvas):
    cone = rounded([(40, 132), (216, 132), (140, 252), (116, 252)], 10)
    canvas.fill(cone, "#f5b04c")
    for offset in (-48, 0, 48):
        canvas.fill_both(band([(offset + 58, 110), (offset + 158, 260)], 11), "#cf7f2e", within=cone)
    canvas.fill(circle(74, 110, 62), "#ff8fb8")
    canvas.fill(circle(182, 110, 62), "#6fd8b8")
    canvas.fill(circle(128, 82, 56), "#ffe08f")
    canvas.fill(circle(128, 27, 21), RED)


PICTURES = {
    "smiling_face": smiling_face,
    "cat_face": cat_face,
    "dog_face": dog_face,
    "frog_face": frog_face,
    "fish": fish,
    "apple": apple,
    "watermelon": watermelon,
    "heart": heart,
    "house": house,
    "car": car,
    "flower": flower,
    "star": star,
    "mushroom": mushroom,
    "ice_cream": ice_cream,
}


def draw(name, size=PLANE):
    """The picture called `name`, an RGB image of size x size pixels."""
    canvas = Canvas(size)
    PICTURES[name](canvas)
    return canvas.finished()


def write_pictures(folder, size=PLANE):
    """Write every picture as `<name>.png` into `folder`, which is made where it is missing, and return the paths.

    Raises InputError where the folder or a file in it cannot be written.
    """
    paths = [Path(folder) / f"{name}.png" for name in PICTURES]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, path in zip(PICTURES, paths):
            draw(name, size).save(path, optimize=True)
    except OSError as error:
        reason = f"cannot write {error.filename or 'there'} ({error.strerror or error})"
        raise InputError(f"{reason}; give a writable folder", parameter="out", value=folder) from error
    return paths


@dataclass(frozen=True)
class Options:
    """Where the pictures go, and their size."""

    out: str = option("ref_imgs", "folder of the PNG files, made where it is missing", metavar="DIR")
    size: int = option(PLANE, "side of the square pictures in pixels", least=SMALLEST, most=LARGEST)

    def __post_init__(self) -> None:
        check(self)
        if not self.out:
            raise InputError("give the folder that the pictures go to", parameter="out", value=self.out)


def create_parser() -> Parser:
    parser = Parser("Draw the demo's reference pictures.")
    parser.usage = "python datasets/%(prog)s [flags]"
    parser.add(Options, title="output")
    return parser


def main(given: Given) -> None:
    options = given.options(Options)
    paths = write_pictures(options.out, options.size)
    size = f"{options.size} x {options.size}"
    command.say(f"{len(paths)} pictures of {size} pixels in {options.out}", sys.stdout)


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
