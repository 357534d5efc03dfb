"""Regions against the definitions, one location and object at a time in Python's floats."""

import math
from dataclasses import replace

import pytest
import torch
from scenes import grid, images_of, random_dense, random_targets, targets_of, vlr_region
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import assign
from ldctl.boxes import box_iou, expected_distance
from ldctl.errors import LdctlError
from ldctl.regions import (
    DRAWN,
    Encounters,
    Region,
    RegionSpec,
    all_region,
    best_of_each,
    draw,
    encounters,
    general_instances,
    in_vlr_band,
    main_region,
    on_all_levels,
    region,
    vlr_overlap,
)
from ldctl.types import Assigned, Locations, Pair, Targets, Where

CLASSES = 4
KINDS = ("diou", "reference")


def scene(seed: int, num_images: int = 4) -> tuple[Locations, Targets, Assigned]:
    locations = grid(192, 192)
    targets = random_targets(num_images, 192, CLASSES, seed)
    pad_hw = torch.tensor([[192, 192], [192, 128], [64, 192], [192, 192]])[:num_images]
    return locations, targets, assign(locations, targets, pad_hw, CLASSES)


def dense_weights(where: Where, num_locations: int) -> Tensor:
    weights = torch.zeros(where.num_images * num_locations)
    weights[where.row] = where.weight
    return weights.view(where.num_images, num_locations)


def brute_vlr(xy: tuple[float, float], stride: float, objects: list, kind: str, gamma: float) -> tuple[float, float]:
    """Return a location's weight, and how close it comes to a limit of the region."""
    weight, closest = 0.0, math.inf
    half = 4 * stride
    left, top, right, bottom = xy[0] - half, xy[1] - half, xy[0] + half, xy[1] + half
    for (x1, y1, x2, y2), threshold in objects:
        shared = max(0.0, min(right, x2) - max(left, x1)) * max(0.0, min(bottom, y2) - max(top, y1))
        prior = (right - left) * (bottom - top)
        union = prior + (x2 - x1) * (y2 - y1) - shared
        offset = (xy[0] - (x1 + x2) / 2) ** 2 + (xy[1] - (y1 + y2) / 2) ** 2
        diagonal = (max(right, x2) - min(left, x1)) ** 2 + (max(bottom, y2) - min(top, y1)) ** 2
        overlap = shared / (prior if kind == "reference" else union) - offset / diagonal
        closest = min(closest, abs(overlap - threshold), abs(overlap - gamma * threshold))
        if gamma * threshold <= overlap < threshold:
            weight = max(weight, shared / union)
    return weight, closest


@pytest.mark.parametrize("gamma", [0.25, 0.6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_vlr_equals_brute_force(seed: int, kind: str, gamma: float) -> None:
    locations, targets, assigned = scene(seed)
    where = vlr_region(RegionSpec(vlr=kind, gamma=gamma), assigned, targets, locations)
    found = dense_weights(where, len(locations.level))
    assert (found > 0).sum() > 100
    for image in range(4):
        mask = targets.is_object[image]
        boxes, thresholds = targets.gt_xyxy[image, mask].tolist(), assigned.threshold[image, mask].tolist()
        objects = list(zip(boxes, thresholds, strict=True))
        for index, (xy, stride) in enumerate(zip(locations.xy.tolist(), locations.stride.tolist(), strict=True)):
            expected, closest = brute_vlr(xy, stride, objects, kind, gamma)
            if not assigned.is_valid[image, index]:
                expected = 0.0
            if closest > 1e-6:
                assert found[image, index].item() == pytest.approx(expected, abs=1e-6)


def test_the_two_definitions_differ_as_documented() -> None:
    """A small prior box inside a large object: low DIoU, yet an overlap of nearly 1 in the released code."""
    prior = torch.tensor([[68.0, 68.0, 132.0, 132.0]])
    gt = torch.tensor([[0.0, 0.0, 200.0, 200.0]])
    iou, diou = vlr_overlap(prior, gt, "diou")
    same_iou, reference = vlr_overlap(prior, gt, "reference")
    assert iou.item() == same_iou.item() == diou.item() == pytest.approx(64**2 / 200**2)
    assert reference.item() == 1.0
    a, b = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[5.0, 5.0, 20.0, 15.0]])
    assert vlr_overlap(a, b, "diou")[1].item() == pytest.approx(-0.0188888889, abs=1e-7)
    assert vlr_overlap(a, b, "reference")[1].item() == pytest.approx(0.12, abs=1e-7)


