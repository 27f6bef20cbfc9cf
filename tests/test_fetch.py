"""Published files are downloaded, resumed and verified; tested against a server of this machine."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from guided_diffusion.checkpoint.fetch import FILES, Remote, fetch
from guided_diffusion.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, ranges included; cuts connections off after `server.cut` bytes."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.status != 200:
            return self.send_error(server.status)
        start, content = 0, server.content
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.etag)
        if server.md5 and not start:
            self.send_header("Content-MD5", server.md5)
        self.end_headers()
        body = content[start:]
        self.wfile.write(body if server.cut is None else body[: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    torch.save({"model": {"a.weight": torch.randn(100, 100)}}, tmp_path / "served.pt")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.requests = (tmp_path / "served.pt").read_bytes(), []
    server.etag, server.md5, server.cut, server.ranges, server.status = '"one"', None, None, True, 200
    server.remote = Remote(f"http://127.0.0.1:{server.server_port}/x.pt", "a test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole(server, folder):
    seen = []
    path = fetch("x.pt", folder, remote=server.remote, report=lambda done, total: seen.append((done, total)))
    assert Path(path).read_bytes() == server.content and names(folder) == ["x.pt"]
    assert seen[-1] == (len(server.content), len(server.content))
    fetch("x.pt", folder, remote=server.remote)
    assert len(server.requests) == 1  # what is present is not asked for again


def test_a_download_that_was_cut_off_resumes(server, folder):
    server.cut = 10_000
    for _ in range(2):
        with pytest.raises(InputError, match="resume"):
            fetch("x.pt", folder, remote=server.remote)
    assert names(folder) == [".x.pt.etag", ".x.pt.part"]
    server.cut = None
    path = fetch("x.pt", folder, remote=server.remote)
    assert Path(path).read_bytes() == server.content and names(folder) == ["x.pt"]
    assert [request.get("Range") for request in server.requests] == [None, "bytes=10000-", "bytes=20000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_another_version_of_the_file_starts_over(ranges, server, folder, tmp_path):
    server.cut = 10_000
    with pytest.raises(InputError):
        fetch("x.pt", folder, remote=server.remote)
    torch.save({"model": {"a.weight": torch.randn(50, 100)}}, tmp_path / "other.pt")
    server.content, server.etag, server.cut = (tmp_path / "other.pt").read_bytes(), '"two"', None
    server.ranges = ranges
    assert Path(fetch("x.pt", folder, remote=server.remote)).read_bytes() == server.content


def test_a_complete_part_is_taken(server, folder):
    folder.mkdir()
    (folder / ".x.pt.part").write_bytes(server.content)
    (folder / ".x.pt.etag").write_text(server.etag)
    assert Path(fetch("x.pt", folder, remote=server.remote)).read_bytes() == server.content


def test_damaged_files_are_deleted_and_named(server, folder):
    sound = server.content
    good = hashlib.sha256(sound).hexdigest()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    url = server.remote.url
    for content, remote, md5 in (
        (bytes(flipped), Remote(url, ""), None),
        (sound, Remote(url, "", size=3), None),
        (sound, Remote(url, "", sha256="0" * 64), None),
        (sound, Remote(url, ""), "AAAAAAAAAAAAAAAAAAAAAA=="),
        (b"<html>sign in</html>", Remote(url, ""), None),
    ):
        server.content, server.md5 = content, md5
        with pytest.raises(InputError) as caught:
            fetch("x.pt", folder, remote=remote)
        assert "x.pt" in str(caught.value) and "damaged" in str(caught.value) and str(caught.value).isprintable()
        assert "x.pt" not in names(folder) and ".x.pt.part" not in names(folder)
    server.content, server.md5 = sound, None
    fetch("x.pt", folder, remote=Remote(url, "", size=len(sound), sha256=good))
    (folder / "x.pt").write_bytes(bytes(flipped))
    with pytest.raises(InputError, match="is not the published file"):
        fetch("x.pt", folder, remote=Remote(url, "", sha256=good))


@pytest.mark.parametrize("status", [404, 403, 500])
def test_what_the_server_refuses(status, server, folder):
    server.status = status
    with pytest.raises(InputError, match=str(status)):
        fetch("x.pt", folder, remote=server.remote)


def test_no_server_and_no_room(folder, tmp_path):
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch("x.pt", folder, remote=Remote("http://127.0.0.1:9/x.pt", ""))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetch("x.pt", tmp_path / "file" / "x", remote=Remote("http://127.0.0.1:9/x.pt", ""))


def test_names_that_are_not_known():
    with pytest.raises(InputError, match=r"did you mean lsun_cat\.pt"):
        fetch("lsun_cats.pt", "x")
    assert all(remote.url.startswith("https://") and remote.url.endswith(name) for name, remote in FILES.items())


@pytest.mark.slow
def test_the_command_lists_what_is_known():
    command = [sys.executable, ROOT / "scripts" / "fetch_model.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in FILES)
    wrong = subprocess.run([*command, "x.pt"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
