"""RetinaNet: nine prior boxes at a cell, the assignment by their IoU, its losses, and what learns from what."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scenes import STRIDES, images_of, random_dense, random_targets, targets_of
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import assign_max_iou, candidates
from ldctl.boxes import location_grid, octave_priors, prior_boxes
from ldctl.distill import CWD, KD, LD, PKD, BCKDBox, BinaryKD, CrossKDBox, CrossKDClass, Imitation, Term
from ldctl.distill.features import level_maps, of_cells
from ldctl.distillation import DistillationSpec
from ldctl.errors import SpecError
from ldctl.losses import LossSpec, normalizer, overlap_losses
from ldctl.models import Detector, HeadSpec, ModelSpec, PostprocessSpec, ResNetSpec, detect
from ldctl.pairing import share_levels
from ldctl.regions import RegionSpec, all_region, main_region, pick_rows, region, vlr_overlap
from ldctl.spec import AssistantSpec, DistillSpec, TaughtSpec, load
from ldctl.step import Learner, Teaching, compare
from ldctl.types import Assigned, Locations, Pair, Targets, Where

CLASSES = 5
f32 = np.float32


def grid(height: int, width: int) -> Locations:
    sizes = tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)
    return location_grid(sizes, STRIDES, torch.device("cpu"), prior_wh=octave_priors())


def detector(kind: str = "retina", seed: int = 0, **head: object) -> Detector:
    torch.manual_seed(seed)
    spec = HeadSpec.model_validate({"kind": kind, "num_convs": 2, **head})
    backbone = ResNetSpec(depth=18, width=0.125, init="none", norm="frozen")
    return Detector(ModelSpec(backbone=backbone, head=spec, channels=32), CLASSES)


# --- prior boxes ----------------------------------------------------------------------------------------------------


def test_prior_boxes_of_one_cell_by_hand() -> None:
    """Half of each side is 2, 2.5198 or 3.1748 strides, divided or multiplied by the fourth root of 4."""
    locations = grid(64, 64)
    assert locations.level_sizes == (9 * 64, 9 * 16, 9 * 4, 9, 9)
    cell = 8 + 2  # of the finest level: column 2, row 1
    assert locations.xy[9 * cell : 9 * cell + 9].tolist() == [[16.0, 8.0]] * 9
    small, middle, large = 16.0, 20.158737, 25.398417  # half sides of the squares, pixels
    wide, narrow = math.sqrt(2), 1 / math.sqrt(2)
    halves = [(wide * side, narrow * side) for side in (small, middle, large)]
    halves += [(side, side) for side in (small, middle, large)]
    halves += [(narrow * side, wide * side) for side in (small, middle, large)]
    expected = torch.tensor([(16 - x, 8 - y, 16 + x, 8 + y) for x, y in halves])
    assert_close(prior_boxes(locations)[9 * cell : 9 * cell + 9], expected, rtol=1e-6, atol=1e-5)
    assert prior_boxes(locations)[9 * cell + 3].tolist() == [0.0, -8.0, 32.0, 24.0]


# --- assignment -----------------------------------------------------------------------------------------------------


@dataclass
class Brute:
    """The assignment of one image."""

    owner: list[int]  # -1 for background, -2 where ignored
    valid: list[bool]
    threshold: list[float]


def brute_force(locations: Locations, boxes: np.ndarray, pad_hw: tuple[int, int]) -> Brute:
    """Assign by mmdet's rule, location by location, in single precision; an object without overlap takes none."""
    root = np.sqrt(np.array([0.5, 1.0, 2.0], dtype=f32))
    shapes = [(f32(1) / r * f32(4 * 2 ** (k / 3)), r * f32(4 * 2 ** (k / 3))) for r in root for k in range(3)]
    xy, stride, level = (x.numpy() for x in (locations.xy, locations.stride, locations.level))
    half = np.array([shapes[a % 9] for a in range(len(xy))], dtype=f32) * stride[:, None] / f32(2)
    prior = np.concatenate((xy - half, xy + half), axis=1)
    valid = (xy[:, 0] < pad_hw[1]) & (xy[:, 1] < pad_hw[0])
    iou = np.zeros((len(boxes), len(xy)), dtype=f32)
    for g, box in enumerate(boxes):
        side = np.maximum(np.minimum(prior[:, 2:], box[2:]) - np.maximum(prior[:, :2], box[:2]), f32(0))
        shared = side[:, 0] * side[:, 1]
        areas = (prior[:, 2] - prior[:, 0]) * (prior[:, 3] - prior[:, 1]) + (box[2] - box[0]) * (box[3] - box[1])
        iou[g] = np.where(valid, shared / np.maximum(areas - shared, f32(1e-6)), f32(0))
    owner = np.full(len(xy), -1)
    highest = np.zeros(len(xy), dtype=f32)
    for g in range(len(boxes)):
        is_best = iou[g] > highest  # strictly more: the lower index keeps a tie
        owner = np.where(is_best & (iou[g] >= f32(0.4)), np.where(iou[g] >= f32(0.5), g, -2), owner)
        highest = np.maximum(highest, iou[g])
    for g in range(len(boxes)):  # in this order: the last one has it
        if iou[g].max() > 0:
            owner[iou[g] == iou[g].max()] = g
    thresholds = []
    for g, box in enumerate(boxes):
        near: list[int] = []
        center = (box[:2] + box[2:]) / f32(2)
        for number in range(len(STRIDES)):
            here = np.flatnonzero(valid & (level == number))[::9]
            distance = np.sqrt(((xy[here] - center) ** 2).sum(axis=1))
            nearest = max(a for a, d in zip(here.tolist(), distance, strict=True) if d == distance.min())
            near += range(nearest, nearest + 9)
        values = iou[g, near].astype(np.float64)
        thresholds.append(values.mean() + values.std(ddof=1))
    return Brute(owner.tolist(), valid.tolist(), thresholds)


