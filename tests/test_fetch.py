"""Published files are downloaded, read, and only then named; tested against a server of this machine."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from guided_diffusion.checkpoint.remote import FILES, fetch
from guided_diffusion.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; the path may be a status, or "cut" for half of it."""

    def do_GET(self):
        content, how = self.server.content, self.path.strip("/")
        self.server.requests.append(how)
        if how.isdigit():
            return self.send_error(int(how))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if how == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A server of a checkpoint's bytes."""
    torch.save({"model": {"a.weight": torch.randn(100, 100)}}, tmp_path / "served.pt")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}/"
    server.content = (tmp_path / "served.pt").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_arrives_whole_and_is_not_asked_for_again(server, tmp_path):
    for _ in range(2):
        assert Path(fetch("x.pt", tmp_path / "models", url=server.url)).read_bytes() == server.content
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["x.pt"] and len(server.requests) == 1


@pytest.mark.parametrize("how", ["cut", "404"])
def test_what_goes_wrong_leaves_nothing(how, server, tmp_path):
    with pytest.raises(InputError) as caught:
        fetch("x.pt", tmp_path / "models", url=server.url + how)
    message = str(caught.value)
    assert "x.pt" in message and server.url + how in message and message.isprintable()
    assert list((tmp_path / "models").iterdir()) == []


def test_other_files_are_refused(server, tmp_path):
    server.content = b"<html>sign in</html>"
    with pytest.raises(InputError, match="begins with b'<html>"):
        fetch("x.pt", tmp_path, url=server.url)
    (tmp_path / "x.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="delete it"):
        fetch("x.pt", tmp_path, url=server.url)
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch("x.pt", tmp_path / "x.pt" / "y", url=server.url)
    with pytest.raises(InputError, match=r"did you mean lsun_cat\.pt"):
        fetch("lsun_cats.pt", tmp_path)
    assert all(url.startswith("https://") and url.endswith(name) for name, url in FILES.items())


@pytest.mark.slow
def test_the_command_lists_what_is_known():
    command = [sys.executable, ROOT / "scripts" / "fetch_model.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in FILES)
    wrong = subprocess.run([*command, "x.pt"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
