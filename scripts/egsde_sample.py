"""Translate every image under --base_samples into the domain of --model_path (EGSDE, NeurIPS 2022).

The reference is noised by --t steps, then denoised under two energies. Without --timestep_respacing, all steps that the
model was trained with count; --ls and --li are made for these. Predicted images are not clipped, learned variances are
not used.

example:
  python scripts/egsde_sample.py --preset cat2dog \\
      --base_samples data/afhq/val/cat
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import translate_command

translate, create_parser = translate_command("egsde", __doc__, first=("start", "ls", "li", "encoder", "down_n"))

if __name__ == "__main__":
    command.run(translate, create_parser())
