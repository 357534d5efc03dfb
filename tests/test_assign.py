"""ATSS against a brute-force version in numpy's float32, one object at a time, and its invariances."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scenes import STRIDES, grid, images_of, random_targets, targets_of
from torch.testing import assert_close

from ldctl.assign import assign, assign_fcos, nearest_locations, positive_threshold
from ldctl.types import Assigned, Locations, Targets

CLASSES = 7
f32 = np.float32


@dataclass
class Brute:
    """The assignment of one image."""

    label: np.ndarray
    box: np.ndarray
    valid: np.ndarray
    threshold: list[np.float64]
    candidates: list[set[int]]
    is_close: np.ndarray  # locations whose fate hangs on the last bit of a threshold


def brute_force(locations: Locations, boxes: np.ndarray, labels: np.ndarray, pad_hw: tuple[int, int]) -> Brute:
    """Assign by the definition: every location against every object, sorted, nothing vectorised over objects."""
    xy, stride, level = (x.numpy() for x in (locations.xy, locations.stride, locations.level))
    corner = xy - locations.offset * stride[:, None]
    valid = (corner[:, 0] < pad_hw[1]) & (corner[:, 1] < pad_hw[0])
    best = np.full(len(xy), -1, dtype=f32)
    owner = np.full(len(xy), -1)
    is_close = np.zeros(len(xy), dtype=bool)
    thresholds, all_candidates = [], []
    for index, box in enumerate(boxes):
        center = (box[:2] + box[2:]) / f32(2)
        offset = xy - center
        distance = np.sqrt(offset[:, 0] * offset[:, 0] + offset[:, 1] * offset[:, 1])
        candidates: list[int] = []
        for number in range(len(STRIDES)):
            here = np.flatnonzero(valid & (level == number))
            order = sorted(here.tolist(), key=lambda a: (distance[a], -a))
            candidates += order[:9]
        overlap = {}
        for a in candidates:
            half = f32(4) * stride[a]
            prior = np.concatenate((xy[a] - half, xy[a] + half))
            side = np.maximum(np.minimum(prior[2:], box[2:]) - np.maximum(prior[:2], box[:2]), f32(0))
            shared = side[0] * side[1]
            area = (prior[2] - prior[0]) * (prior[3] - prior[1]) + (box[2] - box[0]) * (box[3] - box[1])
            overlap[a] = shared / max(area - shared, f32(1e-6))
        values = np.array(list(overlap.values()), dtype=np.float64)
        threshold = values.mean() + values.std(ddof=1)
        for a in candidates:
            margin = min(xy[a][0] - box[0], xy[a][1] - box[1], box[2] - xy[a][0], box[3] - xy[a][1])
            if margin <= f32(0.01):
                continue
            is_close[a] |= 0 < abs(overlap[a] - threshold) < 1e-6
            if overlap[a] >= threshold and overlap[a] > best[a]:  # strictly more: the lower index keeps a tie
                best[a], owner[a] = overlap[a], index
        thresholds.append(threshold)
        all_candidates.append(set(candidates))
    label = np.where(owner >= 0, labels[owner], CLASSES) if len(labels) else np.full(len(xy), CLASSES)
    box = np.where(owner[:, None] >= 0, boxes[owner], f32(0)) if len(labels) else np.zeros((len(xy), 4), f32)
    return Brute(label, box, valid, thresholds, all_candidates, is_close)


@st.composite
def images(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[float, float, float, float, int]]]:
    """Draw a padded size and objects: on the grid and off it, tiny and huge, inside the image and wholly outside."""
    height, width = (32 * draw(st.integers(1, 7)) for _ in range(2))
    step = draw(st.sampled_from([8.0, 4.0, 1.0, 0.1]))
    objects = []
    for _ in range(draw(st.integers(0, 5))):
        reach = 150
        x, y = (draw(st.integers(int(-reach / step), int((side + reach) / step))) * step for side in (width, height))
        w, h = (draw(st.sampled_from([0.5, 6.0, 16.0, 24.0, 64.0, 100.0, 128.0, 300.0])) for _ in range(2))
        objects.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, draw(st.integers(0, CLASSES - 1))))
    if objects and draw(st.booleans()):
        objects.append((*objects[0][:4], (objects[0][4] + 1) % CLASSES))  # the same box again, another label
    return (height, width), objects


def run(batch: list) -> tuple[Locations, Targets, torch.Tensor, Assigned]:
    pad_hw = torch.tensor([size for size, _ in batch])
    locations = grid(*pad_hw.amax(dim=0).tolist())
    targets = targets_of([objects for _, objects in batch])
    return locations, targets, pad_hw, assign(locations, targets, pad_hw, CLASSES)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(images(), min_size=1, max_size=3))
@example([((32, 32), [(0.0, 0.0, 32.0, 32.0, 1)])])  # levels of 16, 4, 1, 1 and 1 locations
@example([((224, 32), [(2.0, 4.0, 30.0, 220.0, 1)]), ((32, 224), [])])
@example([((64, 64), [(20.0, 20.0, 36.0, 36.0, 0), (20.0, 20.0, 36.0, 36.0, 3)])])  # identical objects
def test_equals_brute_force(batch: list) -> None:
    locations, targets, pad_hw, found = run(batch)
    candidate, is_candidate = nearest_locations(locations, targets.gt_xyxy, pad_hw)
    for image, (size, objects) in enumerate(batch):
        count = len(objects)
        boxes = np.array([box for *box, _ in objects], dtype=f32).reshape(-1, 4)
        expected = brute_force(locations, boxes, np.array([label for *_, label in objects], dtype=int), size)
        for index in range(count):
            assert set(candidate[image, index][is_candidate[image, index]].tolist()) == expected.candidates[index]
        assert_close(
            found.threshold[image, :count].double().numpy(), np.array(expected.threshold), rtol=1e-5, atol=1e-7
        )
        assert found.threshold[image, count:].isposinf().all()
        assert np.array_equal(found.is_valid[image].numpy(), expected.valid)
        sure = ~expected.is_close
        assert np.array_equal(found.label[image].numpy()[sure], expected.label[sure])
        assert np.array_equal(found.gt_xyxy[image].numpy()[sure], expected.box[sure])
        assert np.array_equal(found.is_positive[image].numpy()[sure], (expected.label < CLASSES)[sure])


def test_most_scenes_have_positives_and_ambiguities_are_rare() -> None:
    """The comparison above would be empty if the scenes were."""
    targets = random_targets(16, 256, CLASSES, seed=0)
    locations, pad_hw = grid(256, 256), torch.full((16, 2), 256)
    found = assign(locations, targets, pad_hw, CLASSES)
    num_close = 0
    for image in range(16):
        mask = targets.is_object[image]
        boxes, labels = targets.gt_xyxy[image, mask].numpy(), targets.gt_label[image, mask].numpy()
        num_close += brute_force(locations, boxes, labels, (256, 256)).is_close.sum()
    assert num_close == 0
    assert found.is_positive.sum() > 2 * targets.is_object.sum()


def test_by_hand() -> None:
    """One object of 32 x 32 px on an image of 64 x 64: each prior box holds it whole, IoU is the ratio of areas."""
    locations, _, _, found = run([((64, 64), [(8.0, 8.0, 40.0, 40.0, 2)])])
    values = [
        32**2 / prior**2 for prior, count in ((64, 9), (128, 9), (256, 4), (512, 1), (1024, 1)) for _ in range(count)
    ]
    threshold = np.mean(values) + np.std(values, ddof=1)
    assert threshold == pytest.approx(0.2249, abs=1e-4)
    assert found.threshold.item() == pytest.approx(threshold, rel=1e-6)
    positive = locations.xy[found.is_positive[0]]
    assert sorted(map(tuple, positive.tolist())) == [(x, y) for x in (16.0, 24.0, 32.0) for y in (16.0, 24.0, 32.0)]


def test_standard_deviation_is_unbiased() -> None:
    iou = torch.tensor([[[0.1, 0.2, 0.6, 9.0]]])
    threshold = positive_threshold(iou, torch.tensor([[[True, True, True, False]]]))
    assert threshold.item() == pytest.approx(0.3 + (0.14 / 2) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("center", "expected"),
    [
        # on column 13, row 16: the block of 3 x 3 around it
        ((104.0, 128.0), [(row, column) for row in (15, 16, 17) for column in (12, 13, 14)]),
        # midway between columns 12 and 13: eight are nearer than (11 | 14, 15 | 17), which are equally far
        (
            (100.0, 128.0),
            [(row, column) for row in (15, 16, 17) for column in (12, 13)] + [(16, 11), (16, 14)] + [(17, 14)],
        ),
    ],
)
def test_equal_distances_go_to_the_higher_index(center: tuple[float, float], expected: list[tuple[int, int]]) -> None:
    x, y = center
    box = torch.tensor([[[x - 4, y - 8, x + 4, y + 8]]])
    candidate, is_candidate = nearest_locations(grid(256, 256), box, torch.tensor([[256, 256]]))
    finest = [index for index in candidate[is_candidate].tolist() if index < 32 * 32]
    assert sorted(finest) == sorted(32 * row + column for row, column in expected)


def test_equal_overlaps_go_to_the_object_of_lower_index() -> None:
    box = (20.0, 20.0, 60.0, 60.0)
    for labels in ((3, 5), (5, 3)):
        *_, found = run([((64, 64), [(*box, label) for label in labels])])
        assert found.label[found.is_positive].unique().tolist() == [labels[0]]


def test_margin_is_strict() -> None:
    """A location on an object's edge, or 0.01 px inside, is not in it."""
    locations = grid(64, 64)
    for left, count in ((24.0, 0), (23.995, 0), (23.95, 1)):
        targets = targets_of([[(left, 10.0, left + 16.0, 22.0, 0)]])
        found = assign(locations, targets, torch.tensor([[64, 64]]), CLASSES)
        at = (locations.xy == torch.tensor([24.0, 16.0])).all(dim=1) & (locations.level == 0)
        assert found.is_positive[0, at].sum().item() == count