def test_band_is_closed_below_and_open_above() -> None:
    overlap = torch.tensor([0.1249, 0.125, 0.3, 0.5, 0.6])
    found = in_vlr_band(overlap, torch.full((5,), 0.5), gamma=0.25)
    assert found.tolist() == [False, True, True, False, False]


def test_the_best_of_a_locations_encounters_counts() -> None:
    _, _, assigned = scene(0)
    met = Encounters(row=torch.tensor([7, 3, 7, 7]), target=torch.tensor([0, 0, 1, 2]))
    best = best_of_each(met, torch.tensor([0.2, 0.1, 0.4, 0.0]), assigned)
    assert best.shape == assigned.label.shape
    assert best.flatten()[[3, 7]].tolist() == pytest.approx([0.1, 0.4])
    assert best.sum().item() == pytest.approx(0.5)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_encounters_are_all_pairs_that_share_area(seed: int, offset: float) -> None:
    """Also of objects beyond the image, of no area, and whose borders lie on the grid."""
    locations, targets = grid(96, 160, offset), random_targets(3, 160, CLASSES, seed)
    targets.gt_xyxy[0, 0] = torch.tensor([-50.0, -40.0, 300.0, 8.0])
    targets.gt_xyxy[1, 0] = torch.tensor([32.0, 32.0, 64.0, 64.0])
    targets.gt_xyxy[2, 0] = torch.tensor([41.0, 33.0, 41.0, 70.0])
    targets.is_object[:, 0] = True
    met = encounters(locations, targets, on_all_levels(targets, locations))
    num_objects = targets.is_object.shape[1]
    found = set(zip(met.row.tolist(), met.target.tolist(), strict=True))
    assert len(found) == len(met.row)
    half = 4 * locations.stride
    for image, index in targets.is_object.nonzero().tolist():
        x1, y1, x2, y2 = targets.gt_xyxy[image, index]
        is_near = (locations.xy[:, 0] + half > x1) & (locations.xy[:, 0] - half < x2)
        is_near &= (locations.xy[:, 1] + half > y1) & (locations.xy[:, 1] - half < y2)
        count, target = len(locations.level), image * num_objects + index
        mine = {row - image * count for row, met_target in found if met_target == target}
        assert mine == set(is_near.nonzero()[:, 0].tolist())
    assert len(encounters(locations, targets, on_all_levels(targets, locations) & False).row) == 0


def test_regions_drawn_together_are_those_drawn_alone() -> None:
    locations, targets, assigned = scene(4)
    student, teacher = (random_dense(locations, 4, CLASSES, seed) for seed in (4, 5))
    together = draw(DRAWN, RegionSpec(), student, assigned, targets)
    assert tuple(together) == DRAWN
    for name, where in together.items():
        alone = region(name, RegionSpec(), Pair(student, teacher), assigned, targets)
        for field in ("row", "weight", "level", "image"):
            assert torch.equal(getattr(where, field), getattr(alone, field)), (name, field)


@pytest.mark.parametrize("kind", KINDS)
def test_gamma(kind: str) -> None:
    locations, targets, assigned = scene(1)
    sizes, previous = [], None
    for gamma in (1.0, 0.75, 0.5, 0.25, 0.0):  # at 0 a padded object's infinite threshold gives 0 * inf
        row = set(vlr_region(RegionSpec(vlr=kind, gamma=gamma), assigned, targets, locations).row.tolist())
        assert previous is None or previous < row
        previous = row
        sizes.append(len(row))
    assert sizes[0] == 0


