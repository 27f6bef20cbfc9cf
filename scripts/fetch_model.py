"""Download a published checkpoint. The file is checked before it gets its final name.

example:
  python scripts/fetch_model.py 256x256_diffusion_uncond.pt
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

import socket

from guided_diffusion.checkpoint.remote import FILES, fetch
from guided_diffusion.cli.flags import Given, Parser


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="[NAME] [--save_dir DIR]")
    parser.add_argument("name", nargs="?", help="file to download; by default, list the available files")
    parser.add_argument(
        "--save_dir", default=os.path.join(ROOT, "models"), metavar="DIR", help="output folder (default models)"
    )
    return parser


def main(given: Given) -> int:
    if given.name is None:
        for name, url in FILES.items():
            print(f"{name:36} {url}")
        return command.DONE
    socket.setdefaulttimeout(60)  # seconds without a byte
    print(f"{fetch(given.name, given.save_dir, progress=sys.stderr.isatty())} is complete")
    return command.DONE


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