@st.composite
def images(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[float, float, float, float, int]]]:
    """Draw a padded size and objects: on the grid and off it, tiny and huge, inside the image and wholly outside."""
    height, width = (32 * draw(st.integers(1, 6)) for _ in range(2))
    step = draw(st.sampled_from([8.0, 4.0, 1.0, 0.1]))
    objects = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = (draw(st.integers(int(-100 / step), int((side + 100) / step))) * step for side in (width, height))
        w, h = (draw(st.sampled_from([0.5, 4.0, 16.0, 24.0, 32.0, 64.0, 100.0, 128.0, 300.0])) for _ in range(2))
        w, h = max(w, h / 10), max(h, w / 10)  # longer ones have a test of their own
        objects.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, draw(st.integers(0, CLASSES - 1))))
    if objects and draw(st.booleans()):
        objects.append((*objects[0][:4], (objects[0][4] + 1) % CLASSES))  # the same box again, another label
    return (height, width), objects


def run(batch: list) -> tuple[Locations, Targets, Tensor, Assigned]:
    pad_hw = torch.tensor([size for size, _ in batch])
    locations = grid(*pad_hw.amax(dim=0).tolist())
    targets = targets_of([objects for _, objects in batch])
    return locations, targets, pad_hw, assign_max_iou(locations, targets, pad_hw, CLASSES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(images(), min_size=1, max_size=3))
@example([((32, 32), [])])
@example([((32, 32), [(0.0, 0.0, 32.0, 32.0, 1)])])
@example([((192, 32), [(2.0, 4.0, 30.0, 180.0, 1)]), ((32, 192), [])])
@example([((64, 64), [(20.0, 20.0, 36.0, 36.0, 0), (20.0, 20.0, 36.0, 36.0, 3)])])  # identical objects
@example([((64, 64), [(16.0, 16.0, 48.0, 48.0, 0), (31.0, 31.0, 33.0, 33.0, 3)])])  # the small one takes from the other
@example([((64, 64), [(24.0, 24.0, 40.0, 56.0, 2)])])  # half of a prior box of 32 x 32: exactly 0.5
def test_equals_brute_force(batch: list) -> None:
    locations, _, _, found = run(batch)
    for image, (size, objects) in enumerate(batch):
        boxes = np.array([box for *box, _ in objects], dtype=f32).reshape(-1, 4)
        expected = brute_force(locations, boxes, size)
        labels = [objects[g][4] if g >= 0 else CLASSES for g in expected.owner]
        assert found.label[image].tolist() == labels
        owned = torch.tensor([boxes[g].tolist() if g >= 0 else [0.0] * 4 for g in expected.owner])
        assert torch.equal(found.gt_xyxy[image], owned)
        assert found.is_positive[image].tolist() == [g >= 0 for g in expected.owner]
        assert found.is_ignored[image].tolist() == [g == -2 for g in expected.owner]
        assert found.is_valid[image].tolist() == expected.valid
        count = len(objects)
        threshold = torch.tensor(expected.threshold, dtype=torch.float64)
        assert_close(found.threshold[image, :count].double(), threshold, rtol=1e-5, atol=1e-7)
        assert found.threshold[image, count:].isposinf().all()


