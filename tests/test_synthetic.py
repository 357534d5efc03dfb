"""The generated data set: the same everywhere, exact boxes, edges that really are soft."""

import hashlib
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ldctl.data import synthetic
from ldctl.data.synthetic import CLASSES, Shape, SyntheticSpec, bounds, coverage, distance, synthetic_dataset

SPEC = SyntheticSpec(train=40, val=20, size=96, seed=3)
SHAPES = st.builds(
    Shape,
    label=st.integers(0, len(CLASSES) - 1),
    x=st.floats(60, 100),
    y=st.floats(60, 100),
    half=st.tuples(st.floats(10, 35), st.floats(10, 35)),
    angle=st.floats(0, 2 * math.pi),
)


def grid(size: int, per_px: int = 1) -> tuple[np.ndarray, np.ndarray]:
    at = ((np.arange(size * per_px) + 0.5) / per_px).astype(np.float32)
    return at[None, :], at[:, None]


@settings(max_examples=80, deadline=None)
@given(SHAPES)
def test_box_is_tight_around_the_sharp_shape(shape: Shape) -> None:
    per_px = 4
    shown = coverage(shape, *grid(160, per_px), np.full(4, 1e-3)) > 0.5
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / per_px
    outside = np.array(bounds(shape)) - found
    outside[2:] *= -1
    # Never past the box by more than the sampling; short of it only where a pointed corner is thinner than a sample.
    assert outside.max() <= 1 / per_px
    assert outside.min() >= -1.5


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.lists(st.floats(0.5, 8), min_size=4, max_size=4))
def test_penumbra_is_half_way_on_the_outline(shape: Shape, soft: list[float]) -> None:
    x, y = grid(160)
    sharp, blurred = distance(shape, x, y), coverage(shape, x, y, np.array(soft))
    assert (blurred[sharp < -0.01] >= 0.5).all()
    assert (blurred[sharp > 0.01] <= 0.5).all()
    assert (blurred[sharp < -2 * max(soft) - 0.01] == 1).all()
    assert (blurred[sharp > 2 * max(soft) + 0.01] == 0).all()


def test_sides_are_soft_by_their_own_amount() -> None:
    shape = Shape(CLASSES.index("box"), 50.0, 50.0, (30.0, 30.0), 0.0)
    row = coverage(shape, *grid(100), np.array([8.0, 1.0, 1.0, 1.0]))[50]
    partly = (row > 0.01) & (row < 0.99)
    left, right = partly[:50].sum(), partly[50:].sum()
    assert left >= 12
    assert right <= 3


def test_same_spec_gives_the_same_pixels_in_any_order_and_process() -> None:
    dataset = synthetic_dataset(SPEC, "train")
    first = [dataset.read(sample) for sample in dataset.samples[:6]]
    synthetic._image.cache_clear()
    again = [synthetic_dataset(SPEC, "train").read(sample) for sample in reversed(dataset.samples[:6])]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    code = (
        "import hashlib; from ldctl.data.synthetic import *\n"
        f"d = synthetic_dataset(SyntheticSpec.model_validate_json({SPEC.model_dump_json()!r}), 'train')\n"
        "print(hashlib.sha256(d.read(d.samples[5]).numpy().tobytes()).hexdigest(), d.fingerprint)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [hashlib.sha256(first[5].numpy().tobytes()).hexdigest(), dataset.fingerprint]


def test_number_of_images_does_not_change_them() -> None:
    few, many = (synthetic_dataset(SPEC.model_copy(update={"train": count}), "train") for count in (3, 9))
    for a, b in zip(few.samples, many.samples[:3], strict=True):
        assert np.array_equal(a.xyxy, b.xyxy)
        assert torch.equal(few.read(a), many.read(b))


def test_splits_and_seeds_share_no_image() -> None:
    sets = [synthetic_dataset(SPEC, "train"), synthetic_dataset(SPEC, "val")]
    sets += [synthetic_dataset(SPEC.model_copy(update={"seed": 4}), split) for split in ("train", "val")]
    pixels = [dataset.read(sample).numpy().tobytes() for dataset in sets for sample in dataset.samples]
    assert len(set(pixels)) == len(pixels) == 120
    boxes = [sample.xyxy.tobytes() for dataset in sets for sample in dataset.samples if len(sample.label)]
    assert len(set(boxes)) == len(boxes)
    assert len({dataset.fingerprint for dataset in sets}) == 4


def test_samples_keep_their_promises() -> None:
    spec = SyntheticSpec(train=300)
    dataset = synthetic_dataset(spec, "train")
    assert len(dataset.samples) == 300
    assert dataset.category_id == (1, 2, 3, 4)
    counts = np.array([len(sample.label) for sample in dataset.samples])
    assert set(range(1, 7)) <= set(counts.tolist()) <= set(range(7))
    assert (counts == 0).mean() < 0.02
    labels = np.bincount(np.concatenate([sample.label for sample in dataset.samples]), minlength=4)
    assert labels.min() > 0.2 * labels.sum()
    for index, sample in enumerate(dataset.samples):
        assert sample.image_id == index
        assert (sample.height, sample.width) == (160, 160)
        assert (sample.xyxy >= 0).all()
        assert (sample.xyxy <= 160).all()
        sides = sample.xyxy[:, 2:] - sample.xyxy[:, :2]
        assert (sides.max(1, initial=0) <= 100.01).all()
        assert (sides > 3).all()
        np.testing.assert_allclose(sample.area, sides.prod(1))
        assert not sample.is_crowd.any()


def test_hidden_shapes_are_left_out() -> None:
    below = Shape(CLASSES.index("box"), 50.0, 50.0, (10.0, 10.0), 0.0)
    cover = Shape(CLASSES.index("box"), 50.0 + 5, 50.0, (10.0, 20.0), 0.0)
    assert synthetic._visible(below, [], 100) == 1
    assert synthetic._visible(below, [cover], 100) == pytest.approx(0.25)
    assert synthetic._visible(below, [Shape(cover.label, 50.0, 50.0, (10.5, 10.5), 0.0)], 100) == 0
    assert synthetic._visible(Shape(below.label, 0.0, 50.0, (10.0, 10.0), 0.0), [], 100) == pytest.approx(0.5)


def test_objects_stand_out_from_the_background() -> None:
    """Inside a box the pixels differ from the ring around it: a detector has something to find."""
    dataset = synthetic_dataset(SyntheticSpec(train=150), "train")
    contrast = []
    for sample in dataset.samples:
        image = dataset.read(sample).float()
        for left, top, right, bottom in sample.xyxy.astype(int):
            inside = image[:, top : bottom + 1, left : right + 1].mean((1, 2))
            around = image[:, max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8].mean((1, 2))
            contrast.append(float((inside - around).norm()))
    assert np.median(contrast) > 8


def test_reader_pickles_and_hands_out_copies() -> None:
    dataset = synthetic_dataset(SPEC, "val")
    sample = dataset.samples[2]
    image = dataset.read(sample)
    assert image.shape == (3, 96, 96)
    assert image.dtype == torch.uint8
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).read(sample), image)
    image.zero_()
    assert dataset.read(sample).any()


@pytest.mark.parametrize("wrong", [{"size": 32}, {"size": 1000}, {"train": 0}, {"seed": -1}, {"val": 2.5}])
def test_impossible_specs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SyntheticSpec(**wrong)
