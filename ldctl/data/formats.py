"""Which data set to read, and how: COCO JSON, PASCAL VOC, YOLO text files or generated images."""

import difflib
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ldctl.data.coco import annotation_places, find_annotations
from ldctl.data.index import open_coco
from ldctl.data.raw import Split, assemble
from ldctl.data.synthetic import SyntheticSpec, synthetic_dataset
from ldctl.data.table import relabelled
from ldctl.data.voc import read_voc, set_name
from ldctl.data.yolo import find_yaml, read_yolo
from ldctl.errors import DataError
from ldctl.samples import Dataset
from ldctl.schema import Spec

SHOWN_FILES = 5
LARGEST_SIDE = 20_000  # pixels; beyond, a mistyped number is likelier than such an input


class DataSpec(Spec):
    """Images and boxes, and how the network sees them.

    Attributes:
        path: Folder of the data set; for YOLO also its `.yaml` file.
        format: `"auto"` looks at the folder: an annotation file of COCO's names wins over VOC's `ImageSets/Main`, and
            that over YOLO's `data.yaml`.
        train: What to train on: the name of a split, or COCO's annotation file relative to `path`; by default the
            usual names (`ldctl.data.coco`, `voc` and `yolo` list them).
        val: The same for evaluation.
        unlabelled: Folder of images without annotations, for `ldctl distill`: they are added to the training images,
            and each is shown as often as those. On them the student learns from its teacher alone.
        unlabelled_only: Train on the unlabelled images alone; classes are then those of `val`.
        synthetic: What to generate; used with `format = "synthetic"` only.
        short_side: Range of the image's shorter side in pixels after resizing: training draws from all whole numbers
            in it, both ends included; evaluation takes the upper end.
        long_side: Most pixels of the longer side; wins over `short_side`.
        flip: Probability of a horizontal flip in training.
        canvas: Pad every training batch to one of two sizes, one for wide images and one for all others, which follow
            from the upper end of `short_side` and `long_side`, instead of to the batch's largest image. What a detector
            says of an image then depends on the image alone, not on the others of its batch; wide images and others
            share no batch, so an epoch may have one step more. Costs the pixels of the padding. A cached teacher needs
            it.
        scaled_jpeg: Decode a JPEG in training at 1/2, 1/4 or 1/8 of its size where that is no smaller than what is
            shown of it: takes less time where images have many megapixels. What is shown is then a little smoother than
            in evaluation, which always decodes in full.
        workers: Processes that load images, at most one per CPU core; 0 loads in the training process.
    """

    path: str = Field(default="data/coco", min_length=1)
    format: Literal["auto", "coco", "voc", "yolo", "synthetic"] = "auto"
    train: str | None = None
    val: str | None = None
    unlabelled: str | None = None
    unlabelled_only: bool = False
    synthetic: SyntheticSpec = SyntheticSpec()
    short_side: tuple[int, int] = (800, 800)
    long_side: int = Field(default=1333, ge=32, le=LARGEST_SIDE)
    flip: float = Field(default=0.5, ge=0, le=1)
    canvas: bool = False
    scaled_jpeg: bool = False
    workers: int = Field(default=8, ge=0)

    def scaled(self, scale: float) -> "DataSpec":
        """Return the same data at sizes times `scale`."""
        low, high, long_side = (int(side * scale + 0.5) for side in (*self.short_side, self.long_side))
        return self.model_copy(update={"short_side": (low, high), "long_side": long_side})

    def labelled(self) -> "DataSpec":
        """Return the same data without unlabelled images."""
        return self.model_copy(update={"unlabelled": None, "unlabelled_only": False})

    @model_validator(mode="after")
    def _check_unlabelled(self) -> "DataSpec":
        if self.unlabelled_only and self.unlabelled is None:
            raise ValueError("unlabelled_only, but no such images: name their folder with --set data.unlabelled=DIR")
        return self

    @model_validator(mode="after")
    def _check_sides(self) -> "DataSpec":
        low, high = self.short_side
        if not 32 <= low <= high <= self.long_side:
            raise ValueError(
                f"short_side [{low}, {high}] and long_side {self.long_side}: needs 32 <= low <= high <= long_side"
            )
        return self


