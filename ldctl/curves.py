"""Precision and recall of boxes by COCO's rules: pycocotools, or hotcoco, which gives the same bits sooner."""

import contextlib
import functools
import importlib.metadata
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

OLDEST = (1, 3)  # version of hotcoco that was held against pycocotools


@dataclass(frozen=True)
class Boxes:
    """The objects, or the detections, of a data set; those of an image and category in the order that settles ties.

    Attributes:
        image: Index of the image.
        category: Index of the category.
        xywh: Left, top, width, height.
    """

    image: Int64[np.ndarray, " N"]
    category: Int64[np.ndarray, " N"]
    xywh: Float64[np.ndarray, "N 4"]


@dataclass(frozen=True)
class Task:
    """What to compare. Images and categories are counted in the order of their ids, which settles ties between images.

    Attributes:
        num_images: Those without any box included.
        num_categories: As `num_images`.
        objects: What is to be found.
        area: Of each object, in square pixels.
        is_crowd: Whether an object covers a group: neither to be found nor a false alarm.
        found: Detections.
        score: Of each detection.
    """

    num_images: int
    num_categories: int
    objects: Boxes
    area: Float64[np.ndarray, " G"]
    is_crowd: Bool[np.ndarray, " G"]
    found: Boxes
    score: Float64[np.ndarray, " N"]


@dataclass(frozen=True)
class Curves:
    """What the figures are means of; -1 where there is no object to find.

    Axes: IoU threshold .50:.05:.95, recall 0:.01:1, category, area (all, small, medium, large), most detections of an
    image (1, 10, 100).

    Attributes:
        precision: At each recall, the best at this recall or a higher one.
        recall: Share of the objects that is found.
    """

    precision: Float64[np.ndarray, "10 101 K 4 3"]
    recall: Float64[np.ndarray, "10 K 4 3"]


def compare(task: Task) -> Curves:
    """Compare detections with objects; by hotcoco where it can be used."""
    return by_hotcoco(task) if can_use_hotcoco() else by_pycocotools(task)


@functools.cache
def has_hotcoco() -> bool:
    """Return whether hotcoco is installed, in a version that is known to give the bits of pycocotools."""
    try:
        version = importlib.metadata.version("hotcoco")
    except importlib.metadata.PackageNotFoundError:
        return False
    is_final = re.fullmatch(r"\d+(\.\d+)*", version)  # a release candidate may give other bits than its release
    return is_final is not None and tuple(map(int, version.split(".")[:2])) >= OLDEST


@functools.cache
def first_user() -> int:
    """Return the id of the process that asked first."""
    return os.getpid()


def can_use_hotcoco() -> bool:
    """Return whether hotcoco is installed and would not hang: its threads do not survive a fork."""
    return has_hotcoco() and first_user() == os.getpid()


def by_hotcoco(task: Task) -> Curves:
    """Compare by hotcoco, from arrays."""
    import hotcoco

    objects, found = task.objects, task.found
    coco = hotcoco.COCO.from_arrays(
        [{"id": image} for image in range(task.num_images)],
        [{"id": category, "name": str(category)} for category in range(task.num_categories)],  # hotcoco warns of none
        objects.image,
        objects.category,
        objects.xywh,
        area=task.area,
        iscrowd=task.is_crowd,
    )
    rows = np.column_stack((found.image, found.xywh, task.score, found.category))
    evaluation = hotcoco.COCOeval(coco, coco.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    return _curves(evaluation.eval)


def by_pycocotools(task: Task) -> Curves:
    """Compare by pycocotools, the reference."""
    crowd, score = task.is_crowd.astype(np.int64).tolist(), task.score.tolist()
    none, width_height = [0] * len(score), task.found.xywh[:, 2:]
    objects = _annotations(task.objects, area=task.area.tolist(), iscrowd=crowd)
    found = _annotations(task.found, area=width_height.prod(axis=1).tolist(), iscrowd=none, score=score)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(task, objects), _coco(task, found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return _curves(evaluation.eval)


def _curves(result: Mapping[str, Any]) -> Curves:
    return Curves(precision=result["precision"], recall=result["recall"])


def _annotations(boxes: Boxes, **values: list[Any]) -> list[dict[str, Any]]:
    """Return boxes as COCO annotations, with more values of each."""
    ids = range(1, len(boxes.image) + 1)  # pycocotools takes id 0 for "no match"
    rows = zip(ids, boxes.image.tolist(), boxes.category.tolist(), boxes.xywh.tolist(), *values.values(), strict=True)
    names = ("id", "image_id", "category_id", "bbox", *values)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _coco(task: Task, annotations: list[dict[str, Any]]) -> COCO:
    """Build pycocotools' index of boxes in memory, without a file."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(task.num_images)],
        "categories": [{"id": category} for category in range(task.num_categories)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
