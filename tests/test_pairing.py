"""Comparing detectors that differ in classes or in the scale of what they see."""

from dataclasses import replace

import pytest
import torch
from scenes import STRIDES, grid, random_dense, targets_of
from torch.testing import assert_close

from ldctl.assign import assign
from ldctl.boxes import encode_ltrb
from ldctl.models import Detector, HeadSpec, ModelSpec, ResNetSpec
from ldctl.pairing import (
    SharedClasses,
    in_teachers_levels,
    looked_up,
    of_images,
    partners,
    recall,
    share_assigned,
    share_classes,
    share_levels,
)
from ldctl.types import Dense, Locations, Pair, TeacherRows, TowerMaps

HERE = grid(64, 96)


def tiny_detector() -> Detector:
    spec = ModelSpec(backbone=ResNetSpec(depth=18, width=0.125, init="none"), channels=32, head=HeadSpec(num_convs=1))
    return Detector(spec, 2).eval()


def index(*classes: int) -> torch.Tensor:
    return torch.tensor(classes, dtype=torch.int64)


# --- classes --------------------------------------------------------------------------------------------------------


def test_shared_classes_stand_in_the_same_order() -> None:
    student, teacher, crossed = (random_dense(HERE, 2, num_classes, seed) for seed, num_classes in enumerate((3, 4, 4)))
    pair = share_classes(Pair(student, teacher, crossed), SharedClasses(index(0, 2), index(3, 1)))
    assert torch.equal(pair.student.cls, student.cls[..., [0, 2]])
    assert torch.equal(pair.teacher.cls, teacher.cls[..., [3, 1]])
    assert pair.crossed is not None
    assert torch.equal(pair.crossed.cls, crossed.cls[..., [3, 1]])
    assert pair.student.edge is student.edge
    assert pair.teacher.edge is teacher.edge


def test_only_shared_classes_get_a_gradient() -> None:
    student, teacher = (random_dense(HERE, 1, 3, seed) for seed in (0, 1))
    share_classes(Pair(student, teacher), SharedClasses(index(2), index(0))).student.cls.sum().backward()
    assert student.cls.grad is not None
    assert student.cls.grad[..., :2].abs().sum() == 0
    assert (student.cls.grad[..., 2] == 1).all()


def test_equal_classes_are_left_as_they_are() -> None:
    pair = Pair(*(random_dense(HERE, 1, 3, seed) for seed in (0, 1)))
    assert share_classes(pair, None) is pair
    picked = share_classes(pair, SharedClasses(index(0, 1, 2), index(0, 1, 2)))
    assert_close(picked.student.cls, pair.student.cls, rtol=0, atol=0)


def test_the_order_of_the_teachers_classes_does_not_matter() -> None:
    student, teacher = (random_dense(HERE, 1, num_classes, seed) for seed, num_classes in enumerate((3, 5)))
    order = [4, 2, 0, 1, 3]
    turned = replace(teacher, cls=teacher.cls[..., order])
    place = {old: new for new, old in enumerate(order)}
    first = share_classes(Pair(student, teacher), SharedClasses(index(0, 1), index(2, 3)))
    second = share_classes(Pair(student, turned), SharedClasses(index(0, 1), index(place[2], place[3])))
    assert torch.equal(first.teacher.cls, second.teacher.cls)


# --- scales ---------------------------------------------------------------------------------------------------------


def maps_of(locations: Locations) -> tuple[torch.Tensor, ...]:
    """Return a map per level that holds the level's number."""
    return tuple(torch.full((1, 1, *size), float(level)) for level, size in enumerate(locations.level_hw))


def knowing(locations: Locations, xyxy: tuple[float, float, float, float]) -> Dense:
    """Return predictions whose logits are the place of each location and its distances from the edges of a box."""
    boxes = torch.tensor(xyxy).expand(len(locations.level), 4)
    ltrb = encode_ltrb(locations.xy, boxes, locations.stride)
    maps = maps_of(locations)
    return Dense(locations.xy[None], ltrb[None, ..., None], maps, TowerMaps(maps, maps), locations)


