"""Box formats, overlaps, the edge-distribution integral and the grid of locations."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torchvision.ops import batched_nms

from ldctl.types import Locations

EPS = 1e-6  # floor of every denominator, as in the reference
SQUARE = ((8.0, 8.0),)  # width and height of the one prior box, strides. Source: GFL, ATSS
PAD_MULTIPLE = 32  # images are padded to multiples: the coarsest stride that the backbone halves to


def box_area(xyxy: Float[Tensor, "*S 4"]) -> Float[Tensor, "*S"]:
    """Return width times height, in the square of the boxes' unit."""
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def intersection(a_xyxy: Float[Tensor, "*#S 4"], b_xyxy: Float[Tensor, "*#S 4"]) -> Float[Tensor, "*S"]:
    """Return the area that two boxes share; shapes broadcast."""
    top_left = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    bottom_right = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


def box_iou(a_xyxy: Float[Tensor, "*#S 4"], b_xyxy: Float[Tensor, "*#S 4"]) -> Float[Tensor, "*S"]:
    """Return intersection over union in [0, 1]; shapes broadcast."""
    shared = intersection(a_xyxy, b_xyxy)
    union = box_area(a_xyxy) + box_area(b_xyxy) - shared
    return shared / union.clamp(min=EPS)


def box_giou(a_xyxy: Float[Tensor, "*#S 4"], b_xyxy: Float[Tensor, "*#S 4"]) -> Float[Tensor, "*S"]:
    """Return generalized IoU in [-1, 1]: IoU minus the share of the enclosing box that neither covers.

    Source: GIoU (CVPR 2019, arXiv:1902.09630).
    """
    shared = intersection(a_xyxy, b_xyxy)
    union = (box_area(a_xyxy) + box_area(b_xyxy) - shared).clamp(min=EPS)
    enclosing = box_area(enclosing_box(a_xyxy, b_xyxy)).clamp(min=EPS)
    return shared / union - (enclosing - union) / enclosing


def enclosing_box(a_xyxy: Float[Tensor, "*#S 4"], b_xyxy: Float[Tensor, "*#S 4"]) -> Float[Tensor, "*S 4"]:
    """Return the smallest box around both."""
    top_left = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    bottom_right = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    return torch.cat((top_left, bottom_right), dim=-1)


def group_nms(
    xyxy: Float[Tensor, "N 4"], score: Float[Tensor, " N"], group: Int[Tensor, " N"], threshold: float
) -> Int[Tensor, " M"]:
    """Return the rows, ascending, that stay when each box, best first, removes the worse ones of its group.

    Of equal scores, the box that comes first is the better. In float64: torchvision lays groups side by side, and what
    that rounds off a position in float32 can change which boxes stay.

    Args:
        xyxy: Boxes in any unit.
        score: The higher the better.
        group: Such as a class, or a class of an image, counted from 0.
        threshold: A box removes those that overlap it by a higher IoU.
    """
    wide = xyxy.double()
    if len(wide):
        wide = wide - wide.amin()  # side by side only where nothing is negative
    keep: Tensor = batched_nms(wide, score.double(), group, threshold)  # synchronises
    return keep.sort().values


