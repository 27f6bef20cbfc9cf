"""The page of the web demo, served by the real command: as an API, against strangers, and in a real browser.

Only where gradio is installed; the browser's tests need playwright and chromium, too.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from conftest import ROOT
from PIL import Image
from scripts_in_process import made_by

from guided_diffusion.web.translate import Settings

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

NAME = 'it\'s ä "b" (1).png'
TAMER = "ein ä 2.png"  # the Python client drops quotation marks from names, and some versions parentheses
ARGUMENTS = (4, 0.35, 6, 3)  # area, T0, steps, seed
SLOW = (4, 0.35, 250, 3)


@contextlib.contextmanager
def serving(root, *flags):
    """The command as a process that serves; yields (process, address)."""
    command = [sys.executable, ROOT / "scripts" / "web_demo.py", "--port", 0, "--device", "cpu", *flags]
    environment = {**os.environ, "TMPDIR": str(root / "tmp"), "OMP_NUM_THREADS": "1"}
    (root / "tmp").mkdir(exist_ok=True)
    log = open(root / "log.txt", "w")
    process = subprocess.Popen(
        list(map(str, command)), cwd=root, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, (root / "log.txt").read_text()
        yield process, address[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a tiny model and pictures, and the address of a page that serves it."""
    root = tmp_path_factory.mktemp("site")
    (root / "models").mkdir()
    tiny.make_model(root / "models" / "model.safetensors")
    tiny.make_references(root / "examples", ["first.png", "second.png", *(f"z{n}.png" for n in range(12))])
    tiny.make_references(root / "mine", ["other.png", NAME, TAMER])
    with serving(root, "--model_path", "models/model.safetensors", "--examples", "examples") as (_, address):
        yield root, address


@pytest.fixture(scope="module")
def client(site):
    return gradio_client.Client(site[1], verbose=False, download_files=str(site[0] / "downloads"))


def done(steps):
    """What the page says at the end: it begins with the preset's late start, which takes a share of the steps."""
    return f"Done: {round(steps * Settings.start)} steps"


def predict(client, path, *arguments, **options):
    return client.predict(gradio_client.handle_file(path), *arguments, api_name="/translate", **options)


# ---- as an API ------------------------------------------------------------------------------------------------------


def test_the_client_gets_the_commands_pixels(site, client):
    root, _ = site
    _, pair, status, text, *further = predict(client, str(root / "mine" / TAMER), *ARGUMENTS)
    assert status.startswith(done(6)) and further == [None] * 3
    reference, result = (np.asarray(Image.open(path)) for path in pair)
    assert np.array_equal(reference, np.asarray(Image.open(root / "mine" / TAMER)))
    # The page does not know the folder of the models' paths; the command is for the project's.
    assert np.array_equal(result, made_by(text, root / "mine"))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("text.png", {}, "Your picture cannot be used: not an image"),
        ("mine/other.png", {"class_index": "1"}, "Class is '1'; the model is not class-conditional"),
        ("mine/other.png", {"t0": 1.5}, "0.95"),  # in Gradio's own words
    ],
)
def test_errors_are_one_line_in_the_pages_words(site, client, name, changes, words):
    root, _ = site
    (root / "text.png").write_text("hello")
    before = len((root / "log.txt").read_text())
    with pytest.raises(Exception) as error:
        predict(client, str(root / name), **{**dict(zip(("area", "t0", "steps", "seed"), ARGUMENTS)), **changes})
    assert words in str(error.value) and "Traceback" not in str(error.value) and str(root) not in str(error.value)
    assert "t0" in changes or "Traceback" not in (root / "log.txt").read_text()[before:]
    assert predict(client, str(root / "mine" / "other.png"), *ARGUMENTS)[2].startswith("Done")


# ---- against strangers ----------------------------------------------------------------------------------------------


