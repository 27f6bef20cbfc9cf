"""Translate every image under --base_samples into the domain of --model_path (SDEdit, ICLR 2022).

The reference is noised to step --t, then denoised. Without --timestep_respacing, --t counts training steps. Predicted
images are not clipped, and learned variances are not used.

example:
  python scripts/sdedit_sample.py --preset emoji --base_samples ref_imgs
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import translate_command

translate, create_parser = translate_command("sdedit", __doc__, first=("start",))

if __name__ == "__main__":
    command.run(translate, create_parser())
