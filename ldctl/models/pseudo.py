"""Pseudo objects: what a teacher finds in images that nobody annotated."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ldctl.boxes import rank_in_group
from ldctl.models.detector import PostprocessSpec, final_boxes
from ldctl.types import Dense, Targets


@torch.no_grad()
def pseudo_objects(
    dense: Dense, size_hw: Int[Tensor, "B 2"], is_wanted: Bool[Tensor, " B"], spec: PostprocessSpec
) -> Targets:
    """Return the detections in some images of a batch as objects, best first: what `detect` finds, for all at once.

    Synchronises with the host five times, whatever the number of images: candidates and detections are counted.

    Args:
        dense: A detector's predictions.
        size_hw: Size of each image in the detector's input, without padding; boxes are clipped to it.
        is_wanted: Images to look at.
        spec: Thresholds.

    Returns:
        Boxes in pixels of the detector's input; no objects in images that were not to be looked at.
    """
    found = final_boxes(dense, size_hw, torch.ones_like(size_hw, dtype=torch.float32), spec, is_wanted)
    slot = rank_in_group(found.image)
    shape = len(size_hw), int(slot.max()) + 1 if len(slot) else 0  # synchronises
    targets = Targets(
        gt_xyxy=found.xyxy.new_zeros(*shape, 4),
        gt_label=found.label.new_zeros(shape),
        is_object=is_wanted.new_zeros(shape),
    )
    targets.gt_xyxy[found.image, slot] = found.xyxy
    targets.gt_label[found.image, slot] = found.label
    targets.is_object[found.image, slot] = True
    return targets