@pytest.mark.parametrize(("shift", "own", "other"), [(1, range(4), range(1, 5)), (-1, range(1, 5), range(4))])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 224)])  # of which halves are no multiples of 32
def test_levels_pair_where_places_and_distances_are_the_same(
    shift: int, own: range, other: range, size: tuple[int, int]
) -> None:
    scale = 2.0**shift
    here, there = grid(*size), grid(int(size[0] * scale), int(size[1] * scale))
    box = (8.0, 4.0, 40.0, 28.0)
    student, teacher = knowing(here, box), knowing(there, tuple(scale * edge for edge in box))  # type: ignore[arg-type]
    pair = share_levels(Pair(student, teacher, crossed=teacher), shift)
    assert torch.equal(pair.teacher.cls, pair.student.cls * scale)
    assert torch.equal(pair.teacher.edge, pair.student.edge)
    found = pair.student.locations
    assert torch.equal(found.xy, pair.teacher.locations.xy)
    assert found.level_stride == tuple(STRIDES[level] for level in own)
    assert torch.equal(found.xy, student.cls[0, torch.isin(here.level, torch.tensor(own))])
    assert torch.equal(found.level, torch.arange(4).repeat_interleave(torch.tensor(found.level_sizes)))
    for maps in (pair.student.features, pair.student.towers.cls, pair.student.towers.edge):
        assert [int(one.flatten()[0]) for one in maps] == list(own)
    assert pair.crossed is not None
    for dense in (pair.teacher, pair.crossed):
        for maps in (dense.features, dense.towers.cls, dense.towers.edge):
            assert [int(one.flatten()[0]) for one in maps] == list(other)


def test_at_the_same_scale_all_levels_pair() -> None:
    pair = Pair(*(random_dense(HERE, 1, 3, seed) for seed in (0, 1)))
    assert share_levels(pair, 0) is pair
    assert partners(0, 5) == (slice(0, 5), slice(0, 5))


@pytest.mark.parametrize("shift", [1, -1])
def test_assignment_at_shared_levels(shift: int) -> None:
    targets = targets_of([[(4, 4, 60, 60, 1), (20, 30, 30, 44, 0)], [(0, 0, 63, 95, 2)]])
    whole = assign(HERE, targets, torch.tensor([(64, 96), (32, 96)]), 3)
    part = share_assigned(whole, HERE, shift)
    kept = (HERE.level < 4) if shift == 1 else (HERE.level > 0)
    for name in ("label", "gt_xyxy", "is_positive", "is_valid"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, kept])
    assert part.threshold is whole.threshold
    assert whole.is_positive[:, ~kept].any() or shift == 1


@pytest.mark.parametrize("shift", [1, 0, -1])
def test_a_teachers_head_reads_the_students_maps_where_its_own_would_lie(shift: int) -> None:
    """A head that is the student's own, and knows no scale in its class logits, then says what the student says."""
    detector = tiny_detector()
    scale = 2.0**shift
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        student, teacher = (
            detector(torch.zeros(2, 3, int(96 * s), int(160 * s)) if s != 1 else images, 1) for s in (1, scale)
        )
        maps = in_teachers_levels(student.towers, teacher.towers, shift)
        crossed = detector.head.resume(maps, 1, teacher.features)
    pair = share_levels(Pair(student, teacher, crossed), shift)
    assert pair.crossed is not None
    assert_close(pair.crossed.cls, pair.student.cls, rtol=0, atol=1e-6)
    own, other = partners(shift, 5)
    for found, mine, theirs in zip(
        (maps.cls, maps.edge),
        (student.towers.cls, student.towers.edge),
        (teacher.towers.cls, teacher.towers.edge),
        strict=True,
    ):
        assert found[other] == mine[own]
        assert [index for index in range(5) if found[index] is theirs[index]] == [
            index for index in range(5) if index not in range(5)[other]
        ]


def test_a_detectors_own_pyramid_pairs_with_itself_at_twice_the_size() -> None:
    """Real maps, of a size whose half is no multiple of 32, have as many locations as `grid` says."""
    detector = tiny_detector()
    with torch.no_grad():
        half, one, two = (detector(torch.zeros(1, 3, int(96 * s), int(160 * s))) for s in (0.5, 1, 2))
    assert share_levels(Pair(one, two), 1).student.edge.shape[1] == 12 * 20 + 6 * 10 + 3 * 5 + 2 * 3
    assert share_levels(Pair(one, half), -1).student.edge.shape[1] == 6 * 10 + 3 * 5 + 2 * 3 + 1 * 2


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_that_take_no_part_have_no_location() -> None:
    targets = targets_of([[(4, 4, 60, 60, 1)], [(0, 0, 63, 60, 2)]])
    whole = assign(HERE, targets, torch.tensor([(64, 96), (32, 96)]), 3)
    assert whole.is_positive.any(dim=1).all()
    part = of_images(whole, torch.tensor([False, True]))
    for name in ("is_positive", "is_valid"):
        assert not getattr(part, name)[0].any()
        assert torch.equal(getattr(part, name)[1], getattr(whole, name)[1])


