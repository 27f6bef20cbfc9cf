"""Measuring folders of translated images and comparing methods."""

from .protocol import PROTOCOLS, Evaluation, Instruments, evaluate, reader, target_statistics
from .table import METRICS, paired_metric, set_distance

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Evaluation",
    "Instruments",
    "evaluate",
    "paired_metric",
    "reader",
    "set_distance",
    "target_statistics",
]