def test_rows_levels_and_images() -> None:
    locations, targets, assigned = scene(2)
    dense = random_dense(locations, 4, CLASSES, 2)
    count = len(locations.level)
    regions = {
        "main": main_region(dense, assigned),
        "vlr": vlr_region(RegionSpec(), assigned, targets, locations),
        "all": all_region(assigned, locations),
    }
    for name, where in regions.items():
        row = torch.arange(4 * count)[where.row]
        is_weighted = where.weight > 0
        assert is_weighted.any(), name
        assert (row.diff() > 0).all(), name
        assert torch.equal(where.image * count + row % count, row), name
        assert torch.equal(where.level, locations.level[row % count]), name
        assert (where.num_images, where.num_levels) == (4, 5), name
        assert assigned.is_valid.flatten()[row[is_weighted]].all(), name
        assert is_weighted.all() or name == "all", name
        assert (where.weight <= 1).all(), name
        assert not where.weight.requires_grad, name
    assert torch.equal(regions["all"].weight, assigned.is_valid.flatten().float())
    main = regions["main"]
    assert torch.equal(main.row, assigned.is_positive.flatten().nonzero()[:, 0])
    # the best of all classes, not the object's own
    score = dense.cls.detach().sigmoid().flatten(0, 1)[main.row]
    assert_close(main.weight, score.amax(dim=1))
    own = score.gather(1, assigned.label.flatten()[main.row, None])[:, 0]
    assert (main.weight > own + 0.01).any()


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_see_each_other(kind: str) -> None:
    locations, targets, _ = scene(3)
    pad_hw = torch.full((4, 2), 192)
    spec, count = RegionSpec(vlr=kind), len(locations.level)
    assigned = assign(locations, targets, pad_hw, CLASSES)
    found = dense_weights(vlr_region(spec, assigned, targets, locations), count)
    order = [2, 0, 3, 1]
    moved = images_of(targets, order)
    shuffled = assign(locations, moved, pad_hw, CLASSES)
    assert torch.equal(dense_weights(vlr_region(spec, shuffled, moved, locations), count), found[order])
    objects = torch.arange(targets.gt_label.shape[1]).flip(0)
    flipped = Targets(targets.gt_xyxy[:, objects], targets.gt_label[:, objects], targets.is_object[:, objects])
    again = vlr_region(spec, assign(locations, flipped, pad_hw, CLASSES), flipped, locations)
    assert torch.equal(dense_weights(again, count), found)


@pytest.mark.parametrize("kind", KINDS)
def test_without_objects(kind: str) -> None:
    locations = grid(64, 64)
    for images in ([[]], [[], [(8.0, 8.0, 40.0, 40.0, 2)]]):
        targets = targets_of(images)
        assigned = assign(locations, targets, torch.full((len(images), 2), 64), CLASSES)
        where = vlr_region(RegionSpec(vlr=kind), assigned, targets, locations)
        assert where.image.unique().tolist() == [1][: len(images) - 1]
        main = main_region(random_dense(locations, len(images), CLASSES, 0), assigned)
        assert main.image.unique().tolist() == [1][: len(images) - 1]


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_gamma_beyond_its_range_is_refused(gamma: float) -> None:
    with pytest.raises((ValueError, LdctlError), match="gamma"):
        RegionSpec(gamma=gamma)


def disagreement(num_images: int, seed: int) -> tuple[Pair, Targets, Assigned]:
    locations, targets, assigned = scene(seed, num_images)
    return Pair(*(random_dense(locations, num_images, CLASSES, seed + part) for part in (10, 20))), targets, assigned


@pytest.mark.parametrize("name", ["inside_gt", "outside_gt", "finegrained", "gi"])
def test_a_region_of_features_is_that_of_each_image_alone(name: Region) -> None:
    pair, targets, assigned = disagreement(3, seed=4)
    whole = region(name, RegionSpec(), pair, assigned, targets)
    rows = []
    for image in range(3):
        alone = Pair(images_of(pair.student, [image]), images_of(pair.teacher, [image]))
        some = Assigned(**{key: value[[image]] for key, value in vars(assigned).items()})
        found = region(name, RegionSpec(), alone, some, images_of(targets, [image]))
        rows.append(found.row + image * len(pair.student.locations.level))
    assert len(whole.row) > 0
    assert torch.equal(whole.row, torch.cat(rows))
    assert assigned.is_valid.flatten()[whole.row].all()


def python_iou(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union


def test_inside_of_objects_and_fine_grained_by_brute_force() -> None:
    """Objects whose borders run through locations, one that reaches into padding, and images of fewer objects."""
    images = [
        [(16.0, 16.0, 48.0, 40.0, 0), (3.0, 5.0, 60.0, 61.0, 1)],
        [(20.0, 8.0, 60.0, 56.0, 2)],  # only its left part is in the image
        [],
    ]
    locations, targets = grid(64, 64), targets_of(images)
    assigned = assign(locations, targets, torch.tensor([[64, 64], [64, 32], [64, 64]]), CLASSES)
    dense = random_dense(locations, 3, CLASSES, 0)
    found = {
        name: region(name, RegionSpec(), Pair(dense, dense), assigned, targets).row.tolist()
        for name in ("inside_gt", "outside_gt", "finegrained")
    }
    expected: dict[str, list[int]] = {name: [] for name in found}
    points = list(zip(locations.xy.tolist(), locations.stride.tolist(), strict=True))
    priors = [[x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride] for (x, y), stride in points]
    for image, objects in enumerate(images):
        valid = [index for index in range(len(points)) if assigned.is_valid[image, index]]
        best = {box: max(python_iou(priors[index], list(box[:4])) for index in valid) for box in objects}
        for index in valid:
            row, (x, y) = image * len(points) + index, points[index][0]
            is_inside = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2, _ in objects)
            expected["inside_gt" if is_inside else "outside_gt"].append(row)
            if any(python_iou(priors[index], list(box[:4])) > 0.5 * best[box] for box in objects):
                expected["finegrained"].append(row)
    assert found == expected
    assert min(map(len, expected.values())) > 10
    (box,) = images[1]  # prior boxes in the padding fit it better
    of_all = max(python_iou(prior, list(box[:4])) for prior in priors)
    of_valid = max(python_iou(priors[i], list(box[:4])) for i in range(len(points)) if assigned.is_valid[1, i])
    assert of_all > of_valid


