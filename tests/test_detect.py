"""From predictions to final boxes."""

from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from pydantic import ValidationError
from scenes import NO_MAPS
from torch import Tensor

from ldctl.boxes import location_grid
from ldctl.models import PostprocessSpec, detect, detect_image
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
    for image, (height, width) in enumerate(arrays["in/img_shapes"].tolist()):
        scale_w, scale_h = arrays["in/scale_factors"][image].tolist()
        score, edge = dense.score[image], dense.edge[image]
        xyxy, score, label = detect_image(score, edge, dense.locations, (height, width), (scale_h, scale_w), REFERENCE)
        expected = {key: arrays[f"mmdet3/{key}.{image}"] for key in ("boxes", "scores", "labels")}
        assert torch.allclose(score, expected["scores"], rtol=0, atol=1e-5)
        assert torch.equal(label, expected["labels"])
        assert torch.allclose(xyxy, expected["boxes"], rtol=0, atol=1e-3)


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
