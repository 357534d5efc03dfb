"""From what a reader found in annotation files to a `Dataset`: one set of rules for all formats.

| a box that | in train | in val |
| --- | --- | --- |
| is not finite, has no area, or lies outside the image | dropped | dropped |
| is under 1 px wide or high, or has `area <= 0` | dropped | kept: COCO's evaluation counts it |
| reaches beyond the image | kept; clipped by the augmentation | kept |

All of these are listed as faults (a box that reaches less than 1 px beyond the image is not: rounding does that). An
image without boxes, or with a side under 32 px, is left out of train and kept in val.

Source: the reference's data set class (method of mmdet), which trains on 117,266 of COCO's 118,287 images.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ldctl.data.images import read_sample
from ldctl.errors import DataError
from ldctl.types import Dataset, Fault, Sample

Split = Literal["train", "val"]
SMALLEST_SIDE = 32  # px; the reference does not train on smaller images
_ROUNDING = 1.0  # px that a box may reach beyond the image without a word; VOC's minus 1 alone needs this much


@dataclass(frozen=True)
class ImageEntry:
    """An image as the annotations name it.

    Attributes:
        image_id: Its id, or its index where the format has none.
        file: Where its pixels are.
        height: Pixels as stored.
        width: Pixels as stored.
        source: The file that holds its boxes.
    """

    image_id: int
    file: Path
    height: int
    width: int
    source: str


@dataclass(frozen=True)
class Boxes:
    """Boxes of a split as they stand in the files, unchecked.

    Attributes:
        image: Row of the image that each box belongs to.
        xyxy: Pixels of the stored image; may be anything.
        label: Class index.
        area: Square pixels; NaN takes the box's.
        is_crowd: To be ignored.
        number: What the box is called in its file: an id, a line, a count.
    """

    image: Int64[np.ndarray, " N"]
    xyxy: Float64[np.ndarray, "N 4"]
    label: Int64[np.ndarray, " N"]
    area: Float64[np.ndarray, " N"]
    is_crowd: Bool[np.ndarray, " N"]
    number: Int64[np.ndarray, " N"]


@dataclass(frozen=True)
class Raw:
    """What a reader found.

    Attributes:
        name: What messages call the split.
        classes: Class names.
        category_id: Their ids in the annotation file.
        images: The images.
        boxes: Their boxes.
        noun: What the format calls a box: `annotation`, `object` or `line`.
        faults: What could not even be represented here.
    """

    name: str
    classes: tuple[str, ...]
    category_id: tuple[int, ...]
    images: list[ImageEntry]
    boxes: Boxes
    noun: str
    faults: list[Fault]


def assemble(raw: Raw, split: Split) -> Dataset:
    """Drop what the rules above drop, and group the boxes by image.

    Raises:
        DataError: There are no classes, or no image is left.
    """
    if not raw.classes:
        raise DataError(f"{raw.name}: no classes: there is nothing to detect: name them in it")
    boxes, faults = _checked(raw, split)
    samples = _samples(raw.images, boxes, split)
    faults = [*raw.faults, *faults]
    if not samples:
        wanted = "with a box to train on" if split == "train" else "to evaluate on"
        hint = f"; the first of {len(faults)} faults is {faults[0]}" if faults else ": add annotations"
        raise DataError(f"{raw.name}: no image {wanted}{hint}")
    return Dataset(
        name=raw.name,
        classes=raw.classes,
        category_id=raw.category_id,
        samples=samples,
        read=read_sample,
        fingerprint=fingerprint(raw.classes, raw.category_id, samples),
        faults=tuple(faults),
    )


def fingerprint(classes: tuple[str, ...], category_id: tuple[int, ...], samples: Iterable[Sample]) -> str:
    """Return a SHA-256 that changes with every class, image id, file name, size and box, and with what is unlabelled.

    Folders do not enter, so that a data set keeps its fingerprint when it moves; nor do pixels.
    """
    digest = hashlib.sha256(repr((classes, category_id)).encode())
    for sample in samples:
        identity = (sample.image_id, Path(sample.file).name, sample.height, sample.width, len(sample.label))
        digest.update(repr(identity).encode())
        for array in (sample.xyxy, sample.label, sample.area, sample.is_crowd):
            digest.update(array.tobytes())
        if not sample.is_labelled:
            digest.update(b"unlabelled")
    return digest.hexdigest()


def is_inside(name: str) -> bool:
    """Return whether a file name from an annotation file stays inside the folder that it is relative to."""
    # read both ways: a backslash separates folders on Windows only, but is never meant as part of a name
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name.strip()) and not any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)


def _checked(raw: Raw, split: Split) -> tuple[Boxes, list[Fault]]:
    """Drop boxes by the rules, and say which."""
    boxes = raw.boxes
    size = np.array([(entry.width, entry.height) for entry in raw.images], dtype=np.float64).reshape(-1, 2)[boxes.image]
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = np.isfinite(boxes.xyxy.astype(np.float32)).all(axis=1)
        top_left, bottom_right = boxes.xyxy[:, :2], boxes.xyxy[:, 2:]
        side = bottom_right - top_left
        area = np.where(np.isfinite(boxes.area), boxes.area, side.prod(axis=1))
        shared = np.minimum(bottom_right, size) - np.maximum(top_left, 0)
        beyond = np.maximum(-top_left, bottom_right - size).max(axis=1, initial=0.0)
    trains = split == "train"
    rules = (
        (~is_finite, "the box is not finite", "box dropped"),
        ((side <= 0).any(axis=1), "the box has no area", "box dropped"),
        ((shared <= 0).any(axis=1), "the box lies outside the image", "box dropped"),
        (trains & (side < 1).any(axis=1), "the box is under 1 px wide or high", "box dropped"),
        (trains & (area <= 0), "the object's area is not positive", "box dropped"),
        (beyond > _ROUNDING, "the box reaches beyond the image", "kept; clipped in training"),
    )
    keep, named = np.ones(len(side), dtype=np.bool_), np.zeros(len(side), dtype=np.bool_)
    faults: list[Fault] = []
    for is_bad, problem, action in rules:
        faults += [_fault(raw, int(row), problem, action) for row in np.flatnonzero(is_bad & ~named)]
        named |= is_bad
        if action == "box dropped":
            keep &= ~is_bad
    kept = Boxes(
        image=boxes.image[keep],
        xyxy=boxes.xyxy[keep],
        label=boxes.label[keep],
        area=area[keep],
        is_crowd=boxes.is_crowd[keep],
        number=boxes.number[keep],
    )
    return kept, faults


def _fault(raw: Raw, row: int, problem: str, action: str) -> Fault:
    entry = raw.images[raw.boxes.image[row]]
    x1, y1, x2, y2 = raw.boxes.xyxy[row]
    where = f"{raw.noun} {raw.boxes.number[row]} of {entry.file.name}"
    what = f"{problem} (from {x1:g}, {y1:g} to {x2:g}, {y2:g} in {entry.width} x {entry.height} px)"
    return Fault(entry.source, where, what, action)


def _samples(images: list[ImageEntry], boxes: Boxes, split: Split) -> tuple[Sample, ...]:
    # views into four arrays: a COCO split has half a million objects, and an array of its own costs more than a box
    order = np.argsort(boxes.image, kind="stable")
    start = np.searchsorted(boxes.image[order], np.arange(len(images) + 1)).tolist()
    xyxy, area = boxes.xyxy[order].astype(np.float32), boxes.area[order].astype(np.float32)
    label, is_crowd = boxes.label[order], boxes.is_crowd[order]
    samples = []
    for row, entry in enumerate(images):
        mine = slice(start[row], start[row + 1])
        is_useless = mine.start == mine.stop or min(entry.height, entry.width) < SMALLEST_SIDE
        if split == "train" and is_useless:
            continue
        samples.append(
            Sample(
                image_id=entry.image_id,
                file=str(entry.file),
                height=entry.height,
                width=entry.width,
                xyxy=xyxy[mine],
                label=label[mine],
                area=area[mine],
                is_crowd=is_crowd[mine],
            )
        )
    return tuple(samples)