def test_scenes_have_positives_of_both_rules_and_ignored_locations() -> None:
    """The comparison above would be empty if the scenes were."""
    targets = random_targets(8, 192, CLASSES, seed=0)
    pad_hw = torch.full((8, 2), 192)
    found = assign_max_iou(grid(192, 192), targets, pad_hw, CLASSES)
    assert found.is_positive.sum() > 5 * targets.is_object.sum()
    assert found.is_ignored.sum() > 2 * targets.is_object.sum()
    assert not (found.is_positive & found.is_ignored).any()


def test_by_hand() -> None:
    """An object that is a prior box itself: others of the cell overlap it as their sides go, neighbours by shift."""
    locations, _, _, found = run([((64, 64), [(16.0, 16.0, 48.0, 48.0, 2)])])
    cell = 4 * 8 + 4  # column 4, row 4
    assert locations.xy[9 * cell].tolist() == [32.0, 32.0]

    def state(column: int, row: int, prior: int) -> str:
        location = 9 * (8 * row + column) + prior
        if found.is_ignored[0, location]:
            return "ignored"
        return "positive" if found.label[0, location] == 2 else "background"

    # 45.3 x 22.6: 0.55; 57 x 28.5: 0.52; 71.8 x 35.9: 0.40; squares of 32, 40.3 and 50.8: 1, 0.63 and 0.397
    shape = ["positive", "positive", "background", "positive", "positive", "background"]
    assert [state(4, 4, prior) for prior in range(9)] == [*shape, *shape[:3]]
    assert state(5, 4, 3) == state(4, 3, 3) == "positive"  # 24 * 32 of 32 * 32 shared: 0.6
    assert state(5, 5, 3) == "background"  # 24 * 24: 0.391
    assert state(5, 5, 4) == "ignored"  # 28.2 * 28.2 of 40.3 * 40.3: 0.427
    assert state(6, 4, 3) == "background"  # 16 * 32: 1 / 3


def test_an_object_takes_what_overlaps_it_best_from_one_that_overlaps_more() -> None:
    """However little; of two such objects the last has it."""
    big, small = (16.0, 16.0, 48.0, 48.0), (31.5, 31.5, 32.5, 32.5)
    *_, found = run([((64, 64), [(*big, 2), (*small, 3), (*small, 4)])])
    at = 9 * (4 * 8 + 4) + 3
    assert found.label[0, at] == 4
    assert found.gt_xyxy[0, at].tolist() == list(small)
    assert not (found.label[0] == 3).any()
    assert (found.label[0] == 2).any()


def test_of_a_very_long_object_the_middle_is_enough() -> None:
    """The prior boxes that lie wholly inside overlap it equally; those in the window are taken, and no others."""
    box = (4.0, 120.0, 1020.0, 136.0)
    locations, _, _, found = run([((256, 1024), [(*box, 2)])])
    expected = brute_force(locations, np.array([box], dtype=f32), (256, 1024))
    wanted = torch.tensor([g == 0 for g in expected.owner])
    is_near = (locations.xy[:, 0] - 512).abs() <= 7 * locations.stride
    assert wanted.sum() > (wanted & is_near).sum() > 5
    assert torch.equal(found.is_positive[0], wanted & is_near)


def test_an_image_does_not_depend_on_its_batch() -> None:
    sizes = [(128, 160), (96, 64), (160, 160)]
    targets = random_targets(3, 128, CLASSES, seed=5)
    locations, pad_hw = grid(160, 160), torch.tensor(sizes)
    found = assign_max_iou(locations, targets, pad_hw, CLASSES)
    assert found.is_positive.sum() > 20
    for image in range(3):
        alone = assign_max_iou(locations, images_of(targets, [image]), pad_hw[[image]], CLASSES)
        for name, value in vars(alone).items():
            assert torch.equal(value[0], getattr(found, name)[image]), name


