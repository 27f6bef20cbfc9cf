"""Make docs/web_demo.png, the picture of the page after a translation. It needs playwright and chromium.

example: bash scripts/web_demo.sh & python tests/web_picture.py http://127.0.0.1:7860/
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "web_demo.png"


with sync_playwright() as started:
    chrome = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = chrome.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.set_default_timeout(600_000)
    page.goto(sys.argv[1])
    page.click("#examples .gallery-item >> nth=2")
    page.wait_for_function("document.querySelector('#picture img').src.includes('cat_face')")
    page.locator("#count").get_by_text("4").click()
    page.click("#translate")
    page.wait_for_function("document.querySelector('#status textarea, #status input').value.startsWith('Done')")
    page.wait_for_selector(".compare >> nth=3")
    page.mouse.move(5, 5)
    page.wait_for_timeout(1000)
    height = page.locator("text=More settings").first.bounding_box()["y"] - 16
    taken = page.screenshot(clip={"x": 0, "y": 0, "width": 1280, "height": height}, full_page=True)
    chrome.close()
image = Image.open(io.BytesIO(taken)).convert("RGB")
image.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
