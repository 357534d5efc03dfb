"""Resizing, flipping and the boxes that go with them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Deviations
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ldctl.data import DataSpec
from ldctl.data.augment import View, eval_view, place, resize_size, show, train_view
from ldctl.samples import Sample


def sample_of(xyxy: list[list[float]], height: int, width: int, is_crowd: list[bool] | None = None) -> Sample:
    boxes = np.array(xyxy, dtype=np.float32).reshape(-1, 4)
    crowd = np.array(is_crowd or [False] * len(boxes), dtype=np.bool_)
    return Sample(1, "x", height, width, boxes, np.arange(len(boxes)), np.ones(len(boxes), np.float32), crowd)


def test_sizes_are_the_references(shared: Path) -> None:
    rows = json.loads((shared / "oracle" / "preproc_resize_sizes.json").read_text())["rows"]
    assert len(rows) == 300
    for width, height, new_width, new_height in rows:
        assert resize_size(height, width, 800, 1333) == (new_height, new_width)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(32, 1000), st.integers(0, 700))
def test_sizes_keep_to_both_limits(height: int, width: int, short_side: int, more: int) -> None:
    long_side = short_side + more
    new = resize_size(height, width, short_side, long_side)
    assert 1 <= min(new) <= short_side
    assert max(new) <= long_side
    assert min(new) == short_side or max(new) == long_side
    assert resize_size(width, height, short_side, long_side) == new[::-1]


def test_pixels_and_boxes_are_the_references(shared: Path, deviations: Deviations) -> None:
    files = sorted((shared / "oracle").glob("preproc_cases_*.safetensors"))
    assert files
    for file in files:
        case = load_file(file)
        for index in range(case["batch"].shape[0]):
            image = case[f"in/image_bgr.{index}"].permute(2, 0, 1)
            long_side, short_side = case[f"in/scale_wh.{index}"].tolist()
            height, width = resize_size(*image.shape[1:], short_side, long_side)
            assert [height, width] == case[f"img_shape.{index}"].tolist()
            view = View(height, width, bool(case[f"in/flip.{index}"]))
            expected = case[f"resized_bgr.{index}"].permute(2, 0, 1).int()
            difference = (show(image, view).int() - expected).abs()
            deviations.record("resize: pixels, grey levels", file.name, difference.max().item())
            deviations.record("resize: pixels, mean, grey levels", file.name, difference.float().mean().item())
            assert difference.max() <= 1
            assert difference.float().mean() < 0.3
            sample = sample_of(case[f"in/boxes.{index}"].tolist(), *image.shape[1:])
            error = np.abs(place(sample, view).xyxy - case[f"boxes.{index}"].numpy()).max()
            deviations.record("resize: boxes, px", file.name, float(error))
            assert error < 1e-4


def test_resizing_does_not_filter() -> None:
    # a quarter of the size: each output lies between two neighbours, and one of them is painted
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 1::4] = 200
    small = show(stripes, View(16, 16, is_flipped=False))
    assert set(small.unique().tolist()) == {100}  # a filter as wide as the step would give 50


def test_the_same_size_is_the_same_image() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(show(image, View(20, 30, is_flipped=False)), image)
    assert torch.equal(show(image, View(20, 30, is_flipped=True)), image.flip(-1))


def test_boxes_follow_each_axis_and_are_clipped() -> None:
    sample = sample_of([[10, 10, 20, 20], [-5, -5, 10, 10], [90, 40, 130, 60]], 50, 100)
    found = place(sample, View(100, 50, is_flipped=False))
    assert found.xyxy.tolist() == [[5, 20, 10, 40], [0, 0, 5, 20], [45, 80, 50, 100]]
    flipped = place(sample, View(100, 50, is_flipped=True))
    assert flipped.xyxy.tolist() == [[40, 20, 45, 40], [45, 0, 50, 20], [0, 80, 5, 100]]
    assert flipped.label.tolist() == [0, 1, 2]


def test_crowds_and_what_clipping_empties_are_no_targets() -> None:
    sample = sample_of([[10, 10, 20, 20], [-9, 5, 0, 9], [100, 5, 120, 9], [1, 1, 2, 2]], 50, 100, [0, 0, 0, 1])
    for is_flipped in (False, True):
        found = place(sample, View(50, 100, is_flipped))
        assert found.label.tolist() == [0]
    empty = place(sample_of([], 50, 100), View(50, 100, is_flipped=True))
    assert empty.xyxy.shape == (0, 4)


def test_a_box_stays_on_its_pixels() -> None:
    # paint the box, transform both, and look where the paint is
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 12:36, 15:60] = 255
    sample = sample_of([[15, 12, 60, 36]], 60, 90)
    for view in (View(60, 90, True), View(120, 180, False), View(120, 180, True), View(30, 45, True)):
        pixels = show(image, view)[0] > 127
        rows, columns = torch.nonzero(pixels.any(1)), torch.nonzero(pixels.any(0))
        painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(place(sample, view).xyxy[0], np.array(painted, dtype=np.float32), atol=0.51)


SPEC = DataSpec(short_side=(48, 96), long_side=200)


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    sample = sample_of([], 100, 100)
    views = {key: train_view(sample, SPEC, *key) for key in np.ndindex(4, 4, 40)}
    assert views == {key: train_view(sample, SPEC, *key) for key in reversed(list(views))}
    for step in np.eye(3, dtype=int):
        pairs = [(key, tuple(np.add(key, step).tolist())) for key in views]
        assert sum(views[key] != views[other] for key, other in pairs if other in views) > 300


def test_views_cover_the_range_evenly() -> None:
    sample = sample_of([], 100, 150)
    views = [train_view(sample, SPEC, 0, 0, index) for index in range(4000)]
    sides = np.array([view.height for view in views])
    assert (sides.min(), sides.max()) == (48, 96)  # both ends are drawn
    assert abs(sides.mean() - 72) < 1
    assert 0.45 < np.mean([view.is_flipped for view in views]) < 0.55
    assert all((view.height, view.width) == resize_size(100, 150, view.height, 200) for view in views)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_is_a_probability(flip: float) -> None:
    spec = SPEC.model_copy(update={"flip": flip})
    views = [train_view(sample_of([], 50, 50), spec, 0, 0, index) for index in range(50)]
    assert {view.is_flipped for view in views} == {bool(flip)}


def test_evaluation_takes_the_upper_end() -> None:
    assert eval_view(sample_of([], 100, 150), SPEC) == View(96, 144, is_flipped=False)
    assert eval_view(replace(sample_of([], 100, 150), width=400), SPEC) == View(50, 200, is_flipped=False)
