"""Make what student and teacher say comparable: other classes, another scale, or a cache in the teacher's place."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from ldctl.boxes import location_grid
from ldctl.types import Assigned, Dense, Locations, Pair, TeacherRows, TowerMaps


@dataclass(frozen=True)
class SharedClasses:
    """The classes that student and teacher share, on their device.

    Attributes:
        student: Indices among the student's classes.
        teacher: Indices of the same classes among the teacher's.
    """

    student: Int64[Tensor, " C"]
    teacher: Int64[Tensor, " C"]


def share_classes(pair: Pair, shared: SharedClasses | None) -> Pair:
    """Return the pair with the logits of shared classes only, in the same order on both sides.

    What the teacher's head makes of the student's maps speaks of the teacher's classes.

    Args:
        pair: Any.
        shared: Which; none where both have the same classes in the same order.
    """
    if shared is None:
        return pair
    return Pair(
        student=of_classes(pair.student, shared.student),
        teacher=of_classes(pair.teacher, shared.teacher),
        crossed=of_classes(pair.crossed, shared.teacher) if pair.crossed else None,
    )


def of_classes(dense: Dense, classes: Int64[Tensor, " C"]) -> Dense:
    """Return the predictions with the logits of some classes only, in the order given."""
    return replace(dense, cls=dense.cls.index_select(-1, classes))


def share_levels(pair: Pair, shift: int) -> Pair:
    """Return the pair with those pyramid levels only whose locations lie at the same places of the image.

    A teacher that sees the image at `2^shift` times the student's scale has, on level `l + shift`, as many locations as
    the student on level `l`, at the same places; and as both strides are the same number of the image's pixels, their
    edge distributions mean the same distances. The finest levels of the one and the coarsest of the other that have no
    such partner are left out.

    Args:
        pair: All levels of both.
        shift: By how many levels.

    Returns:
        Both at the student's cells, in the locations of either's own.
    """
    if shift == 0:
        return pair
    own, other = partners(shift, len(pair.student.locations.level_hw))
    locations = _locations_of(pair.student.locations, own)
    seen = pair.teacher.locations
    theirs = location_grid(
        locations.level_hw, locations.level_stride, locations.xy.device, offset=seen.offset, prior_wh=seen.prior_wh
    )
    assert seen.level_hw[other] == locations.level_hw, "as many cells on each level"
    return Pair(
        student=_levels(pair.student, own, locations),
        teacher=_levels(pair.teacher, other, theirs),
        crossed=_levels(pair.crossed, other, theirs) if pair.crossed else None,
    )


def share_assigned(assigned: Assigned, locations: Locations, shift: int) -> Assigned:
    """Return the assignment at the student's locations that have a partner; see `share_levels`.

    Args:
        assigned: At all of the student's locations.
        locations: All of the student's.
        shift: By how many levels.
    """
    rows = _rows(locations, partners(shift, len(locations.level_hw))[0])
    return replace(
        assigned,
        label=assigned.label[:, rows],
        gt_xyxy=assigned.gt_xyxy[:, rows],
        is_positive=assigned.is_positive[:, rows],
        is_valid=assigned.is_valid[:, rows],
        is_ignored=assigned.is_ignored[:, rows],
    )


def in_teachers_levels(student: TowerMaps, teacher: TowerMaps, shift: int) -> TowerMaps:
    """Return the student's maps on those levels of the teacher's head whose locations lie at the same places.

    Levels of the teacher that have no such partner keep its own maps; see `share_levels`.

    Args:
        student: At all levels.
        teacher: At all levels.
        shift: By how many levels the teacher's are coarser.
    """
    own, other = partners(shift, len(student.cls))
    return TowerMaps(
        cls=teacher.cls[: other.start] + student.cls[own] + teacher.cls[other.stop :],
        edge=teacher.edge[: other.start] + student.edge[own] + teacher.edge[other.stop :],
    )


def partners(shift: int, num_levels: int) -> tuple[slice, slice]:
    """Return which of the student's levels have a partner, and which of the teacher's those are."""
    return slice(max(-shift, 0), num_levels - max(shift, 0)), slice(max(shift, 0), num_levels - max(-shift, 0))


def _levels(dense: Dense, levels: slice, locations: Locations) -> Dense:
    """Return the predictions of some levels, said to be at the given locations."""
    rows = _rows(dense.locations, levels)
    return replace(
        dense,
        cls=dense.cls[:, rows],
        edge=dense.edge[:, rows],
        features=dense.features[levels],
        towers=TowerMaps(cls=dense.towers.cls[levels], edge=dense.towers.edge[levels]),
        locations=locations,
        quality=None if dense.quality is None else dense.quality[:, rows],
    )


def _locations_of(locations: Locations, levels: slice) -> Locations:
    """Return the locations of some levels, which count as levels from 0 on."""
    rows = _rows(locations, levels)
    return Locations(
        xy=locations.xy[rows],
        stride=locations.stride[rows],
        level=locations.level[rows] - levels.start,
        level_hw=locations.level_hw[levels],
        level_stride=locations.level_stride[levels],
        offset=locations.offset,
        prior_wh=locations.prior_wh,
    )


def _rows(locations: Locations, levels: slice) -> slice:
    """Return the locations of some levels, which stand together."""
    sizes = locations.level_sizes
    return slice(sum(sizes[: levels.start]), sum(sizes[: levels.stop]))


@dataclass(frozen=True)
class Recalled:
    """What a cache tells of a teacher at some locations.

    Attributes:
        teacher: Its predictions, as those of one image without maps; of no meaning where nothing is told.
        is_told: Whether the cache tells what it has in this region.
    """

    teacher: Dense
    is_told: Bool[Tensor, " N"]


def recall(taught: TeacherRows, region: str, row: Int[Tensor, " N"], student: Dense) -> Recalled:
    """Return what a cache tells of a teacher in a region, in the place of `Dense.at`.

    Args:
        taught: What it tells of the batch.
        region: Its name.
        row: Its locations, `image * A + location` each.
        student: What the student says there.
    """
    edge, has_edge = looked_up(taught.edge_row, taught.edge, row)
    cls, has_cls = looked_up(taught.cls_row, taught.cls, row)
    quality = None if taught.quality is None else looked_up(taught.cls_row, taught.quality, row)[0][None]
    teacher = replace(
        student,
        cls=cls[None],
        edge=edge[None],
        quality=quality,
        locations=replace(student.locations, offset=taught.offset),
    )
    is_told = torch.ones_like(has_edge)
    for has, regions in ((has_edge, taught.edge_regions), (has_cls, taught.cls_regions)):
        if region in regions:
            is_told = is_told & has
    return Recalled(teacher, is_told)


def looked_up(
    key: Int[Tensor, " M"], value: Float[Tensor, "M *S"], wanted: Int[Tensor, " N"]
) -> tuple[Float32[Tensor, "N *S"], Bool[Tensor, " N"]]:
    """Return the values of the wanted keys, and whether there are any; where there are none, it is any value.

    Args:
        key: Ascending.
        value: Of each key.
        wanted: Keys in any order.
    """
    if not len(key):
        return value.new_zeros((len(wanted), *value.shape[1:]), dtype=torch.float32), torch.zeros_like(wanted).bool()
    index = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
    return value[index].float(), key[index] == wanted


def of_images(assigned: Assigned, is_taking_part: Bool[Tensor, " B"]) -> Assigned:
    """Return the assignment with no positive and no valid location in the other images: no loss looks at those."""
    return replace(
        assigned,
        is_positive=assigned.is_positive & is_taking_part[:, None],
        is_valid=assigned.is_valid & is_taking_part[:, None],
    )
