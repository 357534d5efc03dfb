"""ATSS: which location answers for which object, and each object's IoU threshold."""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from ldctl.boxes import box_iou, prior_boxes
from ldctl.types import Assigned, Locations, Targets

NUM_CANDIDATES = 9  # per object and level. Source: ATSS, table 8
MIN_CENTER_MARGIN = 0.01  # pixels that a location must lie inside its object. Source: ATSS's released code
# The 9 grid points nearest to any point stand in its 9 nearest columns and 9 nearest rows: a point in the p-th nearest
# column and q-th nearest row has at least p * q - 1 points no farther than itself. Two more cover ties at the rim.
WINDOW = NUM_CANDIDATES + 2


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
    is_valid = (locations.xy[None, :, 0] < pad_hw[:, None, 1]) & (locations.xy[None, :, 1] < pad_hw[:, None, 0])
    candidate, is_candidate = nearest_locations(locations, targets.gt_xyxy, pad_hw)
    is_candidate = is_candidate & targets.is_object[..., None]
    iou = box_iou(prior_boxes(locations)[candidate], targets.gt_xyxy[:, :, None])
    threshold = positive_threshold(iou, is_candidate)
    margin = torch.cat(
        (
            locations.xy[candidate] - targets.gt_xyxy[:, :, None, :2],
            targets.gt_xyxy[:, :, None, 2:] - locations.xy[candidate],
        ),
        dim=-1,
    ).amin(dim=-1)
    is_claim = is_candidate & (iou >= threshold[..., None]) & (margin > MIN_CENTER_MARGIN)
    owner, is_positive = resolve_claims(candidate, is_claim, iou, len(locations.level))
    gt_xyxy, gt_label = pad_empty(targets)
    return Assigned(
        label=gt_label.gather(1, owner).where(is_positive, num_classes),
        gt_xyxy=gt_xyxy.gather(1, owner[..., None].expand(-1, -1, 4)).where(is_positive[..., None], 0.0),
        is_positive=is_positive,
        is_valid=is_valid,
        threshold=threshold.where(targets.is_object, torch.inf),
    )


def nearest_locations(
    locations: Locations, gt_xyxy: Float[Tensor, "B G 4"], pad_hw: Int[Tensor, "B 2"]
) -> tuple[Int64[Tensor, "B G K"], Bool[Tensor, "B G K"]]:
    """Find the 9 valid locations of each level nearest to each object's centre.

    Only an 11 x 11 window of each level's grid is looked at (see `WINDOW`), so the cost does not depend on the image
    size.

    Returns:
        Location indices, and whether each is one: a level with fewer than 9 valid locations leaves some out.
    """
    device = gt_xyxy.device
    level_hw, stride, first = level_table(locations.level_hw, locations.level_stride, device)
    # rows and columns of each level that are valid in each image: B 1 P 2
    extent_hw = torch.minimum(-(-pad_hw[:, None] // stride[:, None]), level_hw)[:, None]
    center_yx = ((gt_xyxy[..., :2] + gt_xyxy[..., 2:]) / 2).flip(-1)[:, :, None]  # B G 1 2
    nearest_yx = (center_yx / stride[:, None]).round().long()
    start_yx = torch.minimum(nearest_yx - WINDOW // 2, extent_hw - WINDOW).clamp(min=0)  # B G P 2
    index_yx = start_yx[..., None] + torch.arange(WINDOW, device=device)  # B G P 2 W
    is_inside = index_yx < extent_hw[..., None]
    offset = index_yx * stride[:, None, None] - center_yx[..., None]
    squared = offset.square()
    distance = (squared[:, :, :, 1, None, :] + squared[:, :, :, 0, :, None]).sqrt().flatten(3)  # B G P W*W
    is_inside_both = (is_inside[:, :, :, 0, :, None] & is_inside[:, :, :, 1, None, :]).flatten(3)
    index = (
        first[:, None, None] + index_yx[:, :, :, 0, :, None] * level_hw[:, 1, None, None] + index_yx[:, :, :, 1, None]
    )
    key = ordered_key(distance.where(is_inside_both, torch.inf), -index.flatten(3))
    best = key.topk(NUM_CANDIDATES, dim=-1, largest=False).indices
    is_candidate = is_inside_both.gather(-1, best).flatten(2)
    return index.flatten(3).gather(-1, best).flatten(2).where(is_candidate, 0), is_candidate


@lru_cache(maxsize=1024)  # more than there are padded sizes; each costs a copy from the host
def level_table(
    level_hw: tuple[tuple[int, int], ...], level_stride: tuple[int, ...], device: torch.device
) -> tuple[Int64[Tensor, "P 2"], Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Return rows and columns, stride and first location of each level. Shared between calls: not to be changed."""
    sizes_hw = torch.tensor(level_hw)
    count = sizes_hw.prod(dim=1)
    return sizes_hw.to(device), torch.tensor(level_stride, device=device), (count.cumsum(0) - count).to(device)


def ordered_key(value: Float[Tensor, "*S"], tie: Int64[Tensor, "*S"]) -> Int64[Tensor, "*S"]:
    """Return integers that sort like `(value, tie)`, for values that are not negative.

    The bits of non-negative floats sort like the floats; ties in their lower half make the order total, hence the same
    on every device.
    """
    return (value.view(torch.int32).long() << 32) + tie


def positive_threshold(iou: Float[Tensor, "B G K"], is_candidate: Bool[Tensor, "B G K"]) -> Float[Tensor, "B G"]:
    """Return mean plus unbiased standard deviation of each object's candidates; 0 for objects without candidates."""
    count = is_candidate.sum(dim=-1)
    mean = iou.where(is_candidate, 0.0).sum(dim=-1) / count.clamp(min=1)
    deviation = (iou - mean[..., None]).where(is_candidate, 0.0)
    return mean + (deviation.square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()


def resolve_claims(
    candidate: Int64[Tensor, "B G K"], is_claim: Bool[Tensor, "B G K"], iou: Float[Tensor, "B G K"], num_locations: int
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"]]:
    """Give each claimed location to the claimant of highest IoU, among equals to the one of lowest index.

    Returns:
        The owner's index (0 where unclaimed), and whether the location is claimed.
    """
    num_images, num_objects, _ = candidate.shape
    tie = -torch.arange(num_objects, device=candidate.device)[:, None].expand_as(candidate)
    key = (ordered_key(iou, tie) + num_objects).where(is_claim, -1)
    best = key.new_full((num_images, num_locations), -1)
    best = best.scatter_reduce(1, candidate.flatten(1), key.flatten(1), reduce="amax")
    is_positive = best >= 0
    owner = (num_objects - (best & 0xFFFFFFFF)).where(is_positive, 0)
    return owner, is_positive


def pad_empty(targets: Targets) -> tuple[Float[Tensor, "B g 4"], Int[Tensor, "B g"]]:
    """Return boxes and labels with at least one (padded) object per image, so that gathering works without objects."""
    if targets.gt_label.shape[1]:
        return targets.gt_xyxy, targets.gt_label
    num_images = targets.gt_label.shape[0]
    return targets.gt_xyxy.new_zeros(num_images, 1, 4), targets.gt_label.new_zeros(num_images, 1)
