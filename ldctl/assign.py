"""Which location answers for which object, by ATSS, FCOS or RetinaNet, and each object's IoU threshold."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from ldctl.boxes import box_area, box_iou, encode_ltrb, level_table, locations_of, prior_boxes
from ldctl.types import Assigned, Locations, Rule, Targets

NUM_CANDIDATES = 9  # per object and level. Source: ATSS, table 8
MIN_CENTER_MARGIN = 0.01  # pixels that a location must lie inside its object. Source: ATSS's released code
# The 9 grid points nearest to any point stand in its 9 nearest columns and 9 nearest rows: a point in the p-th nearest
# column and q-th nearest row has at least p * q - 1 points no farther than itself. Two more cover ties at the rim.
WINDOW = NUM_CANDIDATES + 2
CENTER_RADIUS = 1.5  # strides around an object's centre that answer for it. Source: FCOS's released code
CENTER_WINDOW = 3  # columns and rows of which fewer than 1.5 strides lie on either side
# Strides from a location to the farthest edge of its object, at least and at most; the finest level also answers for
# less, the coarsest for more. Source: FCOS (ICCV 2019, arXiv:1904.01355), 3.2: 64 to 128 pixels on stride 16
MIN_REACH, MAX_REACH = 4.0, 8.0
INFINITY_BITS = 0x7F800000  # of float32; see `ordered_bits`
# A location whose prior box overlaps no object so much is background. From 0.5 on it answers for the object. Source:
# RetinaNet (ICCV 2017, arXiv:1708.02002), 4.1
BACKGROUND_IOU = 0.4
POSITIVE_BITS = 0x3F000000  # of 0.5; see `ordered_bits`
# Prior boxes are at most 9 strides wide or high. One that overlaps an object by 0.4 lies in it off its centre by three
# quarters of that (the object is 2.5 times as wide), else by less: 7 columns and rows on either side of the nearest.
OVERLAP_WINDOW = 15
ABOVE_ONE_BITS = 0x40000000  # of 2.0, above any IoU; see `ordered_bits`


@dataclass(frozen=True)
class Candidates:
    """The locations that ATSS considers for each object.

    Attributes:
        index: Locations.
        is_candidate: Whether each is one: a level with fewer than 9 valid locations leaves some out.
        iou: Of the location's prior box and the object.
        threshold: Each object's positive IoU threshold: mean plus standard deviation of its candidates'.
    """

    index: Int64[Tensor, "B G K"]
    is_candidate: Bool[Tensor, "B G K"]
    iou: Float[Tensor, "B G K"]
    threshold: Float[Tensor, "B G"]


@torch.no_grad()
def assign(locations: Locations, targets: Targets, pad_hw: Int[Tensor, "B 2"], num_classes: int) -> Assigned:
    """Assign objects to locations by Adaptive Training Sample Selection.

    For each object and level the 9 nearest locations are candidates. The object's threshold is the mean plus the
    (unbiased) standard deviation of its candidates' IoU. A candidate is positive when its prior box reaches the
    threshold and the location lies inside the object; a location claimed by several objects goes to the one of highest
    IoU, then lowest index. An object may obtain no location.

    Args:
        locations: The grid of the padded batch.
        targets: Objects without crowds; crowds are background, as in the reference.
        pad_hw: Height and width of each image padded to a multiple of 32 on its own; locations beyond are invalid.
        num_classes: The label that means background.

    Returns:
        Assignments; all background where an image has no objects.

    Source: ATSS (CVPR 2020, arXiv:1912.02424), algorithm 1.

    Differs from the paper: equal distances go to the higher location index. Any fixed rule serves; this one reproduces
    the reference's assignment.
    """
    found = candidates(locations, targets, pad_hw)
    xy = locations.xy[found.index]
    gt_xyxy = targets.gt_xyxy[:, :, None]
    margin = torch.cat((xy - gt_xyxy[..., :2], gt_xyxy[..., 2:] - xy), dim=-1).amin(dim=-1)
    is_claim = found.is_candidate & (found.iou >= found.threshold[..., None]) & (margin > MIN_CENTER_MARGIN)
    owner, _ = resolve_claims(found.index, is_claim, ordered_bits(found.iou), len(locations.level))
    return assigned_to(owner, found.threshold, locations, targets, pad_hw, num_classes)


@torch.no_grad()
def assign_fcos(locations: Locations, targets: Targets, pad_hw: Int[Tensor, "B 2"], num_classes: int) -> Assigned:
    """Assign objects to locations as FCOS does, with centre sampling.

    A location answers for an object when it lies inside it, less than 1.5 strides from its centre in each direction,
    and the object's farthest edge is in the level's range; of several objects for the smallest, then the one of lowest
    index. The thresholds are those of ATSS.

    Args:
        locations: The grid of the padded batch.
        targets: Objects without crowds; crowds are background, as in the reference.
        pad_hw: Height and width of each image padded to a multiple of 32 on its own; locations of cells beyond are
            invalid.
        num_classes: The label that means background.

    Returns:
        Assignments; all background where an image has no objects.

    Source: FCOS (ICCV 2019, arXiv:1904.01355), 3.2, and its released code for the centre sampling.

    Differs from the paper: locations beyond the image's own padding take part in nothing, where the released code makes
    them background. Differs from LD's released code: the VLR is drawn by prior boxes and thresholds as for other heads,
    not as all of an object's inside that is not positive.
    """
    index, is_inside = grid_window(locations, targets.gt_xyxy, pad_hw, CENTER_WINDOW)
    xy, stride = locations.xy[index], locations.stride[index]
    gt_xyxy = targets.gt_xyxy[:, :, None, None]
    center = (gt_xyxy[..., :2] + gt_xyxy[..., 2:]) / 2
    radius = CENTER_RADIUS * stride[..., None]
    top_left = torch.maximum(center - radius, gt_xyxy[..., :2])
    bottom_right = torch.minimum(center + radius, gt_xyxy[..., 2:])
    margin = encode_ltrb(xy, torch.cat((top_left, bottom_right), dim=-1), stride).amin(dim=-1)
    reach = encode_ltrb(xy, gt_xyxy, stride).amax(dim=-1)
    level, coarsest = locations.level[index], len(locations.level_hw) - 1
    is_in_range = ((reach >= MIN_REACH) | (level == 0)) & ((reach <= MAX_REACH) | (level == coarsest))
    is_claim = is_inside & targets.is_object[:, :, None, None] & (margin > 0) & is_in_range
    smallness = (INFINITY_BITS - ordered_bits(box_area(gt_xyxy))).expand_as(index)
    owner, _ = resolve_claims(index.flatten(2), is_claim.flatten(2), smallness.flatten(2), len(locations.level))
    threshold = candidates(locations, targets, pad_hw).threshold
    return assigned_to(owner, threshold, locations, targets, pad_hw, num_classes)


@torch.no_grad()
def assign_max_iou(locations: Locations, targets: Targets, pad_hw: Int[Tensor, "B 2"], num_classes: int) -> Assigned:
    """Assign objects to locations as RetinaNet does: by the IoU of prior boxes.

    A location answers for the object that its prior box overlaps best, if by 0.5 or more; among equals for the one of
    lowest index. In any case an object takes all the locations whose prior boxes overlap it best, and equally, from
    whatever other object; among several such objects the one of highest index has it. Of the other locations those that
    overlap an object by 0.4 or more are ignored. The thresholds are those of ATSS.

    Only a 15 x 15 window of each level's grid is looked at (see `OVERLAP_WINDOW`), so the cost does not depend on the
    image size.

    Args:
        locations: The grid of the padded batch.
        targets: Objects without crowds; crowds are background, as in the reference.
        pad_hw: Height and width of each image padded to a multiple of 32 on its own; locations of cells beyond are
            invalid.
        num_classes: The label that means background.

    Returns:
        Assignments; all background where an image has no objects.

    Source: RetinaNet (ICCV 2017, arXiv:1708.02002), 4.1; mmdet's assigner as its configuration sets it, for the rule of
    the best overlap (`min_pos_iou=0`).

    Differs from mmdet: an object that no prior box overlaps takes none, where it takes all of the image there; and of
    equally good prior boxes those count that lie in the window, which only objects outgrow that are more than 11 times
    as long as wide, or larger than 2,700 pixels.
    """
    cell, is_inside = grid_window(locations, targets.gt_xyxy, pad_hw, OVERLAP_WINDOW)
    index = locations_of(cell.flatten(2), locations.num_priors).flatten(2)
    is_pair = is_inside.flatten(2).repeat_interleave(locations.num_priors, dim=-1) & targets.is_object[..., None]
    iou = box_iou(prior_boxes(locations)[index], targets.gt_xyxy[:, :, None]).where(is_pair, 0.0)
    best = iou.amax(dim=-1, keepdim=True)
    is_best = (iou == best) & (best > 0)
    last_wins = ABOVE_ONE_BITS + torch.arange(iou.shape[1], device=iou.device)[:, None]
    preference = last_wins.where(is_best, ordered_bits(iou))
    claimant, won_by = resolve_claims(index, is_best | (iou >= BACKGROUND_IOU), preference, len(locations.level))
    is_ignored = (claimant >= 0) & (won_by < POSITIVE_BITS)
    owner = claimant.where(~is_ignored, -1)
    threshold = candidates(locations, targets, pad_hw).threshold
    assigned = assigned_to(owner, threshold, locations, targets, pad_hw, num_classes)
    return replace(assigned, is_ignored=is_ignored)


RULES: dict[Rule, Callable[[Locations, Targets, Int[Tensor, "B 2"], int], Assigned]] = {
    "atss": assign,
    "fcos": assign_fcos,
    "retina": assign_max_iou,
}


def assigned_to(
    owner: Int64[Tensor, "B A"],
    threshold: Float[Tensor, "B G"],
    locations: Locations,
    targets: Targets,
    pad_hw: Int[Tensor, "B 2"],
    num_classes: int,
) -> Assigned:
    """Return what each location has to tell.

    Args:
        owner: Index of the location's object; -1 for background.
        threshold: Each object's positive IoU threshold.
        locations: The grid of the padded batch.
        targets: Objects.
        pad_hw: See `assign`.
        num_classes: The label that means background.
    """
    corner = locations.xy - (locations.offset * locations.stride)[:, None]
    is_positive = owner >= 0
    gt_xyxy, gt_label = pad_empty(targets)
    index = owner.clamp(min=0)
    return Assigned(
        label=gt_label.gather(1, index).where(is_positive, num_classes),
        gt_xyxy=gt_xyxy.gather(1, index[..., None].expand(-1, -1, 4)).where(is_positive[..., None], 0.0),
        is_positive=is_positive,
        is_valid=(corner[None] < pad_hw.flip(1)[:, None]).all(dim=-1),
        is_ignored=torch.zeros_like(is_positive),
        threshold=threshold.where(targets.is_object, torch.inf),
    )


def candidates(locations: Locations, targets: Targets, pad_hw: Int[Tensor, "B 2"]) -> Candidates:
    """Find the candidates of each object and its threshold; see `assign`."""
    index, is_candidate = nearest_locations(locations, targets.gt_xyxy, pad_hw)
    is_candidate = is_candidate & targets.is_object[..., None]
    iou = box_iou(prior_boxes(locations)[index], targets.gt_xyxy[:, :, None])
    return Candidates(index, is_candidate, iou, positive_threshold(iou, is_candidate))


def nearest_locations(
    locations: Locations, gt_xyxy: Float[Tensor, "B G 4"], pad_hw: Int[Tensor, "B 2"]
) -> tuple[Int64[Tensor, "B G K"], Bool[Tensor, "B G K"]]:
    """Find the 9 valid locations of each level nearest to each object's centre.

    Of cells with nine locations it is the nearest cell. Only an 11 x 11 window of each level's grid is looked at (see
    `WINDOW`), so the cost does not depend on the image size.

    Returns:
        Location indices, and whether each is one: a level with fewer than 9 valid locations leaves some out.
    """
    num_priors = locations.num_priors
    cell, is_inside = grid_window(locations, gt_xyxy, pad_hw, WINDOW)
    center = ((gt_xyxy[..., :2] + gt_xyxy[..., 2:]) / 2)[:, :, None, None]
    distance = (locations.xy[::num_priors][cell] - center).square().sum(dim=-1).sqrt().where(is_inside, torch.inf)
    count = NUM_CANDIDATES // num_priors
    best = ((ordered_bits(distance) << 32) - cell).topk(count, dim=-1, largest=False).indices
    index = locations_of(cell.gather(-1, best).flatten(2), num_priors).flatten(2)
    return index, is_inside.gather(-1, best).flatten(2).repeat_interleave(num_priors, dim=-1)


def grid_window(
    locations: Locations, gt_xyxy: Float[Tensor, "B G 4"], pad_hw: Int[Tensor, "B 2"], size: int
) -> tuple[Int64[Tensor, "B G P K"], Bool[Tensor, "B G P K"]]:
    """Return a square window of each level's cells around each object's centre.

    Args:
        locations: The grid of the padded batch.
        gt_xyxy: Objects.
        pad_hw: See `assign`.
        size: Columns and rows of the window; it is moved to lie inside the image, which it may exceed still.

    Returns:
        Cell indices, of which those of locations are multiples; 0 beyond the valid ones; and whether each is valid.
    """
    device = gt_xyxy.device
    level_hw, stride, first = level_table(locations.level_hw, locations.level_stride, device)
    # rows and columns of each level that are valid in each image: B 1 P 2
    extent_hw = torch.minimum(-(-pad_hw[:, None] // stride[:, None]), level_hw)[:, None]
    center_yx = ((gt_xyxy[..., :2] + gt_xyxy[..., 2:]) / 2).flip(-1)[:, :, None]  # B G 1 2
    nearest_yx = (center_yx / stride[:, None] - locations.offset).round().long()
    start_yx = torch.minimum(nearest_yx - size // 2, extent_hw - size).clamp(min=0)  # B G P 2
    index_yx = start_yx[..., None] + torch.arange(size, device=device)  # B G P 2 W
    is_inside = index_yx < extent_hw[..., None]
    is_inside_both = (is_inside[:, :, :, 0, :, None] & is_inside[:, :, :, 1, None, :]).flatten(3)
    index = (
        first[:, None, None] + index_yx[:, :, :, 0, :, None] * level_hw[:, 1, None, None] + index_yx[:, :, :, 1, None]
    )
    return index.flatten(3).where(is_inside_both, 0), is_inside_both


def ordered_bits(value: Float[Tensor, "*S"]) -> Int64[Tensor, "*S"]:
    """Return integers below `2^31` that sort like the values, which are not negative.

    Above a tie-breaker in the lower half of a number they make an order total, hence the same on every device.
    """
    return value.view(torch.int32).long()


def positive_threshold(iou: Float[Tensor, "B G K"], is_candidate: Bool[Tensor, "B G K"]) -> Float[Tensor, "B G"]:
    """Return mean plus unbiased standard deviation of each object's candidates; 0 for objects without candidates."""
    count = is_candidate.sum(dim=-1)
    mean = iou.where(is_candidate, 0.0).sum(dim=-1) / count.clamp(min=1)
    deviation = (iou - mean[..., None]).where(is_candidate, 0.0)
    return mean + (deviation.square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()


def resolve_claims(
    candidate: Int64[Tensor, "B G K"],
    is_claim: Bool[Tensor, "B G K"],
    preference: Int64[Tensor, "B G K"],
    num_locations: int,
) -> tuple[Int64[Tensor, "B A"], Int64[Tensor, "B A"]]:
    """Give each claimed location to the claimant of highest preference, among equals to the one of lowest index.

    Args:
        candidate: Location indices.
        is_claim: Whether the object claims the location.
        preference: From 0 to below `2^31`.
        num_locations: Of the grid.

    Returns:
        The owner's index, -1 where unclaimed, and its preference.
    """
    num_images, num_objects, _ = candidate.shape
    rank = num_objects - torch.arange(num_objects, device=candidate.device)[:, None].expand_as(candidate)
    key = ((preference << 32) + rank).where(is_claim, 0)
    best = key.new_zeros((num_images, num_locations))
    best = best.scatter_reduce(1, candidate.flatten(1), key.flatten(1), reduce="amax")
    return (num_objects - (best & 0xFFFFFFFF)).where(best > 0, -1), best >> 32


def pad_empty(targets: Targets) -> tuple[Float[Tensor, "B g 4"], Int[Tensor, "B g"]]:
    """Return boxes and labels with at least one (padded) object per image, so that gathering works without objects."""
    if targets.gt_label.shape[1]:
        return targets.gt_xyxy, targets.gt_label
    num_images = targets.gt_label.shape[0]
    return targets.gt_xyxy.new_zeros(num_images, 1, 4), targets.gt_label.new_zeros(num_images, 1)
