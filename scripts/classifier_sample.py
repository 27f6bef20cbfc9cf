"""Sample images of random classes, or of --class_index, with classifier guidance, as guided-diffusion does.

Writes 000000.png, 000001.png, ... to --save_dir. An image depends only on the flags, --seed and its number.

example:
  python scripts/classifier_sample.py --model_path 256x256_diffusion.pt \\
      --classifier_path 256x256_classifier.pt --num_samples 64 \\
      --timestep_respacing 250
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import NumberOptions, translate_command

DEFAULTS = {"num_samples": 10_000, "npz": True, "batch_size": 16, "sigma_small": False}

translate, create_parser = translate_command(
    "classifier", __doc__, first=("classifier", "classifier_scale"), outputs=NumberOptions, defaults=DEFAULTS
)

if __name__ == "__main__":
    command.run(translate, create_parser())
