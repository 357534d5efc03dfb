"""hotcoco against pycocotools, bit by bit: whole precision and recall arrays, and what becomes of them."""

import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldctl import curves, metrics
from ldctl.curves import Boxes, Task, by_hotcoco, by_pycocotools
from ldctl.data.table import pack
from ldctl.samples import Dataset, Sample
from ldctl.types import Detections

needs_hotcoco = pytest.mark.skipif(not curves.has_hotcoco(), reason="hotcoco is not installed: see the extra fast-eval")
Draw = Callable[[st.SearchStrategy], object]


def task(
    sizes: tuple[int, int],
    objects: list[tuple[int, int, tuple[float, ...]]],
    found: list[tuple[int, int, tuple[float, ...]]],
    *,
    score: np.ndarray,
    area: np.ndarray | None = None,
    is_crowd: np.ndarray | None = None,
) -> Task:
    """Rows of image, category, and left, top, width, height; areas are those of the boxes unless given."""

    def boxes(rows: list[tuple[int, int, tuple[float, ...]]]) -> Boxes:
        return Boxes(
            image=np.array([row[0] for row in rows], dtype=np.int64),
            category=np.array([row[1] for row in rows], dtype=np.int64),
            xywh=np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
        )

    truth = boxes(objects)
    return Task(
        num_images=sizes[0],
        num_categories=sizes[1],
        objects=truth,
        area=truth.xywh[:, 2:].prod(axis=1) if area is None else area,
        is_crowd=np.zeros(len(objects), dtype=np.bool_) if is_crowd is None else is_crowd,
        found=boxes(found),
        score=score,
    )


def same(one: Task) -> None:
    fast, reference = by_hotcoco(one), by_pycocotools(one)
    assert np.array_equal(fast.precision, reference.precision)
    assert np.array_equal(fast.recall, reference.recall)
    assert repr(metrics.figures(fast)) == repr(metrics.figures(reference))  # to the last digit, NaN for NaN
    for category in range(one.num_categories):
        pair = [metrics.mean_of_defined(each.precision[:, :, category, 0, -1]) for each in (fast, reference)]
        assert repr(pair[0]) == repr(pair[1])


# Corners on a lattice meet IoU thresholds exactly; the borders between small, medium and large are among the sides.
LATTICE = st.sampled_from([0.0, 8.0, 10.0, 16.0, 20.0, 32.0, 48.0, 96.0])
ANYWHERE = st.floats(-50, 500).map(lambda value: round(value, 3))
SIDE = st.floats(1e-3, 1e4).map(lambda value: round(value, 3)) | st.sampled_from([0.0, 1e5, 1e5 + 1, -5.0])
BOX = st.tuples(LATTICE, LATTICE, LATTICE, LATTICE) | st.tuples(ANYWHERE, ANYWHERE, SIDE, SIDE)
SCORE = st.sampled_from([0.25, 0.5, 0.75]) | st.floats(0, 1, exclude_min=True)
AREA = st.sampled_from([0.0, 1023.0, 1024.0, 1025.0, 9215.0, 9216.0, 9217.0, 1e10, 1e11]) | st.floats(0, 2e4, width=32)


@st.composite
def tasks(draw: Draw) -> Task:
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    image, category = st.integers(0, sizes[0] - 1), st.integers(0, sizes[1] - 1)
    objects = draw(st.lists(st.tuples(image, category, BOX), max_size=12))
    other = st.tuples(image, category, BOX)
    found = draw(st.lists(st.sampled_from(objects) | other if objects else other, max_size=30))
    count = len(objects)
    return task(
        sizes,
        objects,
        found,
        score=np.array(draw(st.lists(SCORE, min_size=len(found), max_size=len(found))), dtype=np.float64),
        area=np.array(draw(st.lists(AREA, min_size=count, max_size=count)), dtype=np.float64),
        is_crowd=np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_),
    )


@needs_hotcoco
@given(tasks())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_task(one: Task) -> None:
    same(one)


def crowded(
    num_images: int, num_categories: int, num_objects: int, num_found: int, *, seed: int, levels: int = 0
) -> Task:
    """Return noisy copies of objects, and false alarms; scores of a few levels, or all different."""
    rng = np.random.default_rng(seed)
    image, category = rng.integers(0, num_images, num_objects), rng.integers(0, num_categories, num_objects)
    xywh = np.concatenate((rng.uniform(0, 400, (num_objects, 2)), rng.uniform(4, 200, (num_objects, 2))), axis=1)
    of = rng.integers(0, num_objects, num_found)
    is_copy = rng.random(num_found) < 0.6
    noise = rng.normal(0, 6, (num_found, 4)) * rng.choice([0.0, 0.1, 1.0], (num_found, 1))
    return Task(
        num_images=num_images,
        num_categories=num_categories,
        objects=Boxes(image, category, xywh.round(3)),
        area=xywh[:, 2:].prod(axis=1) * rng.uniform(0.3, 1, num_objects),  # masks fill a part of their boxes
        is_crowd=rng.random(num_objects) < 0.15,
        found=Boxes(
            np.where(is_copy, image[of], rng.integers(0, num_images, num_found)),
            np.where(is_copy, category[of], rng.integers(0, num_categories, num_found)),
            (xywh[of] + noise).round(3),
        ),
        score=rng.integers(1, levels, num_found) / levels if levels else rng.random(num_found),
    )