def test_foreign_files_are_not_served(site):
    root, address = site
    (root / "tmp" / "secret.txt").write_text("secret")
    foreign = ["/etc/passwd", root / "models" / "model.safetensors", root / "log.txt", root / "mine" / "other.png"]
    for path in (*foreign, root / "tmp" / "secret.txt", ROOT / "README.md", "README.md", "../log.txt"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404), path
    served = httpx.get(f"{address}gradio_api/file={root / 'examples' / 'first.png'}")
    assert served.status_code == 200 and served.content == (root / "examples" / "first.png").read_bytes()


def test_what_is_not_needed_is_closed(site):
    _, address = site
    for path in ("monitoring", "runs", "gradio_api/mcp/sse", "gradio_api/mcp"):
        assert httpx.get(address + path).status_code in (403, 404), path
    large = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x" * (21 << 20))})
    assert large.status_code == 413
    headers = httpx.get(f"{address}config", headers={"Origin": "http://example.org"}).headers
    assert headers.get("access-control-allow-origin") in (None, "")


def call(address, picture):
    """What the page answers to a picture as a bare request, without a client that uploads it first."""
    rest = ["models/model.safetensors", 1, ["dct"], "manifold", "ancestral", "fp32", "", 1, 1]
    data = {"data": [{**picture, "meta": {"_type": "gradio.FileData"}}, *ARGUMENTS, *rest]}
    event = httpx.post(f"{address}gradio_api/call/translate", json=data).json().get("event_id")
    return httpx.get(f"{address}gradio_api/call/translate/{event}", timeout=600).text if event else ""


def test_only_uploads_are_read(site):
    root, address = site
    for path in ("/etc/passwd", "models/model.safetensors", str(root / "mine" / "other.png")):
        answer = call(address, {"path": path})
        assert "event: complete" not in answer and "root:" not in answer, path
    with open(root / "mine" / "other.png", "rb") as file:
        uploaded = httpx.post(f"{address}gradio_api/upload", files={"files": ("other.png", file)}).json()[0]
    assert "event: complete" in call(address, {"path": uploaded, "orig_name": "other.png"})


def test_addresses_are_not_fetched(site):
    """Neither as a path nor as the address of a picture."""
    _, address = site
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for picture in ({"path": url}, {"path": url, "url": url}, {"path": None, "url": url}):
            assert "event: complete" not in call(address, picture)
        assert "event: complete" not in call(address, {"path": None, "url": "data:image/png;base64,AAAA"})
        with pytest.raises(TimeoutError):
            listener.accept()


# ---- start and end --------------------------------------------------------------------------------------------------


def test_it_ends_with_a_signal_and_leaves_nothing(site, tmp_path):
    root, _ = site
    flags = ("--model_path", root / "models" / "model.safetensors", "--examples", "none")
    with serving(tmp_path, *flags) as (process, url):
        client = gradio_client.Client(url, verbose=False, download_files=False)
        client.submit(gradio_client.handle_file(str(root / "mine" / "other.png")), *SLOW, api_name="/translate")
        wait_for(lambda: list((tmp_path / "tmp").rglob("*.jpeg")))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 0
    assert not list((tmp_path / "tmp").iterdir())
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in log and "HTTP Request" not in log, log


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        chrome = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield chrome
        chrome.close()


