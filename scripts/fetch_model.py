"""Download a published checkpoint to models/; without a name, list those that are known."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

import time

from guided_diffusion.checkpoint.fetch import FILES, fetch
from guided_diffusion.cli.flags import Given, Parser

DESCRIPTION = """
Download a published checkpoint. A download that was cut off resumes when the command is run again, and what arrives is
verified as far as the server's and the file's own checksums allow.

example:
  python scripts/fetch_model.py 256x256_diffusion_uncond.pt
"""


def create_parser() -> Parser:
    parser = Parser(DESCRIPTION, usage="[NAME] [--save_dir DIR]")
    parser.add_argument("name", nargs="?", help="file to download; without it, all that are known are listed")
    parser.add_argument(
        "--save_dir",
        default=os.path.join(ROOT, "models"),
        metavar="DIR",
        help="folder for the file (default models)",
    )
    return parser


class Progress:
    """A line on stderr every ten seconds."""

    def __init__(self) -> None:
        self.told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.told >= 10:
            self.told = time.monotonic()
            share = f", {100 * done // total}%" if total else ""
            command.say(f"{done >> 20} MiB{share}")


def main(given: Given) -> int:
    if given.name is None:
        for name, remote in FILES.items():
            print(f"{name:36} {remote.what}")
        return command.DONE
    print(f"{fetch(given.name, given.save_dir, report=Progress())} is complete")
    return command.DONE


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