@needs_hotcoco
@pytest.mark.parametrize(
    "one",
    [
        pytest.param(crowded(40, 80, 300, 2000, seed=0), id="many classes"),
        pytest.param(crowded(30, 3, 200, 2000, seed=1, levels=6), id="ties of score"),
        pytest.param(crowded(3, 1, 60, 1500, seed=2), id="hundreds of detections of a class in an image"),
        pytest.param(crowded(3, 2, 60, 1500, seed=3, levels=3), id="hundreds, tied"),
        pytest.param(crowded(500, 2, 20, 60, seed=4), id="images without anything"),
        pytest.param(task((3, 2), [], [(0, 1, (0, 0, 9, 9))], score=np.array([0.5])), id="no object"),
        pytest.param(task((3, 2), [(1, 0, (0, 0, 9, 9))], [], score=np.zeros(0)), id="no detection"),
        pytest.param(task((0, 2), [], [], score=np.zeros(0)), id="no image"),
    ],
)
def test_scenes(one: Task) -> None:
    same(one)


@needs_hotcoco
def test_golden_set(shared: Path) -> None:
    folder = shared / "data/eval_golden"
    file, results = (
        json.loads((folder / name).read_text()) for name in ("instances_val2014_100.json", "fakebbox100_results.json")
    )
    image, category = (
        {entry["id"]: index for index, entry in enumerate(sorted(file[key], key=lambda entry: entry["id"]))}
        for key in ("images", "categories")
    )

    def rows(entries: list[dict[str, object]]) -> list[tuple[int, int, tuple[float, ...]]]:
        return [(image[row["image_id"]], category[row["category_id"]], tuple(row["bbox"])) for row in entries]

    one = task(
        (len(image), len(category)),
        rows(file["annotations"]),
        rows(results),
        score=np.array([row["score"] for row in results]),
        area=np.array([row["area"] for row in file["annotations"]]),
        is_crowd=np.array([bool(row["iscrowd"]) for row in file["annotations"]]),
    )
    same(one)
    assert round(metrics.figures(by_hotcoco(one))["ap"], 3) == 0.505


@needs_hotcoco
def test_evaluation_takes_it_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    used = []
    monkeypatch.setattr(curves, "by_hotcoco", lambda one: used.append(one) or by_hotcoco(one))
    fast = metrics.evaluate(*scene())
    assert len(used) == 1
    monkeypatch.setattr(curves, "has_hotcoco", lambda: False)
    reference = metrics.evaluate(*scene())
    assert len(used) == 1
    assert fast == reference
    assert not math.isnan(fast.ap)
    assert capfd.readouterr() == ("", "")


@needs_hotcoco
def test_in_a_process_that_was_forked_pycocotools_does_it() -> None:
    assert curves.can_use_hotcoco()
    metrics.evaluate(*scene())  # starts hotcoco's threads, which a forked process does not have: it would wait for them

    def work() -> None:
        assert not curves.can_use_hotcoco()
        metrics.evaluate(*scene())

    child = runs.start(work)
    child.join(30)
    child.kill()
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.3.0", True),
        ("2.0", True),
        ("1.2.9", False),
        ("1.3rc1", False),
        ("2.0.dev3", False),
        ("x", False),
        (None, False),
    ],
)
def test_older_versions_are_left_alone(monkeypatch: pytest.MonkeyPatch, version: str | None, expected: bool) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert curves.has_hotcoco.__wrapped__() is expected


def scene() -> tuple[Dataset, list[Detections]]:
    """Return a small data set whose labels and images do not follow their ids, and detections in another order."""
    one = crowded(12, 3, 40, 300, seed=5)
    image_id, category_id = (70, 3, 5, 900, 1, 2, 8, 4, 66, 7, 6, 9), (18, 3, 7)
    xyxy = [np.concatenate((b.xywh[:, :2], b.xywh[:, :2] + b.xywh[:, 2:]), axis=1) for b in (one.objects, one.found)]
    samples, found = [], []
    for index, identity in enumerate(image_id):
        objects, detections = one.objects.image == index, one.found.image == index
        samples.append(
            Sample(
                image_id=identity,
                file="",
                height=600,
                width=600,
                xyxy=xyxy[0][objects].astype(np.float32),
                label=one.objects.category[objects],
                area=one.area[objects].astype(np.float32),
                is_crowd=one.is_crowd[objects],
            )
        )
        found.append(
            Detections(
                image_id=identity,
                xyxy=torch.from_numpy(xyxy[1][detections]).float(),
                score=torch.from_numpy(one.score[detections]).float(),
                label=torch.from_numpy(one.found.category[detections]),
            )
        )

    def no_pixels(sample: Sample) -> torch.Tensor:
        raise AssertionError("an evaluation reads no image")

    return Dataset("scene", ("a", "b", "c"), category_id, pack(samples), no_pixels, ""), found[::-1]


def test_a_task_is_in_the_order_of_ids() -> None:
    dataset, found = scene()
    laid_out = metrics.to_task(dataset, found)
    ids, categories = sorted(sample.image_id for sample in dataset.samples), sorted(dataset.category_id)
    results = metrics.to_coco_results(dataset, found)
    assert [ids[index] for index in laid_out.found.image] == [row["image_id"] for row in results]
    assert [categories[index] for index in laid_out.found.category] == [row["category_id"] for row in results]
    assert laid_out.found.xywh.tolist() == [row["bbox"] for row in results]
    assert laid_out.score.tolist() == [row["score"] for row in results]
