"""Distillation regions: which locations a student learns from, and how much each counts."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torchvision.ops import batched_nms

from ldctl.boxes import (
    EPS,
    box_area,
    box_iou,
    center_penalty,
    decode_ltrb,
    expected_distance,
    intersection,
    prior_boxes,
)
from ldctl.schema import Spec
from ldctl.types import Assigned, Dense, Locations, Pair, Targets, Where

Region = Literal["main", "vlr", "all", "inside_gt", "outside_gt", "finegrained", "gi"]
VlrKind = Literal["diou", "reference"]
FINE_GRAINED_SHARE = 0.5  # of an object's best IoU. Source: Fine-Grained imitation (CVPR 2019, arXiv:1906.03609)
# General instances. Source: GI imitation (CVPR 2021, arXiv:2103.02340)
GI_NMS_IOU = 0.3
NUM_GI = 10  # per image
# Best of an image that suppression looks at, for its cost grows with their square. Ten are nearly always among them:
# fewer are left only where all thousand mean fewer boxes.
GI_CANDIDATES = 1000


class RegionSpec(Spec):
    """How the valuable localization region (VLR) is drawn.

    Attributes:
        vlr: `"diou"` is the paper's definition; `"reference"` is what the released code computes, and what the
            published numbers come from (see `vlr_overlap`).
        gamma: Lower end of the VLR as a share of each object's positive threshold: 1 empties it, 0 takes all below the
            threshold whose overlap is not negative.
    """

    vlr: VlrKind = "diou"
    gamma: float = Field(default=0.25, ge=0, le=1)


def region(name: Region, spec: RegionSpec, pair: Pair, assigned: Assigned, targets: Targets) -> Where:
    """Draw a region.

    Args:
        name: Which.
        spec: How the VLR is drawn.
        pair: What student and teacher say.
        assigned: Which location answers for which object.
        targets: The objects.
    """
    locations = pair.student.locations
    match name:
        case "main":
            return main_region(pair.student, assigned)
        case "vlr":
            return vlr_region(spec, assigned, targets, locations)
        case "all":
            return all_region(assigned, locations)
        case "inside_gt" | "outside_gt":
            is_inside = inside_objects(locations, targets)
            return masked(is_inside if name == "inside_gt" else ~is_inside, assigned, locations)
        case "finegrained":
            return masked(fine_grained(locations, assigned, targets), assigned, locations)
        case "gi":
            return masked(general_instances(pair, assigned), assigned, locations)


@torch.no_grad()
def main_region(student: Dense, assigned: Assigned) -> Where:
    """Select the positives, weighted by the student's best score (over all classes, not only the object's).

    Source: GFL's released code weights its box losses so; LD's released code its main-region LD too. Differs from the
    latter: the score of heads that tell centerness is the product with it, as everywhere else.
    """
    return select(assigned.is_positive, student.best_score, student.locations)


@torch.no_grad()
def vlr_region(spec: RegionSpec, assigned: Assigned, targets: Targets, locations: Locations) -> Where:
    """Select the valuable localization region of every object, weighted by the prior boxes' best IoU.

    Source: LD (CVPR 2022, arXiv:2102.12252), algorithm 1.

    Differs from the paper: weighted by IoU instead of a mask, as in the released code. A location may also be positive,
    or ignored by RetinaNet's assigner; the released code takes positives out for RetinaNet, and for no other head.
    """
    iou, overlap = vlr_overlap(prior_boxes(locations), targets.gt_xyxy, spec.vlr)
    weight = vlr_weights(iou, overlap, assigned.threshold, gamma=spec.gamma)
    return select((weight > 0) & assigned.is_valid, weight, locations)


@torch.no_grad()
def all_region(assigned: Assigned, locations: Locations) -> Where:
    """Take all locations, with weight 1 where valid and 0 elsewhere; nearly all are, so picking rows would not pay."""
    num_images, num_locations = assigned.is_valid.shape
    image = torch.arange(num_images, device=assigned.is_valid.device)
    return Where(
        row=slice(None),
        weight=assigned.is_valid.flatten().float(),
        level=locations.level.repeat(num_images),
        image=image.repeat_interleave(num_locations),
        num_images=num_images,
        num_levels=len(locations.level_hw),
    )


def vlr_overlap(
    prior_xyxy: Float[Tensor, "A 4"], gt_xyxy: Float[Tensor, "B G 4"], kind: VlrKind
) -> tuple[Float[Tensor, "B A G"], Float[Tensor, "B A G"]]:
    """Return the IoU of prior boxes and objects, and the overlap that places a prior box in or out of the VLR.

    `"diou"`: IoU minus the centre penalty, as in the paper. `"reference"`: the released code divides the intersection
    by the *prior box's* area instead of the union. A small prior inside a large object then scores 1 and falls out, one
    across the object's border falls in: the region becomes a ring along the border on fine levels.
    """
    prior, gt = prior_xyxy[None, :, None], gt_xyxy[:, None]
    shared = intersection(prior, gt)
    iou = shared / (box_area(prior) + box_area(gt) - shared).clamp(min=EPS)
    first = iou if kind == "diou" else shared / box_area(prior).clamp(min=EPS)
    return iou, first - center_penalty(prior, gt)


def vlr_weights(
    iou: Float[Tensor, "B A G"], overlap: Float[Tensor, "B A G"], threshold: Float[Tensor, "B G"], *, gamma: float
) -> Float[Tensor, "B A"]:
    """Weight each location by how much its localization is worth imitating.

    A location is in the VLR of object `g` when `gamma * threshold[g] <= overlap < threshold[g]`: near the object, yet
    below its positive threshold. Its weight is its best IoU among those.

    Returns:
        Weights in [0, 1]; zero outside every VLR and for images without objects.

    Source: LD (CVPR 2022, arXiv:2102.12252), valuable localization region.
    """
    if iou.shape[-1] == 0:
        return iou.new_zeros(iou.shape[:2])
    lower = (gamma * threshold)[:, None]
    in_band = (lower <= overlap) & (overlap < threshold[:, None])
    return iou.where(in_band, 0.0).amax(dim=-1)


@torch.no_grad()
def inside_objects(locations: Locations, targets: Targets) -> Bool[Tensor, "B A"]:
    """Tell which locations lie inside an object's box, its border left out."""
    xy = locations.xy[None, :, None]
    is_right_below = (xy > targets.gt_xyxy[:, None, :, :2]).all(dim=-1)
    is_left_above = (xy < targets.gt_xyxy[:, None, :, 2:]).all(dim=-1)
    return (is_right_below & is_left_above & targets.is_object[:, None]).any(dim=-1)