@contextlib.contextmanager
def opened(browser, address, width=1280, height=900):
    """The page in a tab of its own; every request that it makes stays on this machine."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#translate")
    yield page
    context.close()
    hosts = {url.split("/")[2] for url in requests if url.startswith(("http", "ws"))}
    assert hosts == {address.split("/")[2]} and not errors


@pytest.fixture
def tab(browser, site):
    with opened(browser, site[1]) as page:
        yield page


def wait_for_status(tab, words):
    script = "words => document.querySelector('#status textarea, #status input').value.startsWith(words)"
    tab.wait_for_function(script, arg=words, timeout=600_000)


def choose(tab, path):
    before = tab.get_attribute("#picture img", "src")
    tab.set_input_files("#picture input[type=file]", str(path))
    tab.wait_for_function("old => (document.querySelector('#picture img')?.src ?? old) !== old", arg=before)


def set_number(tab, label, value):
    field = tab.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Enter")


def test_upload_and_translate(site, tab):
    choose(tab, site[0] / "mine" / NAME)
    set_number(tab, "Steps", 6)
    tab.click("#translate")
    wait_for_status(tab, done(6))
    tab.wait_for_selector(".compare img")
    with tab.expect_download() as download:
        tab.click(".download >> visible=true")
    stem = re.sub(r"[^\w.() -]", "_", os.path.splitext(NAME)[0])
    assert download.value.suggested_filename == f"{stem}_seed0.png"
    text = tab.input_value("#command textarea")
    assert NAME in shlex.split(text), "the name is the visitor's, to the last character"
    before = tab.get_by_label("Seed").input_value()
    tab.click("#random_seed")
    wait_for(lambda: tab.get_by_label("Seed").input_value() != before)
    tab.click("#examples .gallery-item >> nth=1")
    tab.wait_for_function("document.querySelector('#picture img').src.includes('second')")


def test_several_results_have_downloads_of_their_own(site, tab):
    choose(tab, site[0] / "mine" / "other.png")
    set_number(tab, "Steps", 6)
    tab.get_by_label("Seed", exact=True).fill("7")
    tab.locator("#count").get_by_text("3").click()
    tab.click("#translate")
    wait_for_status(tab, "Done")
    tab.wait_for_selector(".download >> nth=2")
    wait_for(lambda: tab.locator(".compare img >> visible=true").count() == 6)
    wait_for(lambda: tab.locator("#preview >> visible=true").count() == 0)
    pictures = []
    for n in range(3):
        with tab.expect_download() as download:
            tab.click(f".download >> nth={n}")
        assert download.value.suggested_filename == f"other_seed{7 + n}.png"
        pictures.append(Image.open(download.value.path()).tobytes())
    assert len(set(pictures)) == 3


def test_an_error_keeps_the_picture_the_settings_and_the_last_result(site, tab):
    root, _ = site
    set_number(tab, "Steps", 6)
    tab.click("#translate")
    wait_for_status(tab, "Done")
    tab.wait_for_selector(".compare img")
    tab.get_by_label("Seed").fill("")
    tab.click("#translate")
    wait_for_status(tab, "Seed is missing")
    tab.wait_for_selector(".compare img")
    assert tab.locator("#picture img").count() == 1
    assert "Traceback" not in tab.content()
    (root / "broken.png").write_bytes((root / "mine" / "other.png").read_bytes()[:150])
    tab.get_by_label("Seed").fill("1")
    choose(tab, root / "broken.png")
    tab.click("#translate")
    wait_for_status(tab, "Your picture cannot be used: ")


@pytest.mark.parametrize("width, count", [(1280, 1), (400, 1), (400, 4)])
def test_the_page_fits_the_screen_and_a_phone_shows_source_and_results_at_once(site, browser, width, count):
    with opened(browser, site[1], width, 800) as page:
        page.locator("#count").get_by_text(str(count)).click()
        page.evaluate("scrollTo(0, 0)")
        page.click("#translate")
        wait_for_status(page, "Done")
        page.wait_for_selector(f".download >> nth={count - 1}")
        boxes = [page.locator(f".compare >> nth={n}").bounding_box() for n in range(count)]
        if width == 400:
            for box in (page.locator("#picture").bounding_box(), *boxes):
                assert box["y"] >= 0 and box["y"] + box["height"] <= 800
            assert page.evaluate("scrollY") == 0
        if count == 1:
            assert min(boxes[0]["width"], boxes[0]["height"]) >= 300, "the result is large enough to be seen"
        page.click("text=More settings")
        page.wait_for_selector("#command textarea")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