def test_a_location_at_the_threshold_is_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = 32**2 / 64**2  # of the finest prior boxes, exactly
    monkeypatch.setattr("ldctl.assign.positive_threshold", lambda iou, _: torch.full(iou.shape[:2], overlap))
    *_, found = run([((64, 64), [(8.0, 8.0, 40.0, 40.0, 2)])])
    assert found.is_positive.sum() == 9


def test_padded_objects_take_part_in_nothing() -> None:
    """Whatever stands in their boxes."""
    locations, targets, pad_hw, found = run([((64, 64), [(8.0, 8.0, 40.0, 40.0, 2), (30.0, 20.0, 60.0, 50.0, 1)])])
    masked = Targets(targets.gt_xyxy, targets.gt_label, torch.tensor([[True, False]]))
    again = assign(locations, masked, pad_hw, CLASSES)
    *_, alone = run([((64, 64), [(8.0, 8.0, 40.0, 40.0, 2)])])
    same(again, alone)
    assert again.threshold.tolist() == [[alone.threshold.item(), float("inf")]]
    assert (found.label == 1).any()


def test_invalid_locations_take_part_in_nothing() -> None:
    """An image padded less than its batch is assigned as if it stood alone."""
    small = ((64, 96), [(10.0, 10.0, 120.0, 90.0, 1), (50.0, 30.0, 90.0, 60.0, 2)])
    locations, _, _, found = run([small, ((192, 160), [])])
    own_locations, _, _, own = run([small])
    assert torch.equal(found.threshold[0], own.threshold[0])
    assert not found.is_positive[0, ~found.is_valid[0]].any()
    valid = found.is_valid[0]
    assert torch.equal(locations.xy[valid], own_locations.xy)
    assert torch.equal(found.label[0, valid], own.label[0])


