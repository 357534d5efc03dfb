"""From predictions to final boxes."""

from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from pydantic import ValidationError
from scenes import NO_MAPS, images_of, random_dense
from torch import Tensor

from ldctl.boxes import location_grid
from ldctl.models import PostprocessSpec, detect, final_boxes
from ldctl.types import Dense

STRIDES = (8, 16, 32, 64, 128)
CASES = (
    "s01_noise80", "s02_objs3", "s03_odd_border", "s04_empty", "s05_two_objs80", "s06_zero_size", "s07_cap100",
)  # fmt: skip
REFERENCE = PostprocessSpec()


def dense_of(arrays: dict[str, Tensor]) -> Dense:
    """Lay the reference's maps out as a detector does."""
    cls, edge = oracle.levels(arrays, "in/cls_score"), oracle.levels(arrays, "in/bbox_pred")
    sizes_hw = tuple((level.shape[2], level.shape[3]) for level in cls)
    flat_edge = torch.cat([level.flatten(2).mT for level in edge], dim=1)
    return Dense(
        cls=torch.cat([level.flatten(2).mT for level in cls], dim=1),
        edge=flat_edge.unflatten(-1, (4, -1)),
        features=(),
        towers=NO_MAPS,
        locations=location_grid(sizes_hw, STRIDES, torch.device("cpu")),
    )


@pytest.mark.parametrize("case", CASES)
def test_detections_are_the_references(shared: Path, case: str) -> None:
    arrays, _ = oracle.read(shared / f"oracle/decode_cases_{case}.safetensors")
    dense = dense_of(arrays)
    found = final_boxes(dense, arrays["in/img_shapes"], arrays["in/scale_factors"].flip(-1).float(), REFERENCE)
    for image in range(len(arrays["in/img_shapes"])):
        rows = found.image == image
        expected = {key: arrays[f"mmdet3/{key}.{image}"] for key in ("boxes", "scores", "labels")}
        assert torch.allclose(found.score[rows], expected["scores"], rtol=0, atol=1e-5)
        assert torch.equal(found.label[rows], expected["labels"])
        assert torch.allclose(found.xyxy[rows], expected["boxes"], rtol=0, atol=1e-3)


def grid(sizes_hw: tuple[tuple[int, int], ...], num_classes: int, *, num_images: int = 1) -> Dense:
    """Return predictions of nothing: no score, edges at distance 1 stride."""
    locations = location_grid(sizes_hw, STRIDES[: len(sizes_hw)], torch.device("cpu"))
    num = sum(locations.level_sizes)
    edge = torch.full((num_images, num, 4, 5), -40.0)
    edge[..., 1] = 40.0
    return Dense(torch.full((num_images, num, num_classes), -20.0), edge, (), NO_MAPS, locations)


def boxes(dense: Dense, spec: PostprocessSpec = REFERENCE, size: int = 64, original: int = 64) -> list[list[float]]:
    """Return the boxes of the first image."""
    size_hw = torch.full((dense.cls.shape[0], 2), size)
    found = detect(dense, size_hw, torch.full_like(size_hw, original), tuple(range(len(size_hw))), spec)[0]
    return found.xyxy.tolist()


def test_a_box_by_hand() -> None:
    dense = grid(((8, 8), (4, 4)), 2, num_images=2)
    dense.cls[1, 8 * 3 + 2, 1] = 0.0  # column 2, row 3 of stride 8
    size_hw, original_hw = torch.tensor([[64, 64], [28, 20]]), torch.tensor([[64, 64], [56, 10]])
    empty, found = detect(dense, size_hw, original_hw, (7, 9), REFERENCE)
    assert (empty.image_id, empty.xyxy.shape, empty.score.shape, empty.label.shape) == (7, (0, 4), (0,), (0,))
    assert found.image_id == 9
    assert found.xyxy.tolist() == [[4.0, 32.0, 10.0, 56.0]]  # 8, 16, 24, 32 clipped to 20 by 28, then scaled
    assert found.score.tolist() == [0.5]
    assert found.label.tolist() == [1]


def test_the_threshold_is_exclusive() -> None:
    dense = grid(((8, 8),), 1)
    dense.cls[0, 9, 0] = 0.0
    assert len(boxes(dense, PostprocessSpec(score_threshold=0.5))) == 0
    assert len(boxes(dense, PostprocessSpec(score_threshold=0.49))) == 1


def test_boxes_outside_the_image_have_no_extent() -> None:
    dense = grid(((8, 8),), 1)
    dense.cls[0, 7, 0] = 0.0  # column 7: from 48 to 64, beyond the 40 pixels of the image
    assert boxes(dense, size=40) == []