def test_shared_levels_keep_the_quality_and_either_offset() -> None:
    """What lies half a stride from the student's locations does so on every level; shapes are those of the levels."""
    student, teacher = random_dense(grid(64, 64), 2, 3, 0), random_dense(grid(128, 128, 0.5), 2, 3, 1)
    student, teacher = (replace(one, quality=one.cls[..., 0].detach()) for one in (student, teacher))
    shared = share_levels(Pair(student, teacher), 1)
    count = len(shared.student.locations.level)
    assert torch.equal(shared.student.quality, student.quality[:, :count])
    assert torch.equal(shared.teacher.quality, teacher.quality[:, -count:])
    found = shared.teacher.locations
    assert (shared.student.locations.offset, found.offset) == (0.0, 0.5)
    assert torch.equal(found.xy, teacher.locations.xy[-count:] / 2)  # the teacher sees everything twice as large
    assert torch.equal(found.xy - shared.student.locations.xy, (found.stride / 2)[:, None].expand(-1, 2))


# --- a cache in the teacher's place ---------------------------------------------------------------------------------


def told_by(teacher: Dense, edge_row: torch.Tensor, cls_row: torch.Tensor, dtype: torch.dtype) -> TeacherRows:
    """Return what a cache with these rows tells of a teacher."""
    assert teacher.quality is not None
    return TeacherRows(
        edge_row=edge_row,
        edge=teacher.edge.flatten(0, 1)[edge_row].detach().to(dtype),
        cls_row=cls_row,
        cls=teacher.cls.flatten(0, 1)[cls_row].detach().to(dtype),
        quality=teacher.quality.flatten()[cls_row].to(dtype),
        counts=((0, 0), (len(edge_row), len(cls_row))),
        num_locations=len(HERE.level),
        offset=0.5,
        edge_regions=("main", "vlr"),
        cls_regions=("main",),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_recalled_is_what_the_teacher_says(dtype: torch.dtype) -> None:
    student, teacher = (random_dense(HERE, 2, 3, seed) for seed in (0, 1))
    teacher = replace(teacher, quality=torch.randn(teacher.cls.shape[:2]))
    count = teacher.cls.shape[:2].numel()
    edge_row, cls_row = torch.arange(0, count, 2), torch.arange(0, count, 3)
    taught = told_by(teacher, edge_row, cls_row, dtype)
    row = torch.tensor([6, 3, 4, 12, count - 1, 0])
    (theirs,), (own,) = teacher.at([row]), student.at([row])
    for region, expected in {
        "main": [r % 6 == 0 for r in row.tolist()],
        "vlr": [r % 2 == 0 for r in row.tolist()],
        "elsewhere": [True] * 6,  # nothing is read there
    }.items():
        found = recall(taught, region, row, own)
        assert found.is_told.tolist() == expected
    assert found.teacher.locations.offset == 0.5
    assert found.teacher.quality is not None
    assert theirs.quality is not None
    has_edge, has_cls = row % 2 == 0, row % 3 == 0
    assert torch.equal(found.teacher.edge[:, has_edge], theirs.edge[:, has_edge].to(dtype).float())
    assert torch.equal(found.teacher.cls[:, has_cls], theirs.cls[:, has_cls].to(dtype).float())
    assert torch.equal(found.teacher.quality[:, has_cls], theirs.quality[:, has_cls].to(dtype).float())
    assert found.teacher.edge.isfinite().all()
    assert not found.teacher.edge.requires_grad


def test_looking_up_where_nothing_is_told() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    value, is_there = looked_up(nothing, torch.zeros(0, 4, 5, dtype=torch.float16), torch.tensor([3, 1]))
    assert (value.shape, value.dtype, is_there.tolist()) == ((2, 4, 5), torch.float32, [False, False])
    value, is_there = looked_up(torch.tensor([2]), torch.ones(1, 3), nothing)
    assert (value.shape, is_there.shape) == ((0, 3), (0,))