def test_without_objects() -> None:
    for batch in ([((64, 64), [])], [((64, 64), []), ((64, 64), [(8.0, 8.0, 40.0, 40.0, 2)])]):
        *_, found = run(batch)
        assert (found.label[0] == CLASSES).all()
        assert not found.is_positive[0].any()
        assert not found.gt_xyxy[0].any()
        assert found.is_valid[0].all()


def same(a: Assigned, b: Assigned) -> None:
    for name in ("label", "gt_xyxy", "is_positive", "is_valid"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("seed", range(5))
def test_order_of_objects_and_images_and_the_split_of_the_batch_do_not_matter(seed: int) -> None:
    num_images = 6
    targets = random_targets(num_images, 256, CLASSES, seed)
    locations = grid(256, 320)
    pad_hw = torch.tensor([[256, 320], [256, 256], [128, 320], [32, 32], [224, 96], [256, 320]])
    found = assign(locations, targets, pad_hw, CLASSES)
    assert found.is_positive.any()

    generator = torch.Generator().manual_seed(seed)
    objects = torch.randperm(targets.gt_label.shape[1], generator=generator)
    moved = Targets(targets.gt_xyxy[:, objects], targets.gt_label[:, objects], targets.is_object[:, objects])
    permuted = assign(locations, moved, pad_hw, CLASSES)
    same(permuted, found)
    assert torch.equal(permuted.threshold, found.threshold[:, objects])

    order = torch.randperm(num_images, generator=generator).tolist()
    shuffled = assign(locations, images_of(targets, order), pad_hw[order], CLASSES)
    for place, image in enumerate(order):
        alone = assign(locations, images_of(targets, [image]), pad_hw[[image]], CLASSES)
        for name in ("label", "gt_xyxy", "is_positive", "is_valid", "threshold"):
            assert torch.equal(getattr(shuffled, name)[place], getattr(found, name)[image]), name
            assert torch.equal(getattr(alone, name)[0], getattr(found, name)[image]), name


# --- FCOS -----------------------------------------------------------------------------------------------------------

RANGES_PX = [(-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]


def brute_fcos(
    locations: Locations, boxes: list[tuple[float, float, float, float, int]], pad_hw: tuple[int, int]
) -> tuple[list[int], list[tuple[float, ...]]]:
    """Assign by the released code's rule, in pixels: every location against every object; return labels and boxes."""
    labels, owned = [], []
    for (x, y), stride, level in zip(
        locations.xy.tolist(), locations.stride.tolist(), locations.level.tolist(), strict=True
    ):
        best, label, owner = math.inf, CLASSES, (0.0, 0.0, 0.0, 0.0)
        for x1, y1, x2, y2, number in boxes:
            left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            is_central = abs(x - cx) < 1.5 * stride and abs(y - cy) < 1.5 * stride
            low, high = RANGES_PX[level]
            is_in_range = low <= max(left, top, right, bottom) <= high
            is_cell = x - stride / 2 < pad_hw[1] and y - stride / 2 < pad_hw[0]
            area = (x2 - x1) * (y2 - y1)
            if is_cell and min(left, top, right, bottom) > 0 and is_central and is_in_range and area < best:
                best, label, owner = area, number, (x1, y1, x2, y2)
        labels.append(label)
        owned.append(owner)
    return labels, owned


def run_fcos(batch: list) -> tuple[Locations, Targets, torch.Tensor, Assigned]:
    pad_hw = torch.tensor([size for size, _ in batch])
    locations = grid(*pad_hw.amax(dim=0).tolist(), 0.5)
    targets = targets_of([objects for _, objects in batch])
    return locations, targets, pad_hw, assign_fcos(locations, targets, pad_hw, CLASSES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(images(), min_size=1, max_size=3))
@example([((32, 32), [(0.0, 0.0, 32.0, 32.0, 1)])])
@example([((224, 32), [(2.0, 4.0, 30.0, 220.0, 1)]), ((32, 224), [])])
@example([((64, 64), [(20.0, 20.0, 36.0, 36.0, 0), (20.0, 20.0, 36.0, 36.0, 3)])])  # identical objects
@example([((64, 64), [(11.75, 11.75, 35.75, 35.75, 1)])])  # 11.75 pixels from the centre: just less than 1.5 strides
@example([((224, 224), [(0.0, 0.0, 128.0, 128.0, 1), (8.0, 8.0, 136.0, 136.0, 2)])])  # reaches of exactly 64 and 128
def test_fcos_equals_brute_force(batch: list) -> None:
    # to the fourth of a pixel everything is exact: a location may lie on the very rim of what answers
    batch = [(size, [(*(round(4 * x) / 4 for x in box), label) for *box, label in objects]) for size, objects in batch]
    locations, _, _, found = run_fcos(batch)
    for image, (size, objects) in enumerate(batch):
        labels, owned = brute_fcos(locations, objects, size)
        assert found.label[image].tolist() == labels
        assert found.gt_xyxy[image].tolist() == [list(box) for box in owned]
        assert torch.equal(found.is_positive[image], found.label[image] < CLASSES)
        boxes = np.array([box for *box, _ in objects], dtype=f32).reshape(-1, 4)
        expected = brute_force(locations, boxes, np.zeros(len(boxes), dtype=int), size)
        count = len(objects)
        assert np.array_equal(found.is_valid[image].numpy(), expected.valid)
        assert_close(
            found.threshold[image, :count].double().numpy(), np.array(expected.threshold), rtol=1e-5, atol=1e-7
        )
        assert found.threshold[image, count:].isposinf().all()


def test_fcos_scenes_have_positives_on_every_level_and_locations_in_dispute() -> None:
    """The comparison above would be empty if the scenes were."""
    objects = [(x - r, y - r, x + r, y + r, 0) for x, y, r in [(50, 60, 20), (120, 60, 50), (200, 200, 150)]]
    objects += [(10.0, 10.0, 410.0, 410.0, 1), (0.0, 0.0, 1400.0, 1300.0, 2), (46.0, 50.0, 60.0, 70.0, 3)]
    locations, _, _, found = run_fcos([((1312, 1408), objects)])
    counts = torch.bincount(locations.level[found.is_positive[0]], minlength=5)
    assert (counts > 0).all()
    assert counts.max() <= 9 * len(objects)
    labels, _ = brute_fcos(locations, objects, (1312, 1408))
    assert found.label[0].tolist() == labels
    alone = run_fcos([((1312, 1408), objects[:1])])[3].is_positive[0]
    assert (found.label[0][alone] == 3).any(), "the smaller object took some"


def test_fcos_of_an_image_does_not_depend_on_its_batch() -> None:
    sizes = [(128, 160), (96, 64), (160, 160)]
    targets = random_targets(3, 128, CLASSES, seed=5)
    locations, pad_hw = grid(160, 160, 0.5), torch.tensor(sizes)
    found = assign_fcos(locations, targets, pad_hw, CLASSES)
    assert found.is_positive.sum() > 20
    for image in range(3):
        alone = assign_fcos(locations, images_of(targets, [image]), pad_hw[[image]], CLASSES)
        for name, value in vars(alone).items():
            assert torch.equal(value[0], getattr(found, name)[image]), name
