"""Pseudo objects of a batch are what detection finds image by image."""

from dataclasses import replace

import pytest
import torch
from scenes import grid, random_dense

from ldctl.models.detector import PostprocessSpec, detect
from ldctl.models.pseudo import pseudo_objects
from ldctl.types import Dense

HERE = grid(96, 160)
SIZE = torch.tensor([(96, 160), (80, 160), (96, 130), (60, 70)])
ALL = torch.ones(4, dtype=torch.bool)


def dense_of(seed: int, num_classes: int = 3) -> Dense:
    dense = random_dense(HERE, 4, num_classes, seed)
    return replace(dense, cls=dense.cls.detach(), edge=dense.edge.detach())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "spec",
    [
        PostprocessSpec(score_threshold=0.3),
        PostprocessSpec(score_threshold=0.05, max_detections=7),
        PostprocessSpec(score_threshold=0.05, nms_iou=0.3, candidates_per_level=20),
    ],
)
def test_they_are_the_detections_of_each_image(seed: int, spec: PostprocessSpec) -> None:
    dense = dense_of(seed)
    found = pseudo_objects(dense, SIZE, ALL, spec)
    expected = detect(dense, SIZE, SIZE, (0, 1, 2, 3), spec)
    assert found.gt_label.shape[1] == max(len(one.label) for one in expected) > 3
    for image, one in enumerate(expected):
        count = len(one.label)
        assert found.is_object[image].tolist() == [True] * count + [False] * (found.is_object.shape[1] - count)
        assert torch.equal(found.gt_xyxy[image, :count], one.xyxy)
        assert torch.equal(found.gt_label[image, :count], one.label)
        assert found.gt_xyxy[image, count:].abs().sum() == 0


def test_equal_boxes_of_other_images_and_classes_leave_each_other_alone() -> None:
    dense = dense_of(0, num_classes=2)
    cls, edge = torch.full_like(dense.cls, -9.0), torch.zeros_like(dense.edge)
    row = 23  # of the finest level
    edge[:, row : row + 2, :, 3] = 30.0  # two boxes 6 strides wide, a stride apart: they overlap by 5 / 7
    cls[:, row] = 2.0
    cls[:, row + 1] = 1.0  # suppressed
    found = pseudo_objects(replace(dense, cls=cls, edge=edge), SIZE, ALL, PostprocessSpec(score_threshold=0.5))
    assert found.is_object.tolist() == [[True, True]] * 4
    assert found.gt_label.sort(dim=1).values.tolist() == [[0, 1]] * 4


def test_only_in_images_that_are_asked_for() -> None:
    dense, spec = dense_of(1), PostprocessSpec(score_threshold=0.3)
    whole = pseudo_objects(dense, SIZE, ALL, spec)
    some = pseudo_objects(dense, SIZE, torch.tensor([False, True, False, True]), spec)
    most = some.is_object.shape[1]
    assert not some.is_object[[0, 2]].any()
    assert torch.equal(some.gt_xyxy[[1, 3]], whole.gt_xyxy[[1, 3], :most])
    assert whole.is_object[[1, 3]].sum() == some.is_object.sum() > 0


@pytest.mark.parametrize("is_wanted", [ALL, ~ALL])
def test_nothing_found(is_wanted: torch.Tensor) -> None:
    spec = PostprocessSpec(score_threshold=0.3 if not is_wanted.any() else 0.9999)
    found = pseudo_objects(dense_of(2), SIZE, is_wanted, spec)
    assert found.gt_xyxy.shape == (4, 0, 4)
    assert found.is_object.shape == found.gt_label.shape == (4, 0)
