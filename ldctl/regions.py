"""Distillation regions: which locations a student learns from, and how much each counts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from ldctl.boxes import (
    EPS,
    box_area,
    box_iou,
    center_penalty,
    decode_ltrb,
    expected_distance,
    group_nms,
    intersection,
    level_table,
    locations_of,
    prior_boxes,
    prior_table,
    rank_in_group,
)
from ldctl.schema import Spec
from ldctl.types import Assigned, Dense, Locations, Pair, Targets, Where

Region = Literal["main", "vlr", "all", "inside_gt", "outside_gt", "finegrained", "gi"]
DRAWN: tuple[Region, ...] = ("main", "vlr", "inside_gt", "outside_gt", "finegrained")  # what the objects alone decide
VlrKind = Literal["diou", "reference"]
FINE_GRAINED_SHARE = 0.5  # of an object's best IoU. Source: Fine-Grained imitation (CVPR 2019, arXiv:1906.03609)
# General instances. Source: GI imitation (CVPR 2021, arXiv:2103.02340)
GI_NMS_IOU = 0.3
NUM_GI = 10  # per image
# Best of an image that suppression looks at, for its cost grows with their square. Ten are nearly always among them:
# fewer are left only where all thousand mean fewer boxes.
GI_CANDIDATES = 1000
ROUNDING = 1e-3  # share of an IoU by which a bound on it may be off and still lose nothing

Name = TypeVar("Name", bound=str)


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


@dataclass(frozen=True)
class Encounters:
    """Prior boxes and objects of the same image that share some area.

    Attributes:
        row: Of the prior box's location: `image * A + location`.
        target: Of the object: `image * G + object`.
    """

    row: Int64[Tensor, " N"]
    target: Int64[Tensor, " N"]


def region(name: Region, spec: RegionSpec, pair: Pair, assigned: Assigned, targets: Targets) -> Where:
    """Draw a region.

    Args:
        name: Which.
        spec: How the VLR is drawn.
        pair: What student and teacher say.
        assigned: Which location answers for which object.
        targets: The objects.
    """
    match name:
        case "all":
            return all_region(assigned, pair.student.locations)
        case "gi":
            return gi_region(pair, assigned)
        case _:
            return draw((name,), spec, pair.student, assigned, targets)[name]


@torch.no_grad()
def draw(
    names: Collection[Region], spec: RegionSpec, student: Dense, assigned: Assigned, targets: Targets
) -> dict[Region, Where]:
    """Draw regions that the objects alone decide; see `DRAWN`.

    However many there are, this synchronises with the host once for the number of rows of all, and once more if any of
    them compares boxes.

    Args:
        names: Which.
        spec: How the VLR is drawn.
        student: Its predictions, whose scores are the weights of the main region.
        assigned: Which location answers for which object.
        targets: The objects.
    """
    locations = student.locations
    met = meet(names, spec, assigned, targets, locations)
    weights: dict[Region, Tensor] = {}
    for name in names:
        match name:
            case "main":
                weights[name] = assigned.is_positive.float()
            case "vlr":
                weights[name] = vlr_weights(spec, met, assigned, targets, locations)
            case "finegrained":
                weights[name] = fine_grained(met, assigned, targets, locations).float()
            case "inside_gt":
                weights[name] = inside_objects(met, assigned, targets, locations).float()
            case "outside_gt":
                weights[name] = 1 - inside_objects(met, assigned, targets, locations).float()
    drawn = pick_rows({name: weight * assigned.is_valid for name, weight in weights.items()}, locations)
    if "main" in drawn:
        drawn["main"] = weighted_by_score(drawn["main"], student)
    return drawn


@torch.no_grad()
def main_region(student: Dense, assigned: Assigned) -> Where:
    """Select the positives, weighted by score; see `draw`."""
    is_main = assigned.is_positive & assigned.is_valid
    return weighted_by_score(pick_rows({"main": is_main.float()}, student.locations)["main"], student)


def weighted_by_score(main: Where, student: Dense) -> Where:
    """Weight rows by the student's best score (over all classes, not only the object's).

    Source: GFL's released code weights its box losses so; LD's released code its main-region LD too. Differs from the
    latter: the score of heads that tell centerness is the product with it, as everywhere else.
    """
    (at_main,) = student.at([main.picked])
    return replace(main, weight=at_main.best_score.squeeze(0))


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


def vlr_weights(
    spec: RegionSpec, met: Encounters, assigned: Assigned, targets: Targets, locations: Locations
) -> Float[Tensor, "B A"]:
    """Weight each location by how much its localization is worth imitating.

    A location is in the VLR of object `g` when `gamma * threshold[g] <= overlap < threshold[g]`: near the object, yet
    below its positive threshold. Its weight is its prior box's best IoU among those.

    Returns:
        Weights in [0, 1]; zero outside every VLR and for images without objects.

    Source: LD (CVPR 2022, arXiv:2102.12252), algorithm 1.

    Differs from the paper: weighted by IoU instead of a mask, as in the released code. A location may also be positive,
    or ignored by RetinaNet's assigner; the released code takes positives out for RetinaNet, and for no other head.
    """
    prior_xyxy = prior_boxes(locations)[met.row % len(locations.level)]
    iou, overlap = vlr_overlap(prior_xyxy, targets.gt_xyxy.flatten(0, 1)[met.target], spec.vlr)
    is_in_band = in_vlr_band(overlap, assigned.threshold.flatten()[met.target], gamma=spec.gamma)
    return best_of_each(met, iou.where(is_in_band, 0.0), assigned)


def in_vlr_band(overlap: Float[Tensor, "*S"], threshold: Float[Tensor, "*S"], *, gamma: float) -> Bool[Tensor, "*S"]:
    """Tell which overlaps are high enough to be near the object, yet below its positive threshold."""
    return (gamma * threshold <= overlap) & (overlap < threshold)


def vlr_overlap(
    prior_xyxy: Float[Tensor, "*#S 4"], gt_xyxy: Float[Tensor, "*#S 4"], kind: VlrKind
) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
    """Return the IoU of prior boxes and objects, and the overlap that places a prior box in or out of the VLR.

    `"diou"`: IoU minus the centre penalty, as in the paper. `"reference"`: the released code divides the intersection
    by the *prior box's* area instead of the union. A small prior inside a large object then scores 1 and falls out, one
    across the object's border falls in: the region becomes a ring along the border on fine levels.
    """
    shared = intersection(prior_xyxy, gt_xyxy)
    iou = shared / (box_area(prior_xyxy) + box_area(gt_xyxy) - shared).clamp(min=EPS)
    first = iou if kind == "diou" else shared / box_area(prior_xyxy).clamp(min=EPS)
    return iou, first - center_penalty(prior_xyxy, gt_xyxy)


def meet(
    names: Collection[str], spec: RegionSpec, assigned: Assigned, targets: Targets, locations: Locations
) -> Encounters:
    """Find the encounters that some regions are made of, once for all; none where no region compares boxes."""
    if {"inside_gt", "outside_gt", "finegrained"} & set(names):
        return encounters(locations, targets, on_all_levels(targets, locations))
    if "vlr" in names:
        return encounters(locations, targets, may_be_valuable(spec, assigned, targets, locations))
    none = assigned.label.new_zeros(0)
    return Encounters(none, none)


def may_be_valuable(
    spec: RegionSpec, assigned: Assigned, targets: Targets, locations: Locations
) -> Bool[Tensor, "B G P"]:
    """Tell on which levels an object can have a VLR at all: boxes of too different sizes have too low an IoU."""
    if spec.vlr == "reference":
        return on_all_levels(targets, locations)
    _, stride, _ = level_table(locations.level_hw, locations.level_stride, targets.gt_xyxy.device)
    prior_wh = prior_table(locations.prior_wh, stride.device)
    area = box_area(targets.gt_xyxy)[..., None, None]
    prior_area = prior_wh.prod(dim=1) * stride.square()[:, None]
    highest_iou = (torch.minimum(area, prior_area) / torch.maximum(area, prior_area)).amax(dim=-1)
    lowest_iou = spec.gamma * assigned.threshold.where(targets.is_object, 0.0)[..., None]
    return targets.is_object[..., None] & (highest_iou >= (1 - ROUNDING) * lowest_iou)


def on_all_levels(targets: Targets, locations: Locations) -> Bool[Tensor, "B G P"]:
    """Tell to look for each object's encounters on all levels."""
    return targets.is_object[..., None].expand(-1, -1, len(locations.level_hw))