@torch.no_grad()
def fine_grained(locations: Locations, assigned: Assigned, targets: Targets) -> Bool[Tensor, "B A"]:
    """Tell which prior boxes overlap an object more than half as well as the best of all does.

    Source: Fine-Grained imitation (CVPR 2019, arXiv:1906.03609).
    """
    iou = box_iou(prior_boxes(locations)[None, :, None], targets.gt_xyxy[:, None])
    iou = iou.where(assigned.is_valid[..., None] & targets.is_object[:, None], 0.0)
    if iou.shape[-1] == 0:
        return torch.zeros_like(assigned.is_valid)
    return (iou > FINE_GRAINED_SHARE * iou.amax(dim=1, keepdim=True)).any(dim=-1)


@torch.no_grad()
def general_instances(pair: Pair, assigned: Assigned) -> Bool[Tensor, "B A"]:
    """Tell where student and teacher disagree most: at most ten locations of each image, one for each box.

    A location's score is the largest difference of a class score; its box is that of the detector that is surer of
    this class. Non-maximum suppression keeps the best location of those that mean one box.

    Source: GI imitation (CVPR 2021, arXiv:2103.02340).

    Differs from the released LD code: that takes ten per level of the whole batch, whose images suppress one another.
    """
    locations = pair.student.locations
    student, teacher = pair.student.score, pair.teacher.score
    gap, label = (student - teacher).abs().max(dim=-1)
    is_student_surer = (student > teacher).gather(-1, label[..., None])
    best = gap.where(assigned.is_valid, -1.0).topk(min(GI_CANDIDATES, gap.shape[1]))
    row, stride = best.indices[..., None, None], locations.stride[best.indices]
    boxes = []
    for dense in (pair.student, pair.teacher):  # which may have different bins
        edge = dense.edge.gather(1, row.expand(-1, -1, *dense.edge.shape[2:]))
        boxes.append(decode_ltrb(dense.locations.xy[best.indices], expected_distance(edge), stride))
    xyxy = boxes[0].where(is_student_surer.gather(1, best.indices[..., None]), boxes[1])
    num_images = len(gap)
    image = torch.arange(num_images, device=gap.device).repeat_interleave(best.indices.shape[1])
    # images are told apart by shifts that only keep boxes above zero apart; decoded boxes may lie below
    positive_xyxy = (xyxy - xyxy.amin()).flatten(0, 1)
    kept = batched_nms(positive_xyxy, best.values.flatten(), image, GI_NMS_IOU)  # best first; synchronises
    is_of = image[kept, None] == torch.arange(num_images, device=gap.device)
    is_first = ((is_of.cumsum(dim=0) <= NUM_GI) & is_of).any(dim=1) & (best.values.flatten()[kept] >= 0)
    mask = torch.zeros_like(assigned.is_valid)
    mask[image[kept], best.indices.flatten()[kept]] = is_first
    return mask


def masked(mask: Bool[Tensor, "B A"], assigned: Assigned, locations: Locations) -> Where:
    """Select the valid locations of a mask, each with weight 1."""
    return select(mask & assigned.is_valid, torch.ones_like(mask, dtype=torch.float32), locations)


def select(mask: Bool[Tensor, "B A"], weight: Float[Tensor, "B A"], locations: Locations) -> Where:
    """Turn a mask over locations into rows, so that losses cost what the region holds.

    Synchronises with the host once: the number of rows decides shapes.
    """
    num_images, num_locations = mask.shape
    row = mask.flatten().nonzero().squeeze(1)
    return Where(
        row=row,
        weight=weight.flatten()[row],
        level=locations.level[row % num_locations],
        image=row // num_locations,
        num_images=num_images,
        num_levels=len(locations.level_hw),
    )