def open_dataset(spec: DataSpec, split: Split) -> Dataset:
    """Read the annotations of a split.

    What is wrong with single images and boxes is in the result's `faults`, and left out of its samples by the rules of
    `ldctl.data.raw`; `ldctl.data.check.inspect` also looks at the image files.

    Raises:
        DataError: There is no such data set, its files are not of the format, or nothing usable is in them.
    """
    if spec.format == "synthetic":
        return synthetic_dataset(spec.synthetic, split)
    with _without_collector():
        return _read(spec, split)


def check_classes(train: Dataset, val: Dataset) -> None:
    """Refuse splits that do not mean the same classes by the same labels.

    Raises:
        DataError: Names what differs.
    """
    if train.classes == val.classes:
        return
    missing, extra = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
    said = [
        f"only {name} has {', '.join(sorted(only))}"
        for name, only in ((train.name, missing), (val.name, extra))
        if only
    ]
    what = "; ".join(said) or f"the same names in another order ({', '.join(train.classes)}; {', '.join(val.classes)})"
    raise DataError(f"{train.name} and {val.name} do not have the same classes: {what}: make the lists equal")


@contextmanager
def _without_collector() -> Iterator[None]:
    """Stop the garbage collector, whose walks over millions of parsed objects double the time of reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def in_class_order(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Return the same data set with its labels counted in another order of its classes.

    Args:
        dataset: Any.
        classes: The data set's class names in the order wanted.
    """
    assert sorted(classes) == sorted(dataset.classes), "the same classes"
    if classes == dataset.classes:
        return dataset
    new_label = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    return replace(
        dataset,
        classes=classes,
        category_id=tuple(dataset.category_id[dataset.classes.index(name)] for name in classes),
        samples=relabelled(dataset.samples, new_label),
    )


def _read(spec: DataSpec, split: Split) -> Dataset:
    path = Path(spec.path)
    if not path.exists():
        raise DataError(
            f"{path}: no such folder: put a COCO, VOC or YOLO data set there or name one with --data; "
            "`ldctl distill --preset quickstart` needs none"
        )
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise DataError(
            f"{path}: a file, not a folder: name the data set's folder with --data, and an annotation file in it with "
            "data.train or data.val"
        )
    value, other = (spec.train, spec.val) if split == "train" else (spec.val, spec.train)
    found = _detect(path, spec) if spec.format == "auto" else spec.format
    if found == "coco" and (annotations := find_annotations(path, split, value)):
        return open_coco(path, split, annotations)
    if found == "yolo" and (yaml := find_yaml(path)):
        return assemble(read_yolo(yaml, split, value), split)
    if found == "voc":
        other_split: Split = "val" if split == "train" else "train"
        return assemble(read_voc(path, set_name(path, split, value), set_name(path, other_split, other)), split)
    raise DataError(_not_found(path, split, value, found))


def _detect(path: Path, spec: DataSpec) -> str:
    """Return the format of a data set; empty where nothing of any is found."""
    if find_annotations(path, "train", spec.train) or find_annotations(path, "val", spec.val):
        return "coco"
    if any(next(path.glob(f"{folder}ImageSets/Main/*.txt"), None) for folder in ("", "*/")):
        return "voc"
    return "yolo" if find_yaml(path) else ""


def _not_found(path: Path, split: Split, value: str | None, found: str) -> str:
    """Say what was looked for, and what there is instead."""
    coco = ", ".join(str(place.relative_to(path)) for place in annotation_places(path, split, value))
    looked_for = {"coco": f"COCO's {coco}", "voc": "VOC's ImageSets/Main/*.txt", "yolo": "YOLO's data.yaml"}
    if found:
        looked_for = {found: looked_for[found]}
    hint = _hint(path, value) or "mend data.path, or name an annotation file"
    return f"{path}: no {split} split: looked for {'; '.join(looked_for.values())}: {hint} with data.{split}"


def _hint(path: Path, value: str | None) -> str:
    """Say which annotation files there are, first of all the one that may have been meant; nothing of none."""
    files = sorted(str(file.relative_to(path)) for file in (*path.glob("*.json"), *path.glob("annotations/*.json")))
    by_stem = {Path(file).stem: file for file in files}
    near = difflib.get_close_matches(Path(value).stem, by_stem, n=1) if value else []
    meant = f"did you mean {by_stem[near[0]]}? There" if near else "there"
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    return f"{meant} is {', '.join(files[:SHOWN_FILES])}{more}: name one" if files else ""
