"""Pseudo objects: what a teacher finds in images that nobody annotated."""

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torchvision.ops import nms

from ldctl.boxes import decode_ltrb, expected_distance
from ldctl.models.detector import PostprocessSpec
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
    num_images, num_classes = dense.cls.shape[0], dense.cls.shape[-1]
    score, place = best_pairs(dense.score, dense.locations.level_sizes, spec.candidates_per_level)
    image, column = ((score > spec.score_threshold) & is_wanted[:, None]).nonzero(as_tuple=True)  # synchronises
    score, place = score[image, column], place[image, column]
    row, label = place // num_classes, place % num_classes
    ltrb = expected_distance(dense.edge[image, row])
    xyxy = decode_ltrb(dense.locations.xy[row], ltrb, dense.locations.stride[row])
    xyxy = torch.minimum(xyxy.clamp(min=0), size_hw.flip(-1).repeat(1, 2)[image])
    left = (xyxy[:, 2:] > xyxy[:, :2]).all(dim=1).nonzero().squeeze(1)  # synchronises
    image, score, label, xyxy = image[left], score[left], label[left], xyxy[left]
    # One NMS for all images and classes: each has a place of its own, so far apart that boxes meet only their like. In
    # float64, which does not round what is left of a box's position there.
    shift = (image * num_classes + label).double() * (size_hw.max() + 1)
    keep = nms(xyxy.double() + shift[:, None], score.double(), spec.nms_iou)  # synchronises
    keep = keep[image[keep].argsort(stable=True)]  # by image, the best first
    count = image[keep].bincount(minlength=num_images)
    slot = torch.arange(len(keep), device=keep.device) - (count.cumsum(0) - count)[image[keep]]
    best = (slot < spec.max_detections).nonzero().squeeze(1)  # synchronises
    keep, slot = keep[best], slot[best]
    found_in = image[keep]
    shape = num_images, min(int(count.max()), spec.max_detections)  # synchronises
    targets = Targets(
        gt_xyxy=xyxy.new_zeros(*shape, 4),
        gt_label=label.new_zeros(shape),
        is_object=is_wanted.new_zeros(shape),
    )
    targets.gt_xyxy[found_in, slot] = xyxy[keep]
    targets.gt_label[found_in, slot] = label[keep]
    targets.is_object[found_in, slot] = True
    return targets


def best_pairs(
    score: Float[Tensor, "B A C"], level_sizes: tuple[int, ...], count: int
) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"]]:
    """Return score and place of the `count` best pairs of location and class of each level, level by level.

    A place is `location * num_classes + class`.
    """
    num_classes = score.shape[-1]
    scores, places, start = [], [], 0
    for size in level_sizes:
        of_level = score[:, start : start + size].flatten(1)
        best = of_level.topk(min(count, of_level.shape[1]), dim=1)
        scores.append(best.values)
        places.append(best.indices + start * num_classes)
        start += size
    return torch.cat(scores, dim=1), torch.cat(places, dim=1)