def rank_in_group(group: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return how many rows of the same group come before each; `group` ascends."""
    return torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)


def center_penalty(a_xyxy: Float[Tensor, "*#S 4"], b_xyxy: Float[Tensor, "*#S 4"]) -> Float[Tensor, "*S"]:
    """Return squared centre distance over squared diagonal of the enclosing box, in [0, 1): the D of DIoU.

    Source: DIoU (AAAI 2020, arXiv:1911.08287).
    """
    twice_offset = (a_xyxy[..., :2] + a_xyxy[..., 2:]) - (b_xyxy[..., :2] + b_xyxy[..., 2:])
    enclosing = enclosing_box(a_xyxy, b_xyxy)
    diagonal = (enclosing[..., 2:] - enclosing[..., :2]).square().sum(dim=-1)
    return (twice_offset.square().sum(dim=-1) / 4) / diagonal.clamp(min=EPS)


def encode_ltrb(
    xy: Float[Tensor, "*#S 2"], xyxy: Float[Tensor, "*#S 4"], stride: Float[Tensor, "*#S"]
) -> Float[Tensor, "*S 4"]:
    """Return the distances from locations to box edges, in stride units; negative where a location lies outside."""
    return torch.cat((xy - xyxy[..., :2], xyxy[..., 2:] - xy), dim=-1) / stride.unsqueeze(-1)


def decode_ltrb(
    xy: Float[Tensor, "*#S 2"], ltrb: Float[Tensor, "*#S 4"], stride: Float[Tensor, "*#S"]
) -> Float[Tensor, "*S 4"]:
    """Return the box, in the unit of `xy`, whose edges lie `ltrb` strides away from the location."""
    offset = ltrb * stride.unsqueeze(-1)
    return torch.cat((xy - offset[..., :2], xy + offset[..., 2:]), dim=-1)


def expected_distance(edge: Float[Tensor, "*S R"]) -> Float[Tensor, "*S"]:
    """Return the mean of the edge distribution `softmax(edge)` over the bins 0 .. R - 1, in stride units.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388), eq. 5.
    """
    bins = torch.arange(edge.shape[-1], device=edge.device, dtype=edge.dtype)
    return edge.softmax(dim=-1) @ bins


def location_grid(
    sizes_hw: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    device: torch.device,
    offset: float = 0.0,
    prior_wh: tuple[tuple[float, float], ...] = SQUARE,
) -> Locations:
    """Lay out the locations of feature maps: column and row, plus an offset, times the stride.

    Args:
        sizes_hw: Height and width of each level's map, finest first.
        strides: Pixels between neighbours, per level.
        device: Where the tensors live.
        offset: In strides; 0 is what ATSS and GFL use, 0.5 what FCOS does.
        prior_wh: Width and height of each of a cell's prior boxes, strides.
    """
    xy, stride, level = [], [], []
    for index, ((height, width), step) in enumerate(zip(sizes_hw, strides, strict=True)):
        y, x = torch.meshgrid(
            torch.arange(height, device=device, dtype=torch.float32).add(offset) * step,
            torch.arange(width, device=device, dtype=torch.float32).add(offset) * step,
            indexing="ij",
        )
        cells = torch.stack((x, y), dim=-1).reshape(-1, 1, 2)
        xy.append(cells.expand(-1, len(prior_wh), 2).reshape(-1, 2))
        count = height * width * len(prior_wh)
        stride.append(torch.full((count,), float(step), device=device))
        level.append(torch.full((count,), index, device=device))
    return Locations(
        xy=torch.cat(xy),
        stride=torch.cat(stride),
        level=torch.cat(level),
        level_hw=sizes_hw,
        level_stride=strides,
        offset=offset,
        prior_wh=prior_wh,
    )


@lru_cache(maxsize=1024)  # more than there are padded sizes; each costs a copy from the host
def level_table(
    level_hw: tuple[tuple[int, int], ...], level_stride: tuple[int, ...], device: torch.device
) -> tuple[Int64[Tensor, "P 2"], Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Return rows and columns, stride and first cell of each level. Shared between calls: not to be changed."""
    sizes_hw = torch.tensor(level_hw)
    count = sizes_hw.prod(dim=1)
    return sizes_hw.to(device), torch.tensor(level_stride, device=device), (count.cumsum(0) - count).to(device)


def locations_of(cell: Int64[Tensor, "*S"], num_priors: int) -> Int64[Tensor, "*S K"]:
    """Return the locations of each cell, which are next to each other."""
    return cell[..., None] * num_priors + torch.arange(num_priors, device=cell.device)


def prior_boxes(locations: Locations) -> Float[Tensor, "A 4"]:
    """Return the prior box around each location, `xyxy` in pixels.

    The assigner compares these with the objects; nothing is regressed from them.
    """
    half_wh = prior_table(locations.prior_wh, locations.xy.device) / 2
    num_cells = len(locations.stride) // locations.num_priors
    half = half_wh.repeat(num_cells, 1) * locations.stride.unsqueeze(-1)
    return torch.cat((locations.xy - half, locations.xy + half), dim=-1)


@lru_cache  # each costs a copy from the host
def prior_table(prior_wh: tuple[tuple[float, float], ...], device: torch.device) -> Float[Tensor, "_ 2"]:
    """Return the sizes of a cell's prior boxes as a tensor. Shared between calls: not to be changed."""
    return torch.tensor(prior_wh, dtype=torch.float32, device=device)


def octave_priors() -> tuple[tuple[float, float], ...]:
    """Return width and height, in strides, of RetinaNet's nine prior boxes: three sizes of each of three shapes.

    Heights are 0.5, 1 and 2 times the widths; the areas of each shape are those of squares of side 4, 4 * 2^(1/3) and
    4 * 2^(2/3).

    Source: RetinaNet (ICCV 2017, arXiv:1708.02002), 4.1; in the order of mmdet's anchors, shape by shape, and computed
    in single precision as they are, so that equal overlaps are equal here, too.
    """
    root = torch.tensor([0.5, 1.0, 2.0], device="cpu").sqrt()[:, None]
    side = torch.tensor([4 * 2 ** (octave / 3) for octave in range(3)], device="cpu")
    width, height = (1 / root) * side, root * side
    return tuple(zip(width.flatten().tolist(), height.flatten().tolist(), strict=True))
