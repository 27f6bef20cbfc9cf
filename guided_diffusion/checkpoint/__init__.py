"""Checkpoints: find out what a file is, load it safely, and save one that describes itself."""

from .loading import *  # noqa
