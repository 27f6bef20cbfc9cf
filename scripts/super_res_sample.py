"""Enlarge a folder of small images, or the .npz file of another sampling command, with a super-resolution model.

An output has the name of its input, and depends only on the flags, --seed and the input's relative path.

example:
  python scripts/super_res_sample.py --model_path 64_256_upsampler.pt \\
      --base_samples samples_16x64x64x3.npz --timestep_respacing 250
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import SmallImageOptions, translate_command

DEFAULTS = {"num_samples": 10_000, "npz": True, "batch_size": 16, "sigma_small": False}

translate, create_parser = translate_command(
    "super_resolution", __doc__, outputs=SmallImageOptions, defaults=DEFAULTS, spelling={"image_size": "large_size"}
)

if __name__ == "__main__":
    command.run(translate, create_parser())
