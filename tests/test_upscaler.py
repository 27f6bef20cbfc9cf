"""The upscaler: its codec, its file, its training data, and a run that is killed and resumes."""

import numpy as np
import pytest
import torch
from PIL import Image
from scripts_in_process import run_script
