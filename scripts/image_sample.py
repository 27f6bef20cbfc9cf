"""Make images of a diffusion model's own, without references: 000000.png, 000001.png, ... in --save_dir.

An image depends on the flags, --seed and its number alone. A class-conditional model makes images of random classes,
or of --class_index.

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