def test_suppression_is_per_class() -> None:
    dense = grid(((8, 8),), 2)
    dense.edge[0, 10, :, 1:] = torch.tensor([-40.0, -40.0, -40.0, 40.0])  # 4 strides each way: holds its neighbour's
    dense.edge[0, 11] = dense.edge[0, 10]
    dense.cls[0, 10, 0], dense.cls[0, 11, 0] = 2.0, 1.0
    assert len(boxes(dense)) == 1
    assert len(boxes(dense, PostprocessSpec(nms_iou=0.9))) == 2
    dense.cls[0, 11, 1] = 1.0
    assert len(boxes(dense)) == 2


def test_candidates_are_counted_per_level_and_detections_in_all() -> None:
    dense = grid(((8, 8), (4, 4)), 1)
    dense.cls[0, [0, 16, 32, 64, 66], 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert len(boxes(dense)) == 5
    assert len(boxes(dense, PostprocessSpec(candidates_per_level=2))) == 4
    assert len(boxes(dense, PostprocessSpec(max_detections=3))) == 3
    assert boxes(dense, PostprocessSpec(candidates_per_level=1, max_detections=1))[0] == [16.0, 0.0, 48.0, 16.0]


def test_a_quality_ranks_and_counts_against_the_threshold() -> None:
    dense = grid(((8, 8),), 1)
    dense.cls[0, [9, 27, 45], 0] = torch.tensor([3.0, 2.0, 1.0])
    quality = torch.zeros(1, 64)
    quality[0, [9, 27, 45]] = torch.tensor([-1.0, 4.0, -4.0])
    size_hw = torch.tensor([[64, 64]])
    found = detect(replace(dense, quality=quality), size_hw, size_hw, (0,), REFERENCE)[0]
    assert found.xyxy[:, :2].tolist() == [[16.0, 16.0], [0.0, 0.0]]
    expected = [torch.sigmoid(torch.tensor(pair)).prod().item() for pair in ((2.0, 4.0), (3.0, -1.0))]
    assert found.score.tolist() == pytest.approx(expected)
    assert len(boxes(dense)) == 3  # the third's class score is high, but not its product: 0.73 * 0.018


def test_half_precision_scores_are_ranked_in_float32() -> None:
    dense = grid(((8, 8),), 1)
    dense.cls[0, 9, 0] = 1.0
    half = Dense(dense.cls.bfloat16(), dense.edge, (), dense.towers, dense.locations)
    size_hw = torch.tensor([[64, 64]])
    assert detect(half, size_hw, size_hw, (0,), REFERENCE)[0].score.dtype == torch.float32


def test_no_gradient_is_kept() -> None:
    dense = grid(((8, 8),), 1)
    dense.cls[0, 9, 0] = 1.0
    dense.cls.requires_grad_()
    size_hw = torch.tensor([[64, 64]])
    assert not detect(dense, size_hw, size_hw, (0,), REFERENCE)[0].score.requires_grad


@pytest.mark.parametrize(
    "fields", [{"score_threshold": 1.0}, {"nms_iou": 0.0}, {"candidates_per_level": 0}, {"max_detections": 0}]
)
def test_refused_thresholds(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PostprocessSpec.model_validate(fields)


def brute_force(
    dense: Dense, image: int, size_hw: tuple[int, int], original_hw: tuple[int, int], spec: PostprocessSpec
) -> tuple[list[tuple[float, int]], Tensor]:
    """Return score and label of the final boxes of an image, and the boxes, by plain loops in double precision."""
    bins = torch.arange(dense.edge.shape[-1], dtype=torch.float64)
    scores, start, pairs = dense.score[image].tolist(), 0, []
    for size in dense.locations.level_sizes:
        of_level = [
            (scores[row][label], row, label)
            for row in range(start, start + size)
            for label in range(len(scores[row]))
            if scores[row][label] > spec.score_threshold
        ]
        pairs += sorted(of_level, key=lambda pair: -pair[0])[: spec.candidates_per_level]  # ties in order of place
        start += size
    kept: list[tuple[float, int, list[float]]] = []
    for score, row, label in sorted(pairs, key=lambda pair: -pair[0]):
        left, top, right, bottom = (
            dense.edge[image, row].double().softmax(-1) @ bins * dense.locations.stride[row]
        ).tolist()
        (x, y), (height, width) = dense.locations.xy[row].tolist(), size_hw
        box = [max(x - left, 0), max(y - top, 0), min(x + right, width), min(y + bottom, height)]
        box = [value * (original_hw[1] / width, original_hw[0] / height)[side % 2] for side, value in enumerate(box)]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if all(label != other or iou(box, other_box) <= spec.nms_iou for _, other, other_box in kept):
            kept.append((score, label, box))
    kept = kept[: spec.max_detections]
    return [(score, label) for score, label, _ in kept], torch.tensor([box for _, _, box in kept]).reshape(-1, 4)


def iou(a: list[float], b: list[float]) -> float:
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def noise(num_images: int, num_classes: int, seed: int, *, has_ties: bool = False) -> Dense:
    dense = random_dense(
        location_grid(((12, 16), (6, 8), (3, 4)), STRIDES[:3], torch.device("cpu")), num_images, num_classes, seed
    )
    cls = dense.cls.detach()
    return replace(dense, cls=cls.round() if has_ties else cls, edge=dense.edge.detach())


SIZES = torch.tensor([(96, 128), (80, 128), (96, 101), (60, 70)])
ORIGINALS = torch.tensor([(480, 640), (800, 1280), (77, 81), (60, 70)])


@pytest.mark.parametrize("num_classes", [1, 20])
@pytest.mark.parametrize(
    ("spec", "has_ties"),
    [
        (REFERENCE, False),
        (REFERENCE, True),
        (PostprocessSpec(score_threshold=0.3, max_detections=9), True),
        (PostprocessSpec(score_threshold=0, nms_iou=0.3), True),
        (PostprocessSpec(candidates_per_level=25), False),
    ],
)
def test_detections_are_those_of_plain_loops(spec: PostprocessSpec, has_ties: bool, num_classes: int) -> None:
    dense = noise(4, num_classes, seed=num_classes, has_ties=has_ties)
    found = detect(dense, SIZES, ORIGINALS, (5, 6, 7, 8), spec)
    for image, one in enumerate(found):
        pairs, xyxy = brute_force(dense, image, tuple(SIZES[image].tolist()), tuple(ORIGINALS[image].tolist()), spec)
        assert list(zip(one.score.tolist(), one.label.tolist(), strict=True)) == pairs
        torch.testing.assert_close(one.xyxy, xyxy, rtol=1e-5, atol=1e-3)
        assert len(pairs) > 8


@pytest.mark.parametrize(
    ("num_classes", "nms"), [(1, "class"), (3, "class"), (20, "class"), (3, "voting_cluster_diou")]
)  # a hundred candidates of an image, and thousands
def test_images_of_a_batch_do_not_see_each_other(num_classes: int, nms: str) -> None:
    dense = noise(4, num_classes, seed=0, has_ties=True)
    spec = PostprocessSpec(nms=nms, score_threshold=0.02)
    together = detect(dense, SIZES, ORIGINALS, (5, 6, 7, 8), spec)
    for image in range(4):
        part = slice(image, image + 1)
        single = images_of(dense, part)
        (alone,) = detect(single, SIZES[part], ORIGINALS[part], (5 + image,), spec)
        one = together[image]
        assert one.image_id == alone.image_id
        assert torch.equal(one.xyxy, alone.xyxy)
        assert torch.equal(one.score, alone.score)
        assert torch.equal(one.label, alone.label)
        assert len(alone.label) > 20
        assert one.xyxy.untyped_storage().nbytes() == one.xyxy.nbytes  # carries no other image along


def test_only_wanted_images_are_looked_at() -> None:
    dense, scale = noise(4, 3, seed=1), torch.ones(4, 2)
    everything = final_boxes(dense, SIZES, scale, REFERENCE)
    some = final_boxes(dense, SIZES, scale, REFERENCE, is_wanted=torch.tensor([False, True, False, True]))
    rows = everything.image % 2 == 1
    assert 0 < len(some.image) < len(everything.image)
    assert torch.equal(some.xyxy, everything.xyxy[rows])
    assert torch.equal(some.score, everything.score[rows])


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_does() -> None:
    dense = noise(4, 20, seed=0)
    order = torch.randperm(dense.cls.numel(), generator=torch.Generator().manual_seed(0))
    cls = torch.linspace(-4, 2, dense.cls.numel())[order].reshape(
        dense.cls.shape
    )  # no two so close that rounding tells
    dense = replace(dense, cls=cls)
    there = replace(
        dense,
        cls=cls.cuda(),
        edge=dense.edge.cuda(),
        locations=location_grid(dense.locations.level_hw, STRIDES[:3], torch.device("cuda")),
    )
    expected = detect(dense, SIZES, ORIGINALS, (5, 6, 7, 8), REFERENCE)
    found = detect(there, SIZES.cuda(), ORIGINALS.cuda(), (5, 6, 7, 8), REFERENCE)
    for one, other in zip(found, expected, strict=True):
        assert one.xyxy.device.type == "cpu"
        assert torch.equal(one.label, other.label)
        torch.testing.assert_close(one.xyxy, other.xyxy, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one.score, other.score)
