"""Reading references: formats and modes to exact pixels, names and folders, and everything that can be wrong."""

import errno
import hashlib
import io
import os
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion import references as references_module
from guided_diffusion.errors import InputError, display_name
from guided_diffusion.image_datasets import (
    ImageError,
    Reference,
    find_collisions,
    list_references,
    load_image,
    to_tensor,
    to_uint8,
)

# Pillow warns about damaged TIFF tags before it raises.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SIZE = 16
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 200, 0), (0, 0, 255), (250, 240, 40)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
COLOURS = (RED, GREEN, BLUE, YELLOW)
GREYS = (0, 85, 170, 255)


def quadrants(values, size=SIZE):
    """[size, size, ...]: the four values in reading order, each filling a quarter."""
    values = np.asarray(values)
    index = np.arange(size) * 2 // size
    return values[2 * index[:, None] + index[None, :]]


def rgb(*colours, size=SIZE):
    return quadrants(np.array(colours, np.uint8), size)


def grey(*levels):
    return np.repeat(quadrants(np.array(levels, np.uint8))[..., None], 3, axis=-1)


def encode(image, form, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(raw, width, height, depth, colour_type, transparent=None):
    """A PNG from unfiltered samples: what Pillow does not write (2 bits, 16-bit colour, tRNS at these depths)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(raw) // height
    lines = b"".join(b"\0" + raw[row * stride : (row + 1) * stride] for row in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def tiff(data, bits, photometric=1, sample_format=1, width=SIZE, height=SIZE):
    """An uncompressed one-strip greyscale TIFF."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def palette_image(indices=(0, 1, 2, 3)):
    image = Image.fromarray(quadrants(np.array(indices, np.uint8)))
    image.putpalette(sum(COLOURS, ()))
    assert image.mode == "P"
    return image


def with_alpha(alphas):
    return np.dstack([rgb(*COLOURS), quadrants(np.array(alphas, np.uint8))])


def cmyk():
    """Red, green of level 200, blue and black, which CMYK's conversion 255 - min(255, C + K) keeps exactly."""
    inks = np.array([(0, 255, 255, 0), (255, 55, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)], np.uint8)
    return Image.frombytes("CMYK", (SIZE, SIZE), quadrants(inks).tobytes())


def over(alpha, colour, background):
    return tuple(round((c * alpha + b * (255 - alpha)) / 255) for c, b in zip(colour, background))


LEVELS16 = np.array([0, 21845, 43690, 65535], np.uint16)  # 0, 85, 170, 255 times 257
LEVELS_NEAR = np.array([128, 129, 65406, 65407], np.uint16)  # 0.498, 0.502, 254.498, 254.502 of 255
EXACT, LOSSY = 0, 6


TWO_BITS = bytes([0x00, 0x00, 0x55, 0x55] * 8 + [0xAA, 0xAA, 0xFF, 0xFF] * 8)
TWELVE_BITS = bytes([0x00] * 12 + [0x55] * 12) * 8 + bytes([0xAA] * 12 + [0xFF] * 12) * 8
DEEP_COLOURS = (rgb(*COLOURS) * np.uint16(256) + np.uint16(7)).astype(">u2").tobytes()
SEEN_THROUGH = rgb(RED, WHITE, over(128, BLUE, WHITE), over(64, YELLOW, WHITE))


def floats(*values):
    return tiff(quadrants(np.float32(values)).tobytes(), 32, sample_format=3)


# name, the file, the pixels it must give at size 16, and a tolerance in grey levels unless they are exact
# fmt: off
FORMATS = [
    ("png palette, alpha per entry",
     encode(palette_image(), "PNG", transparency=bytes([255, 0, 128, 64])), SEEN_THROUGH, 1),
    ("png 2 bits, a transparent level", png(TWO_BITS, SIZE, SIZE, 2, 0, [1]), grey(0, 255, 170, 255)),
    ("png 16-bit grey rounds to the nearest level", encode(quadrants(LEVELS_NEAR), "PNG"), grey(0, 1, 254, 255)),
    ("png 16-bit grey, one transparent",
     png(quadrants(LEVELS16).astype(">u2").tobytes(), SIZE, SIZE, 16, 0, [21845]), grey(0, 255, 170, 255)),
    ("png 16-bit rgb, one transparent",
     png(DEEP_COLOURS, SIZE, SIZE, 16, 2, [7, 200 * 256 + 7, 7]), rgb(RED, WHITE, BLUE, YELLOW)),
    ("jpeg cmyk, inverted as Adobe does", encode(cmyk(), "JPEG", quality=95), rgb(RED, GREEN, BLUE, BLACK), LOSSY),
    ("webp rgba", encode(with_alpha([255, 0, 128, 64]), "WEBP", lossless=True, exact=True), SEEN_THROUGH, 1),
    ("tiff 16-bit grey, white is zero", tiff(quadrants(LEVELS16).tobytes(), 16, photometric=0), grey(*GREYS[::-1])),
    ("tiff 12-bit grey", tiff(TWELVE_BITS, 12), grey(*GREYS)),
    ("tiff 32-bit integers in 16-bit range", tiff(quadrants(LEVELS16).astype("<u4").tobytes(), 32), grey(*GREYS)),
    ("tiff float in 0..1, negatives clipped", floats(-3, 1 / 3, 2 / 3, 1), grey(*GREYS)),
    ("tiff float beyond 255, clipped", floats(-9, 85.4, 169.6, 1e30), grey(*GREYS)),
    ("jpeg 2000 16-bit grey", encode(quadrants(LEVELS16), "JPEG2000"), grey(*GREYS)),
    ("tga rgb, which has no signature", encode(rgb(*COLOURS), "TGA"), rgb(*COLOURS)),
]
# fmt: on


@pytest.mark.parametrize(
    "data, expected, tolerance", [(*row, EXACT)[1:4] for row in FORMATS], ids=[row[0] for row in FORMATS]
)
def test_format_gives_its_pixels(tmp_path, data, expected, tolerance):
    path = tmp_path / "image.bin"  # the content decides, not the suffix
    path.write_bytes(data)
    loaded = load_image(str(path), SIZE)
    assert loaded.shape == (SIZE, SIZE, 3) and loaded.dtype == np.uint8 and loaded.flags.writeable
    assert np.abs(loaded.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    "resize, colour, alpha, grey",
    [
        ("crop", "b1a363851e0b", "781fc1785add", "f57fd77a8228"),
        ("pad", "aec9fb7f85ae", "7f9b4fa41aee", "34a83de6f0fe"),
        ("stretch", "6d236c0df203", "3086debee00b", "513fa75f9669"),
    ],
)
def test_plain_pictures_give_the_bits_of_version_0_2(tmp_path, resize, colour, alpha, grey):
    """Hashes of the arrays that the code of commit fe6cc71 gave."""
    y, x = np.mgrid[:75, :101]
    pixels = np.stack([y * 7 + x * 3, y * x, x**2 // 5 + y * 2], -1).astype(np.uint8)
    for array, expected in ((pixels, colour), (np.dstack([pixels, pixels[..., 1]]), alpha), (pixels[..., 1], grey)):
        loaded = load_image(saved(tmp_path, array), 32, resize=resize, background="#102030")
        assert hashlib.sha256(loaded.tobytes()).hexdigest()[:12] == expected


@pytest.mark.parametrize("orientation, stored", [(5, lambda a: a.transpose(1, 0, 2)), (6, np.rot90)])
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_exif_orientation_is_applied(tmp_path, form, orientation, stored):
    upright = np.concatenate([rgb(*COLOURS), rgb(BLACK, BLUE, WHITE, RED)], axis=1)  # no turn or mirror keeps it
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    path.write_bytes(encode(np.ascontiguousarray(stored(upright)), form, exif=exif, quality=95, subsampling=0))
    loaded = load_image(str(path), 32, resize="pad", background="black")
    assert np.abs(loaded[8:24].astype(int) - upright).max() <= LOSSY and not loaded[:8].any()


@pytest.mark.parametrize("exif", [b"Exif\0\0MX\0*\0\0\0\x08", b"Exif\0\0MM\0*\xff\0"], ids=["header", "cut"])
def test_damaged_exif_leaves_the_picture_as_stored(tmp_path, exif):
    path = tmp_path / "image"
    path.write_bytes(encode(rgb(*COLOURS), "PNG", exif=exif))
    assert (load_image(str(path), SIZE) == rgb(*COLOURS)).all()


def gamma_profile(power):
    """An ICC profile of sRGB's primaries with a pure power curve."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for n in range(struct.unpack(">I", profile[128:132])[0]):
        kind, at = profile[132 + 12 * n : 136 + 12 * n], struct.unpack(">I", profile[136 + 12 * n : 140 + 12 * n])[0]
        if kind in (b"rTRC", b"gTRC", b"bTRC"):  # parametric curve of type 0: y = x ** power
            profile[at + 8 : at + 16] = struct.pack(">HHi", 0, 0, round(power * 65536))
    return bytes(profile)


@pytest.mark.parametrize("form, options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_linear_colours_become_srgb_and_keep_their_alpha(tmp_path, form, options):
    light = np.array(COLOURS) / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    expected = rgb(*np.rint(255 * srgb).astype(int))
    path = tmp_path / "linear"
    path.write_bytes(encode(rgb(*COLOURS), form, icc_profile=gamma_profile(1), **options))
    assert np.abs(load_image(path, SIZE).astype(int) - expected).max() <= 1
    path.write_bytes(encode(with_alpha([255, 0, 255, 255]), form, icc_profile=gamma_profile(1), exact=True, **options))
    expected[: SIZE // 2, SIZE // 2 :] = WHITE
    assert np.abs(load_image(path, SIZE).astype(int) - expected).max() <= 1


def test_srgb_profile_changes_no_pixel_and_a_broken_one_is_one_line_a_folder(tmp_path, caplog):
    from PIL import ImageCms

    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, data in (("s", profile), ("a", b"junk" * 40), ("b", b"junk" * 40)):
        (tmp_path / name).write_bytes(encode(noise, "PNG", icc_profile=data))
        assert (load_image(tmp_path / name, SIZE) == noise).all()
    assert len(caplog.messages) == 1 and "its colour profile cannot be used" in caplog.text


def test_twelve_bits_in_sixteen(tmp_path, caplog):
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for name in ("a.png", "b.png"):
        Image.fromarray(levels).save(tmp_path / name)
        assert load_image(tmp_path / name, 64).max() == 16
    assert len(caplog.messages) == 1 and "uses 0 to 4095 of 65535" in caplog.text and "4095" in caplog.text
    loaded = load_image(tmp_path / "a.png", 64, white_level=4095)
    assert (loaded[..., 0] == np.rint(levels / 4095 * 255)).all()


def test_pillow_images_are_read_as_files_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(blocks(RED, GREEN, BLUE), "JPEG", exif=exif, icc_profile=gamma_profile(1.8)))
    assert (load_image(Image.open(path), SIZE) == load_image(path, SIZE)).all()
    assert load_image(Image.open(path), None).shape == (3 * SIZE, SIZE, 3)
    closed = Image.new("RGB", (4, 4))
    closed.close()
    cut_short = Image.open(io.BytesIO(cut("PNG", 0.5)))
    for bad in (closed, cut_short, Image.new("RGB", (0, 5))):
        with pytest.raises(ImageError) as caught:
            load_image(bad, SIZE)
        assert "\n" not in str(caught.value)


# ---- size, resize, background ---------------------------------------------------------------------------------------


def saved(tmp_path, array):
    path = tmp_path / "image.png"
    path.write_bytes(encode(np.ascontiguousarray(array), "PNG"))
    return str(path)


def blocks(*colours, size=SIZE):
    """Squares of one colour each, side by side: [size, size * n, 3]."""
    return np.concatenate([np.full((size, size, 3), colour, np.uint8) for colour in colours], axis=1)


def test_crop_of_a_hair_is_not_enlarged_whole(tmp_path):
    hair = np.full((1, 400_000, 3), 7, np.uint8)
    hair[0, 199_990:200_010] = GREEN
    assert (load_image(saved(tmp_path, hair), 512) == GREEN).all()  # whole, it would be 512 x 205 million


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_crop_equals_guided_diffusions_recipe(tmp_path_factory, width, height, size, seed):
    if max(width, height) > 16 * min(width, height):
        return  # the ribbon, which is trimmed first
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    path = saved(tmp_path_factory.mktemp("crop"), noise)
    assert (load_image(path, size) == image[top : top + size, left : left + size]).all()


@pytest.mark.parametrize(
    "parameter, value", [("background", "#10203040"), ("resize", "squash"), ("image_size", 0), ("image_size", 2**40)]
)
def test_wrong_option_is_an_input_error(tmp_path, parameter, value):
    path = saved(tmp_path, rgb(*COLOURS))
    with pytest.raises(InputError) as caught:
        load_image(path, **{"image_size": SIZE, parameter: value})
    assert (caught.value.parameter, caught.value.value) == (parameter, value) and "\n" not in str(caught.value)


# ---- names and folders ----------------------------------------------------------------------------------------------

NAMES = [
    *("UPPER.PNG", "Ünïcödé.webp", "猫/三毛.png", "--base_samples.png", "new\nline.png", "a.b.c.tiff"),
    *("back\\slash.png", "nested/deep/er/x.png", "folder.png/inside.png", "#hash$HOME`id`'\"*?[x].png"),
    os.fsdecode(b"caf\xe9.png"),  # not UTF-8
]


def test_every_name_is_listed_and_loads(tmp_path):
    data = encode(rgb(*COLOURS), "PNG")
    for name in (*NAMES, ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    references = list_references(str(tmp_path))
    assert [reference.name for reference in references] == sorted(NAMES)
    (single,) = list_references(str(tmp_path / ".hidden"))  # a file of any name, where it is given
    assert single.name == ".hidden"
    for reference in (*references, single):
        display_name(reference.name).encode("utf-8")
        assert reference.stem + os.path.splitext(reference.name)[1] == reference.name
        assert (load_image(reference, SIZE) == rgb(*COLOURS)).all()


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names_under(path):
    return [reference.name for reference in list_references(str(path))]


def test_links_are_followed_and_their_cycles_end(tmp_path):
    touch(tmp_path, "base/x.png", "elsewhere/y.png")
    for link, target in (("self", "."), ("up", ".."), ("other", "../elsewhere"), ("file.png", "../elsewhere/y.png")):
        (tmp_path / "base" / link).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to("../base")
    for link in ("loop", "loop.jpg", "dangling.png", "dangling.txt"):  # images that are broken stay in the list
        (tmp_path / "base" / link).symlink_to("nowhere" if "dangling" in link else link)
    os.mkfifo(tmp_path / "base" / "pipe.png")
    (tmp_path / "link").symlink_to("base")
    expected = ["dangling.png", "file.png", "loop.jpg", "other/y.png", "pipe.png", "up/elsewhere/y.png", "x.png"]
    assert names_under(tmp_path / "base") == names_under(f"{tmp_path / 'link'}//") == expected


def test_folders_that_link_to_each_other_in_a_web_end_in_an_error(tmp_path, monkeypatch):
    """Every folder has links to all others: there are more paths than can be listed."""
    monkeypatch.setattr(references_module, "_MOST_FOLDERS", 5_000)
    count = 11
    for k in range(count):
        touch(tmp_path, f"{k}/x.png")
        for other in range(count):
            if other != k:
                (tmp_path / f"{k}" / f"to{other}").symlink_to(f"../{other}")
    with pytest.raises(InputError, match="more than 5000 folders, or links between them without end") as caught:
        list_references(tmp_path)
    assert caught.value.parameter == "base_samples"


def test_files_left_out_are_counted_in_one_line(tmp_path, caplog):
    touch(tmp_path, "a.png", "b.heic", "sub/c.HEIC", "d", ".hidden.txt", "e.nul\n")
    with caplog.at_level("INFO", logger="sddm"):
        assert names_under(tmp_path) == ["a.png"]
    (line,) = caplog.messages
    assert "left out 4 other files (2 .heic, 1 " in line and line.isprintable()
    assert "1 without a suffix" in line and r"1 '.nul\n'" in line


# fmt: off
BAD_BASES = [
    ("missing", lambda root: None, "no such file or folder"),
    ("empty folder", lambda root: root.mkdir(), "no image in this folder.*no other files"),
    ("others", lambda root: touch(root, "a.txt", "b/c.npz", ".d.png"), r"no image.*2 other files \(1 \.txt, 1 \.npz\)"),
    ("link", lambda root: root.symlink_to("nowhere"), "broken link to nowhere"),
    ("pipe", lambda root: os.mkfifo(root), "a named pipe, not a regular file"),
    *((base, lambda root: None, "give a folder") for base in ("", "nul\0byte", "new\nline", "http://a.org/a.png", "s3://a")),
]
# fmt: on


@pytest.mark.parametrize("base, make, words", BAD_BASES)
def test_bad_base_is_an_input_error(tmp_path, monkeypatch, base, make, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / base.replace("\0", ""))
    with pytest.raises(InputError, match=words) as caught:
        list_references(base, parameter="eval_data")
    assert (caught.value.parameter, caught.value.value) == ("eval_data", base) and "\n" not in str(caught.value)


def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    """A file is an ImageError, a folder an InputError; refused here, as root may read all."""
    touch(tmp_path, "a.png")

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match=r": permission denied$"):
        load_image(str(tmp_path / "a.png"), SIZE)
    with pytest.raises(InputError, match="permission denied"):
        list_references(str(tmp_path))


# ---- two files to one output ----------------------------------------------------------------------------------------

OVERWRITES = "would overwrite that of "
# fmt: off
COLLISIONS = [
    (["a.png", "b.png", "sub/a.png"], {}),
    (["a.jpg", "a.png", "a.webp"], {"a.png": f"{OVERWRITES}a.jpg", "a.webp": f"{OVERWRITES}a.jpg"}),
    (["A.png", "a.png"], {"a.png": f"{OVERWRITES}A.png"}),
    (["e\u0301.png", "\u00e9.png"], {"\u00e9.png": f"{OVERWRITES}e\u0301.png"}),
    (["a.jpg", "a.png/b.png"], {"a.png/b.png": "needs a folder where the output of a.jpg lies"}),
    (["a.PNG/b.png", "a.webp"], {"a.webp": "has the name of the folder for the output of a.PNG/b.png"}),
    (["a.jpg", "a.png/b.jpg", "a.png/b.png", "c.png"],  # the loser of one clash causes no other
     {"a.png/b.jpg": "needs a folder", "a.png/b.png": "needs a folder"}),
    (["a\n.jpg", "a\n.png"], {"a\n.png": rf"{OVERWRITES}'a\n.jpg'"}),
    (["Grid.jpg", "sub/grid.png"], {"Grid.jpg": "a file that the run itself writes"}),
]
# fmt: on


@pytest.mark.parametrize("names, expected", COLLISIONS, ids=[row[0][-1] for row in COLLISIONS])
def test_collisions_are_found(names, expected):
    found = find_collisions([Reference("/" + name, name) for name in names], reserved=["grid.png", "run.json"])
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name] and "\n" not in found[name]


# ---- broken files ---------------------------------------------------------------------------------------------------


def patched(data, at, replacement):
    return data[:at] + replacement + data[at + len(replacement) :]


def cut(form, keep, **options):
    """The first `keep` (a share) of a 64 x 64 image of noise."""
    data = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), form, **options)
    return data[: int(len(data) * keep)]


def text(content):
    return lambda path: path.write_bytes(content)


BOMB = png(bytes(20_000 * 20_000 // 8), 20_000, 20_000, 1, 0)  # 400 million pixels in 50 kB
TRUNCATED = "^(damaged, truncated or unsupported: |not an image, or damaged at its head: )"
NO_IMAGE = "^not an image, or damaged at its head"
# fmt: off
BROKEN = [
    ("zero bytes", text(b""), r"^the file is empty \(0 bytes\)$"),
    ("text", text(b"hello world\nsecond line\n"), rf"{NO_IMAGE}: begins with b'hello world\\nseco'"),
    ("postscript is not run", text(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), f"{NO_IMAGE}: begins with"),
    ("text that begins like a bmp", text(b"BMW cars and other things to drive around in, long"), "Truncated File Read"),
    ("tiff signature alone", text(b"II*\0"), TRUNCATED),
    ("png with a damaged header", text(patched(encode(rgb(*COLOURS), "PNG"), 18, b"\xff")), NO_IMAGE),
    ("tiff with NaN", text(floats(0, 1, np.nan, 0)), "float image with values that are NaN"),
    ("tiff beyond 16 bits", text(tiff(quadrants(np.uint32([0, 1, 2, 70_000])).tobytes(), 32)), "from 0 to 70000"),
    ("negative tiff", text(tiff(quadrants(np.int16([-5, 1, 2, 3])).tobytes(), 16, sample_format=2)), "from -5 to 3"),
    ("decompression bomb", text(BOMB), r"pixels.* limit of 178956970 .*decompression bomb"),
    ("dangling link", lambda path: path.symlink_to("no where\n"), r"^broken link to 'no where\\n'$"),
    ("folder", lambda path: path.mkdir(), "^a folder, not a regular file$"),
    ("pipe", lambda path: os.mkfifo(path), "^a named pipe, not a regular file$"),
    ("device", lambda path: path.symlink_to("/dev/zero"), "^a device, not a regular file$"),
]
# fmt: on


@pytest.mark.parametrize("make, words", [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_broken_file_is_an_image_error_of_one_line(tmp_path, make, words):
    path = tmp_path / "broken.png"
    make(path)
    with pytest.raises(ImageError) as caught:
        load_image(Reference(str(path), "broken.png"), SIZE)
    message = caught.value.reason
    assert re.search(words, message) and str(caught.value) == f"{path}: {message}"
    assert message.isprintable() and len(message) < 300 and str(tmp_path) not in message


# Files of every decoder, small, with detail, so that a cut or a changed byte has something to spoil.
_noise = np.random.default_rng(5).integers(0, 256, (24, 20, 3), np.uint8)
_noise[8:, 8:] = np.add.outer(np.arange(16) * 9, np.arange(12) * 8)[..., None]
SAMPLES = {
    "png-16": encode(_noise[..., 0].astype(np.uint16) * 250, "PNG"),
    "jpeg": encode(_noise, "JPEG"),
    "webp": encode(_noise, "WEBP"),
    "tiff-float": tiff(_noise[..., 0].astype(np.float32).tobytes(), 32, sample_format=3, width=20, height=24),
    "gif": encode(Image.fromarray(_noise).quantize(32), "GIF"),
    "jpeg-2000": encode(_noise, "JPEG2000"),
    "tga": encode(_noise, "TGA"),
}


def load_bytes(folder, data):
    path = os.path.join(folder, "image")
    with open(path, "wb") as file:
        file.write(data)
    return load_image(path, SIZE)


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_file_never_gives_part_of_a_picture(tmp_path, name):
    """At every cut the result is ImageError or the whole picture (where only a trailer is missing)."""
    data = SAMPLES[name]
    whole = load_bytes(tmp_path, data)
    refused = 0
    cuts = sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 8, len(data))})
    for length in cuts:
        try:
            loaded = load_bytes(tmp_path, data[:length])
        except ImageError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            assert (loaded == whole).all(), f"cut at {length} of {len(data)} gives another picture"
    assert refused >= len(cuts) / 3


MUTATIONS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
@given(MUTATIONS, st.booleans(), st.one_of(st.just(1.0), st.floats(0, 1)), st.binary(max_size=20), st.floats(0, 1))
def test_mutated_file_loads_or_raises_image_error(tmp_path, name, changes, head_only, keep, junk, at):
    data = bytearray(SAMPLES[name])
    for place, value in changes:
        data[int(place * (min(len(data), 120) if head_only else len(data)))] = value
    data[int(at * len(data)) : int(at * len(data))] = junk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # a changed header may ask for much more
        try:
            loaded = load_bytes(tmp_path, bytes(data[: int(keep * len(data))]))
        except ImageError as error:
            assert str(error).isprintable() and len(str(error).replace(str(tmp_path), "")) < 300
        else:
            assert loaded.shape == (SIZE, SIZE, 3) and loaded.dtype == np.uint8


# ---- blobfile -------------------------------------------------------------------------------------------------------


@pytest.fixture
def through_blobfile(monkeypatch):
    """blobfile reads local paths as it reads URLs: send every path through it."""
    blobfile = pytest.importorskip("blobfile")
    monkeypatch.setattr(references_module, "is_url", lambda path: True)
    return blobfile


def test_blobfile_lists_and_reads(tmp_path, through_blobfile):
    touch(tmp_path, "base/.hidden.png", "base/notes.txt")
    for name in ("b.png", "sub/a ü.png", "sub/deep/c.PNG"):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_bytes(encode(rgb(*COLOURS), "PNG"))
    references = list_references(str(tmp_path / "base"))
    assert [reference.name for reference in references] == ["b.png", "sub/a ü.png", "sub/deep/c.PNG"]
    assert all((load_image(reference, SIZE) == rgb(*COLOURS)).all() for reference in references)
    (single,) = list_references(str(tmp_path / "base" / "b.png"))
    assert single.name == "b.png"


def test_blobfile_errors_are_ours(tmp_path, through_blobfile):
    touch(tmp_path, "base/notes.txt")
    with pytest.raises(InputError, match=r"no image in this folder.* 1 other file"):
        list_references(str(tmp_path / "base"))
    with pytest.raises(InputError, match=r"base_samples is .*no such file or folder"):
        list_references(str(tmp_path / "missing"))
    with pytest.raises(ImageError, match="no such file"):
        load_image(str(tmp_path / "missing.png"), SIZE)


def test_a_url_without_blobfile_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", None)  # an import of it raises ImportError
    with pytest.raises(InputError, match="reading this address needs the package blobfile"):
        list_references("gs://bucket/folder")


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_to_tensor_orders_channels_and_scales():
    first, second = rgb(*COLOURS), grey(0, 85, 170, 255)
    x = to_tensor([first, second])
    assert x.shape == (2, 3, SIZE, SIZE) and x.dtype == torch.float32 and x.is_contiguous()
    assert x[0, :, 0, 0].tolist() == [1, -1, -1] and x[0, :, 0, -1].tolist() == pytest.approx([-1, 200 / 127.5 - 1, -1])
    assert torch.equal(x, to_tensor(np.stack([first, second])))
    assert torch.equal(to_tensor(first[None, :, ::-1]), x[:1].flip(3))  # a view with negative strides
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    assert (to_uint8(to_tensor(levels)) == levels).all()
    for images in (levels.astype(np.float32), levels[0], levels[..., [0, 0, 0, 0]]):
        with pytest.raises(ValueError):
            to_tensor(images)


def test_to_uint8_rounds_to_nearest_clips_and_names_nan():
    for value, level in ((5, 255), (float("-inf"), 0), (-1 + 0.9 / 127.5, 1), (-1 + 0.4 / 127.5, 0)):
        assert (to_uint8(torch.full((1, 3, 2, 2), value)) == level).all()
    x = torch.zeros(4, 3, 2, 2)
    x[1, 2, 0, 1] = x[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN in image 1, 3 of a batch of 4"):
        to_uint8(x)
