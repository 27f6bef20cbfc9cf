"""Download published checkpoints: resumed where a download was cut off, and verified before they get their name."""

import base64
import contextlib
import difflib
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError, display_name, first_line, one_line, shown
from .reading import read

log = logging.getLogger(__name__)

GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021/"
ADAIN = "https://github.com/naoto0804/pytorch-AdaIN/releases/download/v0.0.0/"


@dataclass(frozen=True)
class Remote:
    """A published file: its address and, where they are known, its size in bytes and SHA-256."""

    url: str
    what: str
    size: int | None = None
    sha256: str | None = None


FILES = {
    **{
        f"{name}.pt": Remote(f"{GUIDED}{name}.pt", what)
        for name, what in {
            "256x256_diffusion_uncond": "ImageNet, 256 px, without classes",
            "256x256_diffusion": "ImageNet, 256 px, class-conditional",
            "512x512_diffusion": "ImageNet, 512 px, class-conditional",
            "128x128_diffusion": "ImageNet, 128 px, class-conditional",
            "64x64_diffusion": "ImageNet, 64 px, class-conditional",
            "256x256_classifier": "noisy-image classifier, 256 px",
            "512x512_classifier": "noisy-image classifier, 512 px",
            "128x128_classifier": "noisy-image classifier, 128 px",
            "64x64_classifier": "noisy-image classifier, 64 px",
            "lsun_bedroom": "LSUN bedrooms, 256 px",
            "lsun_cat": "LSUN cats, 256 px",
            "lsun_horse": "LSUN horses, 256 px",
            "lsun_horse_nodropout": "LSUN horses without dropout, 256 px",
        }.items()
    },
    **{
        f"{name}.pt": Remote(f"{IMPROVED}{name}.pt", what)
        for name, what in {
            "imagenet64_uncond_100M_1500K": "improved-diffusion's ImageNet, 64 px",
            "imagenet64_uncond_vlb_100M_1500K": "the same, trained on the bound",
            "imagenet64_cond_270M_250K": "improved-diffusion's ImageNet, 64 px, class-conditional",
            "cifar10_uncond_50M_500K": "improved-diffusion's CIFAR-10, 32 px",
            "cifar10_uncond_vlb_50M_500K": "the same, trained on the bound",
            "lsun_uncond_100M_1200K_bs128": "improved-diffusion's LSUN bedrooms, 256 px",
            "lsun_uncond_100M_2400K_bs64": "the same, trained for longer",
        }.items()
    },
    "vgg_normalised.pth": Remote(f"{ADAIN}vgg_normalised.pth", "AdaIN's VGG-19, for the energy vgg"),
}


def fetch(
    name: str,
    folder: str | os.PathLike,
    *,
    remote: Remote | None = None,
    report: Callable[[int, int], None] | None = None,
) -> str:
    """Download a published file into a folder; returns its path. A file that is already present is verified.

    remote: where it is, default that of `FILES`. report(done, total): called as bytes arrive. What arrived before a
    failure stays in .NAME.part, from which the next call resumes. Raises InputError.
    """
    if remote is None:
        name = next((known for known in FILES if name in (known, os.path.splitext(known)[0])), name)
        if name not in FILES:
            close = difflib.get_close_matches(name, FILES, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{shown(name)} is none of the published files that are known{meant}")
        remote = FILES[name]
    folder = os.fspath(folder)
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        verify(path, remote)
        log.info("%s is already present", display_name(path))
        return path
    part, tag = os.path.join(folder, f".{name}.part"), os.path.join(folder, f".{name}.etag")
    try:
        os.makedirs(folder, exist_ok=True)
        md5 = _download(remote, part, tag, report or (lambda done, total: None))
        _verify_download(part, name, remote, md5)
        os.replace(part, path)
        with contextlib.suppress(OSError):
            os.remove(tag)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = f"HTTP status {error.code}" if isinstance(error, urllib.error.HTTPError) else first_line(error)
        raise InputError(f"{name} cannot be downloaded from {remote.url}: {reason}") from None
    except OSError as error:
        raise InputError(f"{display_name(path)} cannot be written: {error.strerror or first_line(error)}") from None
    return path


def verify(path: str, remote: Remote) -> None:
    """Raise InputError for a file that is not the published one, or that no checkpoint can be read from."""
    size = os.path.getsize(path)
    if remote.size is not None and size != remote.size:
        raise InputError(f"{display_name(path)} has {size} bytes, the published file {remote.size}; delete it")
    if remote.sha256 is not None and _digest(path, "sha256").hex() != remote.sha256:
        raise InputError(f"{display_name(path)} is not the published file (its SHA-256 differs); delete it")
    read(path)


def _verify_download(part: str, name: str, remote: Remote, md5: str | None) -> None:
    """Like `verify`, for a download, which is deleted where it is wrong: to resume it would keep what is wrong."""
    try:
        if md5 is not None and base64.b64encode(_digest(part, "md5")).decode() != md5:
            raise InputError("its MD5 is not the one that the server states")
        verify(part, remote)
    except InputError as error:
        os.remove(part)
        reason = str(error).replace(display_name(part), "it")
        raise InputError(f"{name} from {remote.url} is damaged and was deleted: {reason}") from None


def _download(remote: Remote, part: str, tag: str, report: Callable[[int, int], None]) -> str | None:
    """Write what is missing of a file to `part`; returns the MD5 that the server states, base64, or None."""
    done = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(remote.url, headers={"User-Agent": "sddm"})
    if done:
        request.add_header("Range", f"bytes={done}-")
        with contextlib.suppress(OSError), open(tag, encoding="latin-1") as file:
            request.add_header("If-Range", file.read())  # another version of the file is sent whole
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        # Nothing is left to send: either all is there, or the file changed. Verification tells.
        return error.headers.get("x-ms-blob-content-md5")
    with response:
        resumed = response.status == 206
        if not resumed:
            done = 0
        etag = response.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            with open(tag, "w", encoding="latin-1") as file:
                file.write(one_line(etag))
        else:
            with contextlib.suppress(OSError):
                os.remove(tag)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else 0
        with open(part, "ab" if resumed else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                done += len(block)
                report(done, total)
        if total and done != total:
            raise ConnectionError(f"{done} of {total} bytes arrived; run the same command again to resume")
        whole = response.headers.get("x-ms-blob-content-md5")
        return whole if resumed else response.headers.get("Content-MD5", whole)


def _digest(path: str, name: str) -> bytes:
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