def test_exactly_half_of_the_best_overlap_is_not_fine_grained() -> None:
    """Prior boxes inside the object have an IoU of 2/3; those that share 40 of their 64 columns with it, of 1/3."""
    locations = grid(64, 128)
    targets = targets_of([[(0.0, 0.0, 96.0, 64.0, 0)]])
    assigned = assign(locations, targets, torch.tensor([[64, 128]]), CLASSES)
    dense = random_dense(locations, 1, CLASSES, 0)
    row = region("finegrained", RegionSpec(), Pair(dense, dense), assigned, targets).row
    x = locations.xy[row][(locations.xy[row, 1] == 32) & (locations.level[row] == 0), 0]
    assert x.tolist() == [16, 24, 32, 40, 48, 56, 64, 72, 80]  # not 8 and 88


def test_general_instances_by_brute_force() -> None:
    pair, targets, assigned = disagreement(1, seed=5)
    locations = pair.student.locations
    student, teacher = pair.student.cls[0].sigmoid(), pair.teacher.cls[0].sigmoid()
    scored = []
    for index in range(len(locations.level)):
        label = int((student[index] - teacher[index]).abs().argmax())
        surer = pair.student if student[index, label] > teacher[index, label] else pair.teacher
        left, top, right, bottom = (expected_distance(surer.edge[0, index]) * locations.stride[index]).tolist()
        x, y = locations.xy[index].tolist()
        gap = (student[index, label] - teacher[index, label]).abs().item()
        if assigned.is_valid[0, index]:
            scored.append((gap, index, torch.tensor((x - left, y - top, x + right, y + bottom))))
    kept: list[tuple[float, int, torch.Tensor]] = []
    for one in sorted(scored, key=lambda item: -item[0]):
        if len(kept) < 10 and all(box_iou(one[2], other[2]) <= 0.3 for other in kept):
            kept.append(one)
    found = region("gi", RegionSpec(), pair, assigned, targets)
    assert found.row.tolist() == sorted(index for _, index, _ in kept)
    assert len(kept) > 3


def test_general_instances_of_images_whose_boxes_lie_left_of_and_above_them() -> None:
    """Suppression tells images apart by shifting their boxes; one below zero must not land on another image's."""
    locations = grid(64, 64)
    blank = random_dense(locations, 2, 1, 0)
    edge = torch.full_like(blank.edge, -50.0)
    edge[..., 0] = 50.0  # boxes without extent, but for two
    edge[0, 0, 2:, 16] = 150.0  # (0, 0) to (128, 128), the largest coordinate of all
    edge[1, 0, :2, 16] = 150.0  # (-128, -128) to (0, 0)
    silent = torch.full_like(blank.cls, -20.0)
    cls = silent.clone()
    cls[:, 0, 0] = torch.tensor([5.0, 3.0])
    pair = Pair(replace(blank, cls=cls, edge=edge), replace(blank, cls=silent, edge=edge))
    assigned = assign(locations, targets_of([[], []]), torch.full((2, 2), 64), 1)
    assert general_instances(pair, assigned)[:, 0].tolist() == [True, True]


@pytest.mark.parametrize("bins", [(9, 17), (17, 9)])
def test_general_instances_of_detectors_with_different_bins(bins: tuple[int, int]) -> None:
    """Their boxes decide; further bins that hold nothing change none."""
    locations, targets, assigned = scene(6, 2)
    dense = [random_dense(locations, 2, CLASSES, seed, num_bins=9) for seed in (30, 40)]
    pair = Pair(*dense)
    padded = [
        replace(each, edge=torch.nn.functional.pad(each.edge, (0, size - 9), value=-1e4))
        for each, size in zip(dense, bins, strict=True)
    ]
    found, expected = (region("gi", RegionSpec(), two, assigned, targets).row for two in (Pair(*padded), pair))
    assert torch.equal(found, expected)