def test_the_candidates_are_the_nearest_cells_prior_boxes() -> None:
    """Nine locations are nearest, as in the released code: all of one cell, on each level."""
    targets = targets_of([[(20.0, 30.0, 44.0, 50.0, 1)]])
    found = candidates(grid(64, 64), targets, torch.tensor([[64, 64]]))
    first = [0, 9 * 64, 9 * 80, 9 * 84, 9 * 85]
    # nearest to column 32, row 40; of rows 32 and 48 of stride 16, which are equally far, the one of higher index
    cells = [5 * 8 + 4, 3 * 4 + 2, 1 * 2 + 1, 0, 0]
    expected = [start + 9 * cell + prior for start, cell in zip(first, cells, strict=True) for prior in range(9)]
    assert found.index[0, 0].tolist() == expected
    assert found.is_candidate.all()


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_written_out() -> None:
    """Focal over positives and background, GIoU over positives, both over the number of positives."""
    locations = grid(64, 64)
    targets = random_targets(3, 64, CLASSES, seed=1)
    assigned = assign_max_iou(locations, targets, torch.tensor([[64, 64], [32, 64], [64, 64]]), CLASSES)
    dense = random_dense(locations, 3, CLASSES, 0)
    main = main_region(dense, assigned)
    norm = normalizer("synced", assigned, main)
    (at_main,) = dense.at([main.picked])
    found = overlap_losses(LossSpec(focal=0.5, giou=3.0), dense, at_main, assigned, main, norm)
    focal = giou = 0.0
    counts = [0, 0, 0]
    for image, a in itertools.product(range(3), range(len(locations.level))):
        counts[image] += bool(assigned.is_positive[image, a])
        if not assigned.is_valid[image, a] or assigned.is_ignored[image, a]:
            continue
        for number, logit in enumerate(dense.cls[image, a].tolist()):
            p = 1 / (1 + math.exp(-logit))
            is_object = assigned.label[image, a] == number
            focal += -0.25 * (1 - p) ** 2 * math.log(p) if is_object else -0.75 * p**2 * math.log(1 - p)
        if assigned.is_positive[image, a]:
            stride, (x, y) = locations.stride[a].item(), locations.xy[a].tolist()
            bins = torch.arange(17.0, dtype=torch.float64)
            left, top, right, bottom = (dense.edge[image, a].double().softmax(dim=-1) @ bins * stride).tolist()
            x1, y1, x2, y2 = x - left, y - top, x + right, y + bottom
            gx1, gy1, gx2, gy2 = assigned.gt_xyxy[image, a].tolist()
            shared = max(min(x2, gx2) - max(x1, gx1), 0) * max(min(y2, gy2) - max(y1, gy1), 0)
            union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - shared
            around = (max(x2, gx2) - min(x1, gx1)) * (max(y2, gy2) - min(y1, gy1))
            giou += 1 - (shared / union - (around - union) / around)
    total = sum(max(count, 1) for count in counts)
    assert sum(counts) > 10
    assert assigned.is_ignored.any()
    assert found["focal"].item() == pytest.approx(0.5 * focal / total, rel=1e-5)
    assert found["giou"].item() == pytest.approx(3.0 * giou / total, rel=1e-5)
    assert list(found) == ["focal", "giou"]


def test_ignored_locations_have_no_gradient_and_images_without_objects_a_zero_one() -> None:
    locations = grid(64, 64)
    box = (16.0, 16.0, 48.0, 48.0, 2)
    for objects, count in (([box], 1), ([], 0)):
        assigned = assign_max_iou(locations, targets_of([objects]), torch.tensor([[64, 64]]), CLASSES)
        dense = random_dense(locations, 1, CLASSES, 0)
        main = main_region(dense, assigned)
        (at_main,) = dense.at([main.picked])
        losses = overlap_losses(LossSpec(), dense, at_main, assigned, main, normalizer("synced", assigned, main))
        torch.stack(list(losses.values())).sum().backward()
        assert dense.cls.grad is not None
        assert torch.equal(dense.cls.grad.any(dim=-1), ~assigned.is_ignored)
        assert dense.edge.grad is not None
        assert torch.equal(dense.edge.grad.flatten(2).any(dim=-1), assigned.is_positive)
        assert bool(losses["giou"]) == bool(count)


# --- the head -------------------------------------------------------------------------------------------------------


