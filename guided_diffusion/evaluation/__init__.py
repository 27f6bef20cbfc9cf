"""Measure folders of translated images and compare methods."""

from .features import NETWORKS, Extractor
from .protocol import PROTOCOLS, Evaluation, Instruments, evaluate, reader, target_statistics
from .table import METRICS, feature_metric, image_metric, paired_metric, set_distance

__all__ = [
    "METRICS", "NETWORKS", "PROTOCOLS", "Evaluation", "Extractor", "Instruments", "evaluate", "feature_metric",
    "image_metric", "paired_metric", "reader", "set_distance", "target_statistics",
]  # fmt: skip
