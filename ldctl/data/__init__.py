"""Data sets: annotation files or generated scenes, checked, augmented and batched."""

from ldctl.data.formats import DataSpec, check_classes, in_class_order, open_dataset
from ldctl.data.raw import SMALLEST_SIDE

__all__ = ["SMALLEST_SIDE", "DataSpec", "check_classes", "in_class_order", "open_dataset"]