def test_each_prior_box_has_channels_of_its_own() -> None:
    """As in mmdet: those of one after another, classes and edges alike; all are decoded from the cell's place."""
    model = detector()
    head = model.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.cls.bias.copy_(torch.arange(9.0 * CLASSES) / 10 - 8)
        bias = head.edge.bias.view(9, 4, 17)
        for prior, edge in itertools.product(range(9), range(4)):
            bias[prior, edge, prior + edge] = 100.0  # left, top, right and bottom of prior k: k, k + 1, k + 2, k + 3
        dense = head(tuple(torch.zeros(1, 32, side, side) for side in (4, 2, 1, 1, 1)))
    assert len(head.scales) == 0
    assert dense.quality is None
    expected = torch.arange(9.0 * CLASSES).view(9, CLASSES) / 10 - 8
    assert_close(dense.cls[0], expected.repeat(16 + 4 + 3, 1))
    only = dense.cls.new_full(dense.cls.shape, -20.0)
    cell = 16 + 3  # of stride 16: column 1, row 1
    only[0, 9 * cell + 2, 3] = 3.0
    (found,) = detect(
        replace(dense, cls=only), torch.tensor([[256, 256]]), torch.tensor([[256, 256]]), (7,), PostprocessSpec()
    )
    assert found.xyxy.tolist() == [
        [0.0, 0.0, 16 + 4 * 16, 16 + 5 * 16]
    ]  # 2 and 3 strides to the left, and above: clipped
    assert found.label.tolist() == [3]


def test_pyramid_makes_its_map_of_stride_64_from_the_input() -> None:
    plain, retina = detector("gfl").fpn, detector().fpn
    same = {name: value for name, value in plain.state_dict().items() if name != "output.3.weight"}
    retina.load_state_dict(same, strict=False)
    maps = tuple(torch.randn(1, channels, side, side) for channels, side in ((16, 8), (32, 4), (64, 2)))
    found, expected = retina(maps), plain(maps)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
    assert torch.equal(found[3], retina.output[3](maps[2]))
    assert torch.equal(found[4], retina.output[4](found[3]))  # no activation between
    assert found[3].min() < 0


def test_towers_without_norm_have_a_bias() -> None:
    model = detector(norm="none")
    names = {name.removeprefix("head.cls_tower.") for name in model.state_dict() if "cls_tower" in name}
    assert names == {"0.conv.weight", "0.conv.bias", "1.conv.weight", "1.conv.bias"}
    assert not model.head.cls_tower[0].conv.bias.any()
    layer, feature = model.head.cls_tower[0], torch.randn(1, 32, 4, 4)
    assert torch.equal(layer(feature), layer.conv(feature).relu())
    assert torch.equal(layer.before_activation(feature), layer.conv(feature))


# --- what is compared -----------------------------------------------------------------------------------------------


def test_cwd_sees_a_map_for_each_class_of_each_prior_box() -> None:
    locations = grid(32, 64)
    dense = random_dense(locations, 2, CLASSES, 0)
    first, *_ = level_maps(dense, "cls")
    assert first.shape == (2, 9 * CLASSES, 4 * 8)
    for image, prior, number, cell in [(0, 0, 0, 0), (1, 8, 4, 31), (0, 3, 2, 17)]:
        assert first[image, CLASSES * prior + number, cell] == dense.cls[image, 9 * cell + prior, number]


def picked(mask: Tensor, locations: Locations) -> Where:
    return pick_rows({"x": mask.float()}, locations)["x"]


