"""Translate every image under --base_samples into the domain of --model_path (ILVR, ICCV 2021).

The result keeps the low frequencies of the reference.

example:
  python scripts/ilvr_sample.py --preset emoji --base_samples ref_imgs
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import translate_command

translate, create_parser = translate_command(
    "ilvr", __doc__, first=("down_n", "range_t"), without_effect={"use_ddim": None}
)

if __name__ == "__main__":
    command.run(translate, create_parser())
