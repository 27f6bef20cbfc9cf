"""Translate every image under --base_samples into the domain of --model_path (EGSDE, NeurIPS 2022).

The reference is noised to step --t, then denoised with two energies as guidance. Without --timestep_respacing, --t
counts training steps, and --ls and --li are tuned for these. Predicted images are not clipped, and learned variances
are not used.

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
