"""Serve a web page that translates images (SDDM, ICML 2023). Requires gradio.

example:
  python scripts/web_demo.py --model_path models/fluent3d_64.safetensors
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

import functools
import importlib.util
import time

from guided_diffusion.cli import web
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError

DEMO = os.path.join(ROOT, "models", "fluent3d_64.safetensors")
DEMO_NOTE = "This model knows only glossy 3D emoji, so choose a drawing on a white background."
MODEL = "model to offer: a checkpoint, a diffusers folder or a Hub id; can be repeated (default the demo's)"


def create_parser() -> Parser:
    examples = os.path.join(ROOT, "ref_imgs")
    parser = Parser(__doc__, usage="[--model_path PATH] [flags]", defaults={"examples": examples})
    parser.add_argument("--model_path", action="append", metavar="PATH", help=MODEL)
    parser.add(web.WebOptions, title="page")
    return parser


def serve(given: Given) -> int:
    options = given.options(web.WebOptions)
    if importlib.util.find_spec("gradio") is None:  # before torch, whose import takes seconds
        raise InputError("the web demo needs gradio: pip install -r requirements-demo.txt")
    examples = None if options.examples == "none" else options.examples
    port = web.free_port(options.host, options.port)
    paths = list(dict.fromkeys(given.model_path or [DEMO]))

    from guided_diffusion.checkpoint import remote
    from guided_diffusion.web.translate import Studio

    local = [path for path in paths if not remote.is_id(path)]
    how = {"device": options.device, "precision": options.precision, "max_side": options.max_side}
    studio = Studio(paths, **how, weights=os.path.join(ROOT, "models", "vgg_normalised.pth"))
    with web.private_environment(offline=local == paths):
        from guided_diffusion.web import page

        written = functools.partial(web.command_line, examples=examples, device=options.device)
        note = "" if given.model_path else DEMO_NOTE
        blocks = page.build(studio, written, examples=examples, note=note, precision=options.precision)
        address = page.serve(blocks, host=options.host, port=port, examples=examples)
        web.warn_of_strangers(options.host)
        command.say(f"The page is at {address} (Ctrl-C ends it)", sys.stdout)
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            studio.close()
            page.close(blocks)
    return command.DONE


if __name__ == "__main__":
    command.run(serve, create_parser(), ranks="none")
