"""Make what student and teacher say comparable, where they differ in classes or look at the image at other scales."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Int64
from torch import Tensor

from ldctl.boxes import location_grid
from ldctl.types import Assigned, Dense, Locations, Pair, TowerMaps


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


def of_images(assigned: Assigned, is_taking_part: Bool[Tensor, " B"]) -> Assigned:
    """Return the assignment with no positive and no valid location in the other images: no loss looks at those."""
    return replace(
        assigned,
        is_positive=assigned.is_positive & is_taking_part[:, None],
        is_valid=assigned.is_valid & is_taking_part[:, None],
    )
