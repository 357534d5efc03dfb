"""Data sets: annotation files or generated scenes, checked, augmented and batched."""

from ldctl.data.formats import DataSpec, check_classes, in_class_order, open_dataset

__all__ = ["DataSpec", "check_classes", "in_class_order", "open_dataset"]
