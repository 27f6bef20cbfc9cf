"""Sample images from a diffusion model, without references.

Writes 000000.png, 000001.png, ... to --save_dir. An image depends only on the flags, --seed and its number. With a
class-conditional model, classes are random, or --class_index.

example:
  python scripts/image_sample.py --model_path models/fluent3d_64.safetensors \\
      --num_samples 64 --timestep_respacing ddim50 --use_ddim True
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.sampling import NumberOptions, translate_command

translate, create_parser = translate_command("unconditional", __doc__, first=("use_ddim",), outputs=NumberOptions)

if __name__ == "__main__":
    command.run(translate, create_parser())
