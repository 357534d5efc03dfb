"""Data sets: annotation files or generated scenes, checked, augmented and batched."""

from ldctl.data.formats import DataSpec, check_classes, in_class_order, open_dataset
from ldctl.data.raw import SMALLEST_SIDE
from ldctl.data.unlabelled import as_many_labelled, join, only_labelled, read_unlabelled

__all__ = [
    "SMALLEST_SIDE",
    "DataSpec",
    "as_many_labelled",
    "check_classes",
    "in_class_order",
    "join",
    "only_labelled",
    "open_dataset",
    "read_unlabelled",
]
