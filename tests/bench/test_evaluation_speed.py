"""How long an evaluation takes: `pytest -m bench -s tests/bench/test_evaluation_speed.py` prints one line of JSON."""

import resource
import statistics
import time

import numpy as np
import pytest
import torch
from figures import report

from ldctl import curves, metrics
from ldctl.data.table import pack
from ldctl.samples import Dataset, Sample
from ldctl.types import Detections

CLASSES, OBJECTS_PER_IMAGE, DETECTIONS, IMAGES, FEW_IMAGES, ROUNDS = 80, 7.2, 100, 5000, 250, 5


def scene(num_images: int) -> tuple[Dataset, list[Detections]]:
    """Return images like COCO's in number of objects and classes; two thirds of the detections lie near an object."""
    rng = np.random.default_rng(0)
    samples, found = [], []
    for image_id in range(num_images):
        count = int(rng.poisson(OBJECTS_PER_IMAGE)) + 1
        corner, side = rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(2, 5.5, (count, 2)))
        xyxy = np.concatenate((corner, corner + side), axis=1)
        label = rng.choice(rng.integers(0, CLASSES, 3), count)
        of, is_near = rng.integers(0, count, DETECTIONS), rng.random(DETECTIONS) < 0.67
        boxes = xyxy[of] + rng.normal(0, 0.1, (DETECTIONS, 4)) * np.tile(side, 2)[of]
        samples.append(
            Sample(
                image_id=image_id,
                file="",
                height=640,
                width=640,
                xyxy=xyxy.astype(np.float32),
                label=label,
                area=side.prod(axis=1).astype(np.float32),
                is_crowd=rng.random(count) < 0.01,
            )
        )
        found.append(
            Detections(
                image_id=image_id,
                xyxy=torch.from_numpy(boxes).float(),
                score=torch.from_numpy(rng.random(DETECTIONS)).float(),
                label=torch.from_numpy(np.where(is_near, label[of], rng.integers(0, CLASSES, DETECTIONS))),
            )
        )

    def no_pixels(sample: Sample) -> torch.Tensor:
        raise AssertionError("an evaluation reads no image")

    names, ids = tuple(map(str, range(CLASSES))), tuple(range(1, CLASSES + 1))
    return Dataset("scene", names, ids, pack(samples), no_pixels, ""), found


def seconds(dataset: Dataset, found: list[Detections]) -> float:
    start = time.perf_counter()
    metrics.evaluate(dataset, found)
    return time.perf_counter() - start


@pytest.mark.bench
@pytest.mark.skipif(not curves.has_hotcoco(), reason="hotcoco is not installed: see the extra fast-eval")
def test_speed_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few = scene(IMAGES), scene(FEW_IMAGES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    of_whole = [seconds(*whole) for _ in range(ROUNDS)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    fast, slow = [], []
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on both alike
        fast.append(seconds(*few))
        with monkeypatch.context() as patch:
            patch.setattr(curves, "has_hotcoco", lambda: False)
            slow.append(seconds(*few))
    ratio = statistics.median(slow) / statistics.median(fast)
    report(
        what="evaluation",
        images=IMAGES,
        detections_per_image=DETECTIONS,
        classes=CLASSES,
        seconds=statistics.median(of_whole),
        best_seconds=min(of_whole),
        memory_grown_mib=round(grown / 1024),
        few_images=FEW_IMAGES,
        times_faster_than_pycocotools_on_few=ratio,
    )
    assert ratio > 10
