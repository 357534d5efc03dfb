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

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ldctl.data.images import read_sample
from ldctl.data.table import fingerprint, pack_names, prefix, starts, whole
from ldctl.errors import DataError
from ldctl.samples import Dataset, Fault, Samples, Table

Split = Literal["train", "val"]
SMALLEST_SIDE = 32  # px; the reference does not train on smaller images
_ROUNDING = 1.0  # px that a box may reach beyond the image without a word; VOC's minus 1 alone needs this much


@dataclass(frozen=True)
class ImageEntry:
    """An image as the annotations name it.

    Attributes:
        image_id: Its id, or its index where the format has none.
        file: Where its pixels are, relative to the folder of all.
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
        folder: What the images' files are relative to.
        images: The images.
        boxes: Their boxes.
        noun: What the format calls a box: `annotation`, `object` or `line`.
        faults: What could not even be represented here.
    """

    name: str
    classes: tuple[str, ...]
    category_id: tuple[int, ...]
    folder: Path
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
    samples = _samples(raw, boxes, split)
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


def _samples(raw: Raw, boxes: Boxes, split: Split) -> Samples:
    """Group the boxes by image, and leave out the images that the rules leave out."""
    count = np.bincount(boxes.image, minlength=len(raw.images))
    size_hw = np.array([(entry.height, entry.width) for entry in raw.images], dtype=np.int64).reshape(-1, 2)
    is_useful = (count > 0) & (size_hw.min(axis=1) >= SMALLEST_SIDE)
    kept = np.flatnonzero(is_useful) if split == "train" else np.arange(len(raw.images))
    order = np.argsort(boxes.image, kind="stable")
    if split == "train":
        order = order[is_useful[boxes.image[order]]]
    names, first_byte = pack_names([raw.images[row].file.as_posix() for row in kept.tolist()])
    return whole(
        Table(
            image_id=np.array([raw.images[row].image_id for row in kept.tolist()], dtype=np.int64),
            height=size_hw[kept, 0],
            width=size_hw[kept, 1],
            is_labelled=np.ones(len(kept), dtype=np.bool_),
            first_byte=first_byte,
            names=names,
            first_object=starts(count[kept]),
            xyxy=boxes.xyxy[order].astype(np.float32),
            label=boxes.label[order],
            area=boxes.area[order].astype(np.float32),
            is_crowd=boxes.is_crowd[order],
            prefix=prefix(raw.folder),
        )
    )