def encounters(locations: Locations, targets: Targets, is_wanted: Bool[Tensor, "B G P"]) -> Encounters:
    """Find the prior boxes that share area with an object, by arithmetic on the grid instead of comparing all.

    Of a cell with several of them all are found, if the widest and the highest could.

    Synchronises with the host once: how many there are decides shapes.

    Args:
        locations: The grid.
        targets: Objects.
        is_wanted: On which levels to look for each object's.
    """
    device = targets.gt_xyxy.device
    level_hw, stride, first = level_table(locations.level_hw, locations.level_stride, device)
    corner = targets.gt_xyxy[:, :, None] / stride[:, None] - locations.offset  # B G P 4, in columns and rows
    # a prior box that only touches the object shares nothing with it
    reach_wh = prior_table(locations.prior_wh, device).amax(dim=0) / 2
    start_xy = ((corner[..., :2] - reach_wh).floor().long() + 1).clamp(min=0)
    end_xy = torch.minimum((corner[..., 2:] + reach_wh).ceil().long(), level_hw.flip(1))
    num_xy = (end_xy - start_xy).clamp(min=0)
    count = (num_xy.prod(dim=-1) * is_wanted).flatten()
    window = torch.arange(len(count), device=device).repeat_interleave(count)  # synchronises
    number = torch.arange(len(window), device=device) - (count.cumsum(0) - count)[window]
    start_x, start_y, num_x = torch.cat((start_xy, num_xy[..., :1]), dim=-1).flatten(0, 2)[window].unbind(dim=1)
    y_in_window = number // num_x
    x, y = start_x + number - y_in_window * num_x, start_y + y_in_window
    num_levels = len(locations.level_hw)
    target, level = window // num_levels, window % num_levels
    image = target // max(targets.gt_label.shape[1], 1)
    num_priors = locations.num_priors
    cell = image * (len(locations.level) // num_priors) + first[level] + y * level_hw[level, 1] + x
    return Encounters(locations_of(cell, num_priors).flatten(), target.repeat_interleave(num_priors))


def best_of_each(met: Encounters, value: Float[Tensor, " N"], assigned: Assigned) -> Float[Tensor, "B A"]:
    """Return the highest value of each location's encounters, 0 where it has none."""
    best = value.new_zeros(assigned.label.numel()).scatter_reduce(0, met.row, value, reduce="amax")
    return best.view(assigned.label.shape)


def inside_objects(met: Encounters, assigned: Assigned, targets: Targets, locations: Locations) -> Bool[Tensor, "B A"]:
    """Tell which locations lie inside an object's box, its border left out."""
    xy, gt_xyxy = locations.xy[met.row % len(locations.level)], targets.gt_xyxy.flatten(0, 1)[met.target]
    is_inside = (xy > gt_xyxy[:, :2]).all(dim=-1) & (xy < gt_xyxy[:, 2:]).all(dim=-1)
    return best_of_each(met, is_inside.float(), assigned) > 0


def fine_grained(met: Encounters, assigned: Assigned, targets: Targets, locations: Locations) -> Bool[Tensor, "B A"]:
    """Tell which prior boxes overlap an object more than half as well as the best of all does.

    Source: Fine-Grained imitation (CVPR 2019, arXiv:1906.03609).
    """
    prior_xyxy = prior_boxes(locations)[met.row % len(locations.level)]
    iou = box_iou(prior_xyxy, targets.gt_xyxy.flatten(0, 1)[met.target]) * assigned.is_valid.flatten()[met.row]
    best = iou.new_zeros(targets.is_object.numel()).scatter_reduce(0, met.target, iou, reduce="amax")
    return best_of_each(met, (iou > FINE_GRAINED_SHARE * best[met.target]).float(), assigned) > 0


@torch.no_grad()
def gi_region(pair: Pair, assigned: Assigned) -> Where:
    """Select the general instances, each with weight 1; where an image has less than ten, other rows with weight 0.

    So their number needs no look from the host.
    """
    mask = general_instances(pair, assigned) & assigned.is_valid
    row = mask.float().topk(min(NUM_GI, mask.shape[1]), dim=1).indices.sort(dim=1).values
    row = (row + torch.arange(len(mask), device=row.device)[:, None] * mask.shape[1]).flatten()
    return rows_of(row, mask.float(), pair.student.locations)


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
    kept = group_nms(xyxy.flatten(0, 1), best.values.flatten(), image, GI_NMS_IOU)  # of an image best first
    is_first = (rank_in_group(image[kept]) < NUM_GI) & (best.values.flatten()[kept] >= 0)
    mask = torch.zeros_like(assigned.is_valid)
    mask[image[kept], best.indices.flatten()[kept]] = is_first
    return mask


def pick_rows(weights: Mapping[Name, Float[Tensor, "B A"]], locations: Locations) -> dict[Name, Where]:
    """Turn weights over locations into rows, so that losses cost what the region holds.

    Synchronises with the host once for all regions: the number of rows decides shapes.

    Args:
        weights: Of each location by the region's name; above 0 inside.
        locations: The grid.
    """
    counts = torch.stack([(weight > 0).sum() for weight in weights.values()]).tolist()  # synchronises
    picked = {}
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        picked[name] = rows_of(torch.nonzero_static(weight.flatten(), size=count).squeeze(1), weight, locations)
    return picked


def rows_of(row: Int64[Tensor, " N"], weight: Float[Tensor, "B A"], locations: Locations) -> Where:
    """Return some rows with their weights."""
    num_images, num_locations = weight.shape
    return Where(
        row=row,
        weight=weight.flatten()[row],
        level=locations.level[row % num_locations],
        image=row // num_locations,
        num_images=num_images,
        num_levels=len(locations.level_hw),
    )