def test_imitation_looks_at_each_cell_once() -> None:
    """A cell is in a region if one of its locations is; nothing is weighed by how many are."""
    locations = grid(32, 64)
    targets = random_targets(2, 32, CLASSES, 0)
    assigned = assign_max_iou(locations, targets, torch.tensor([[32, 64], [32, 32]]), CLASSES)
    mask = torch.rand(assigned.is_valid.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    where = of_cells(picked(mask & assigned.is_valid, locations), 9)
    in_region = (mask & assigned.is_valid).unflatten(1, (-1, 9)).any(dim=-1).flatten()
    assert where.row.tolist() == in_region.nonzero().squeeze(1).tolist()
    assert len(where.row) > 10
    num_cells = len(locations.level) // 9
    assert where.image.tolist() == [row // num_cells for row in where.row.tolist()]
    assert where.level.tolist() == [locations.level[9 * (row % num_cells)].item() for row in where.row.tolist()]
    whole = of_cells(all_region(assigned, locations), 9)
    assert whole.row == slice(None)
    assert torch.equal(whole.weight, assigned.is_valid[:, ::9].flatten().float())
    assert len(whole.level) == len(whole.image) == 2 * num_cells
    nothing = of_cells(picked(torch.zeros_like(mask), locations), 9)
    assert len(nothing.row) == len(nothing.weight) == 0
    assert of_cells(where, 1) is where


@pytest.mark.parametrize("kind", ["diou", "reference"])
def test_regions_are_drawn_by_the_prior_box_of_each_location(kind: str) -> None:
    """Every prior box against every object."""
    locations, sizes = grid(160, 192), torch.tensor([[160, 192], [96, 160], [160, 160]])
    targets = random_targets(3, 160, CLASSES, 3)
    assigned = assign_max_iou(locations, targets, sizes, CLASSES)
    pair = Pair(random_dense(locations, 3, CLASSES, 0), random_dense(locations, 3, CLASSES, 1))
    iou, overlap = vlr_overlap(prior_boxes(locations)[None, :, None], targets.gt_xyxy[:, None], kind)
    threshold = assigned.threshold[:, None].expand_as(overlap)
    weight = iou.where((0.25 * threshold <= overlap) & (overlap < threshold), 0.0).amax(dim=-1) * assigned.is_valid
    found = region("vlr", RegionSpec(vlr=kind), pair, assigned, targets)
    assert torch.equal(found.row, weight.flatten().nonzero().squeeze(1))
    assert torch.equal(found.weight, weight.flatten()[found.row])
    assert len(found.row) > 500
    assert assigned.is_ignored.flatten()[found.row].any()
    own = iou * assigned.is_valid[..., None]
    is_fine = (own > 0.5 * own.amax(dim=1, keepdim=True)).any(dim=-1)
    assert torch.equal(
        region("finegrained", RegionSpec(), pair, assigned, targets).row, is_fine.flatten().nonzero()[:, 0]
    )
    xy, gt = locations.xy[None, :, None], targets.gt_xyxy[:, None]
    is_inside = ((xy > gt[..., :2]) & (xy < gt[..., 2:])).all(dim=-1).any(dim=-1) & assigned.is_valid
    assert torch.equal(
        region("inside_gt", RegionSpec(), pair, assigned, targets).row, is_inside.flatten().nonzero()[:, 0]
    )


def test_levels_of_a_teacher_at_another_scale() -> None:
    """Whichever of the two has nine prior boxes; either keeps its own."""
    one = location_grid(((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)), STRIDES, torch.device("cpu"))
    for student, teacher in ((grid(64, 64), grid(128, 128)), (one, grid(128, 128))):
        pair = share_levels(Pair(random_dense(student, 1, CLASSES, 0), random_dense(teacher, 1, CLASSES, 1)), 1)
        for dense, own in ((pair.student, student), (pair.teacher, teacher)):
            found = dense.locations
            assert found.prior_wh == own.prior_wh
            assert found.level_hw == ((8, 8), (4, 4), (2, 2), (1, 1))
            assert dense.cls.shape[1] == len(found.xy) == len(found.stride) == sum(found.level_sizes)
            per_cell = found.xy[:: found.num_priors]
            assert torch.equal(per_cell, student.xy[:: student.num_priors][: len(per_cell)])


# --- across kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [("gfl", "retina"), ("retina", "fcos")])
def test_the_teachers_head_is_asked_at_the_teachers_own_locations(student: str, teacher: str) -> None:
    """Valid are those in the image's own padding, nine or one for each of the student's cells."""
    model = detector(student).train()
    terms = (CrossKDClass(), CrossKDBox())
    teaching = Teaching(detector(teacher, 1).eval().requires_grad_(False), DistillationSpec(terms=terms, cut=1), "0")
    size_hw = torch.tensor([[64, 64], [64, 32]])
    images = model.normalize(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), size_hw)
    pair = compare(teaching, images, Learner(model, teaching)(images))
    own = pair.student.locations
    corner = own.xy - own.offset * own.stride[:, None]
    valid = (corner[None] < size_hw.flip(1)[:, None]).all(dim=-1)
    zeros = torch.zeros_like(valid)
    assigned = Assigned(zeros.long(), torch.zeros(2, len(own.xy), 4), zeros, valid, zeros, torch.zeros(2, 0))
    where, norm = all_region(assigned, own), normalizer("synced", assigned, main_region(pair.student, assigned))
    assert pair.crossed
    seen = pair.teacher.locations
    is_in = (seen.xy - seen.offset * seen.stride[:, None] < size_hw.flip(1)[:, None]).all(dim=-1)
    assert is_in.sum() * own.num_priors == valid.sum() * seen.num_priors
    s, t = pair.crossed.cls[is_in].double().sigmoid(), pair.teacher.cls[is_in].double().sigmoid()
    focal = ((t - s).abs() * -(t * s.log() + (1 - t) * (1 - s).log())).sum()
    assert terms[0](pair, where, norm).item() == pytest.approx(focal.item() / norm.num_positive.item(), rel=1e-4)
    q, p = (dense.edge[is_in].double().softmax(dim=-1) for dense in (pair.crossed, pair.teacher))
    score = pair.teacher.best_score[is_in].double()
    divergence = (p * (p / q).log()).sum(dim=(-1, -2)) / 4
    expected = 4 * (divergence * score).sum() / score.sum()
    assert terms[1](pair, where, norm).item() == pytest.approx(expected.item(), rel=1e-4)


def fault(teacher: str, student: str, *terms: Term, assistant: str | None = None) -> str:
    """Return what a spec says of its heads; nothing where they fit."""
    models = {
        kind: ModelSpec(head=HeadSpec.model_validate({"kind": kind})) for kind in {teacher, student, assistant} - {None}
    }
    between = {"assistant": AssistantSpec(model=models[assistant])} if assistant else {}
    try:
        spec = DistillSpec(
            teacher=TaughtSpec(path="x"), student=models[student], distill=DistillationSpec(terms=terms), **between
        )
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return spec.fault_of_heads(models[teacher]) or ""


def test_terms_that_need_as_many_locations_are_refused_with_the_nearest_that_do_not() -> None:
    for kind in ("gfl", "gflv2", "atss", "fcos"):
        for teacher, student in (("retina", kind), (kind, "retina")):
            assert fault(teacher, student, LD(), LD(region="vlr"), BinaryKD(), PKD()) == (
                f'the teacher has a head "{teacher}", the student "{student}", and "retina" tells nine boxes where the '
                'others tell one, so that "ld", "binary_kd" cannot pair them: '
                f"pass --set student.head.kind={teacher}, or the nearest terms that work: "
                """--set 'distill.terms=[{kind = "crosskd_box"}, {kind = "crosskd_cls"}, {kind = "pkd"}]'"""
            )
    message = fault("gfl", "gfl", Imitation(), CWD(on="cls"), CWD(), assistant="retina")
    assert message == (
        'the assistant has a head "retina", the student "gfl", and "retina" tells nine boxes where the others tell '
        'one, so that "imitation", "cwd" cannot pair them: pass --set student.head.kind=retina, or the nearest terms '
        'that work: --set \'distill.terms=[{kind = "imitation", region = "finegrained"}, {kind = "crosskd_cls"}, '
        '{kind = "cwd"}]\''
    )


def test_without_annotations_it_has_no_quality_to_learn() -> None:
    values = ["data.unlabelled=more", "data.unlabelled_only=true", 'distill.terms=[{kind="ld"}]']
    assert load(DistillSpec, None, {"teacher.path": "x"}, [*values, "student.head.kind=retina"]).data.unlabelled_only
    with pytest.raises(SpecError, match='the quality of a "atss" head learns from "binary_kd" alone'):
        load(DistillSpec, None, {"teacher.path": "x"}, [*values, "student.head.kind=atss"])


def test_what_goes_between_kinds() -> None:
    works = (CrossKDBox(), CrossKDClass(), PKD(), CWD(), Imitation(region="finegrained"), Imitation(region="main"))
    every = (LD(), KD(), BinaryKD(), BCKDBox(), CWD(on="cls"), Imitation(region="gi"))
    assert fault("retina", "gfl", *works) == fault("fcos", "retina", *works) == ""
    assert fault("retina", "retina", *works, *every) == ""
    for term in every:
        assert "cannot pair" in fault("retina", "gfl", term)
