"""Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023).

example: python scripts/ae_sample.py --preset emoji --base_samples ref_imgs
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import translate_command

RELEASED = ("use_ddim", "classifier_scale", "affine", "losstype", "init_with_blockadain", "diffusionmodel")

translate, create_parser = translate_command(
    "sddm", __doc__, first=("blocks", "range_t"), without_effect=dict.fromkeys(RELEASED)
)

if __name__ == "__main__":
    command.run(translate, create_parser())
