"""COCO JSON: one file of images, annotations and categories per split."""

import json
import math
from pathlib import Path, PurePosixPath
from typing import TypeGuard

import numpy as np

from ldctl.data.raw import Boxes, ImageEntry, Raw, Split, is_inside
from ldctl.errors import DataError
from ldctl.samples import Fault

NAMES: dict[Split, tuple[str, ...]] = {"train": ("train2017", "train"), "val": ("val2017", "val", "valid")}
_PLACES = ("annotations/instances_{}.json", "annotations/{}.json", "{}/_annotations.coco.json", "{}.json")
_LARGEST_ID = 2**63 - 1  # ids travel in 64-bit tensors
# Looking at a few names finds the folder even when the first image is missing.
_PROBES = 16

Json = dict[str, object]


def find_annotations(root: Path, split: Split, value: str | None) -> Path | None:
    """Find the annotation file of a split.

    Args:
        root: Folder of the data set.
        split: Which one.
        value: A JSON file relative to `root`, the name of a split (`val2017`), or None for the usual names.
    """
    return next((path for path in annotation_places(root, split, value) if path.is_file()), None)


def annotation_places(root: Path, split: Split, value: str | None) -> list[Path]:
    """List where the annotation file of a split may be, best first."""
    if value is not None and value.endswith(".json"):
        return [root / value]
    names = NAMES[split] if value is None else (value,)
    return [root / place.format(name) for name in names for place in _PLACES]


def read_coco(root: Path, split: Split, annotations: Path) -> Raw:
    """Read an annotation file.

    Boxes are `x, y, width, height`; class labels follow the order of the category ids, which may have gaps. `iscrowd`
    marks crowds, and `ignore` keeps an annotation out of training. Images are looked up by `file_name` in the first
    of these folders that holds one of them: `<split>/`, `images/<split>/`, `images/`, `JPEGImages/`, the data set's
    own, and the annotation file's; `<split>` is what the file's name ends in (`instances_train2017.json`:
    `train2017`).

    Raises:
        DataError: The file is no COCO annotation file, or none of its images is found.
    """
    document = _load(annotations)
    faults: list[Fault] = []
    classes = _classes(_entries(document, "categories", annotations), annotations, faults)
    images, skipped = _images(_entries(document, "images", annotations), annotations, faults)
    reader = _BoxReader(str(annotations), images, skipped, {category: row for row, category in enumerate(classes)})
    boxes = reader.read(_entries(document, "annotations", annotations), trains=split == "train")
    folder = image_folder(root, annotations, [image.file for image in images.values()])
    return Raw(
        name=str(annotations),
        classes=tuple(classes.values()),
        category_id=tuple(classes),
        folder=folder,
        images=list(images.values()),
        boxes=boxes,
        noun="annotation",
        faults=[*faults, *reader.faults],
    )


def _load(path: Path) -> Json:
    try:
        document = json.loads(path.read_bytes(), object_hook=_without_masks)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}: check data.path, data.train and data.val"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}: write or download the file again") from error
    except ValueError as error:  # all that is left: a number that Python refuses to read
        raise DataError(f"{path}: holds a number of thousands of digits: write or download the file again") from error
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: not a COCO annotation file: {type(document).__name__} instead of an object: "
            "name another with data.train and data.val"
        )
    return document


def _without_masks(item: Json) -> Json:
    # as soon as each annotation is parsed: polygons are most of the file, and 2 GB for COCO's train split
    item.pop("segmentation", None)
    return item


def _entries(document: Json, key: str, path: Path) -> list[object]:
    entries = document.get(key)
    if not isinstance(entries, list):
        found = ", ".join(map(str, document)) or "nothing"
        raise DataError(f'{path}: not a COCO annotation file: no list "{key}" (there is {found}): see data.format')
    return entries


def _classes(entries: list[object], path: Path, faults: list[Fault]) -> dict[int, str]:
    """Return class names by category id, in the order of the ids."""
    classes: dict[int, str] = {}
    for position, entry in enumerate(entries):
        category_id, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not _is_id(category_id) or not isinstance(name, str):
            raise DataError(f"{path}: category {position} (counted from 0) needs a whole number id and a name: mend it")
        if category_id in classes:
            raise DataError(f"{path}: category id {category_id} is given to {classes[category_id]} and {name}: mend it")
        classes[category_id] = name
    classes = dict(sorted(classes.items()))
    names: set[str] = set()
    for category_id, name in classes.items():
        if name in names:
            classes[category_id] = f"{name} (id {category_id})"
            action = f"called {classes[category_id]}"
            faults.append(
                Fault(str(path), f"category {category_id}", f"another category is called {name}, too", action)
            )
        names.add(name)
    return classes


def _images(entries: list[object], path: Path, faults: list[Fault]) -> tuple[dict[int, ImageEntry], set[object]]:
    """Return the usable images by id, with `file` as it stands in the annotations, and the ids of the others."""
    images: dict[int, ImageEntry] = {}
    skipped: set[object] = set()
    for position, entry in enumerate(entries):
        image = _image(entry, str(path))
        if isinstance(image, str):
            faults.append(Fault(str(path), f"image entry {position} (counted from 0)", image, "image skipped"))
            skipped.add(repr(entry.get("id")) if isinstance(entry, dict) else None)
        elif image.image_id in images:
            problem = f"{image.file} has the id of {images[image.image_id].file}"
            faults.append(Fault(str(path), f"image {image.image_id}", problem, "the second image skipped"))
        else:
            images[image.image_id] = image
    return images, skipped


def _image(entry: object, source: str) -> ImageEntry | str:
    """Return an image, or what is wrong with it."""
    if not isinstance(entry, dict):
        return f"{_short(entry)} is not an object"
    image_id, name, height, width = (entry.get(key) for key in ("id", "file_name", "height", "width"))
    if not _is_id(image_id):
        return f"its id {_short(image_id)} is not a whole number of at most 64 bits"
    if not isinstance(name, str) or not is_inside(name):
        return f"file_name {_short(name)} is not a path inside the data set"
    if type(height) is not int or type(width) is not int or height <= 0 or width <= 0:
        return f"width {_short(width)} and height {_short(height)} are not a size in pixels"
    return ImageEntry(image_id, Path(PurePosixPath(name)), height, width, source)


def probes(files: list[Path]) -> list[Path]:
    """Return the files to look for when looking for their folder: some, from all over the list."""
    return files[:: max(len(files) // _PROBES, 1)]


def image_folder(root: Path, annotations: Path, files: list[Path]) -> Path:
    """Return the first of the usual folders that holds one of the images.

    Args:
        root: Folder of the data set.
        annotations: The annotation file.
        files: Of the images, as they stand in it; their `probes` do as well.

    Raises:
        DataError: None does.
    """
    stem = annotations.stem
    names = dict.fromkeys((stem.rsplit("_", 1)[-1], stem))
    folders = [folder for name in names for folder in (root / name, root / "images" / name)]
    folders += [root / "images", root / "JPEGImages", root, annotations.parent]
    for folder in folders:
        if any((folder / file).is_file() for file in probes(files)):
            return folder
    if not files:
        return root
    tried = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DataError(
        f"{annotations}: none of its images ({files[0]}, ...) is in any of {tried}: copy or link them there"
    )


class _BoxReader:
    """Collects the boxes of the annotations, and says what is wrong with the others."""

    def __init__(
        self, source: str, images: dict[int, ImageEntry], skipped: set[object], labels: dict[int, int]
    ) -> None:
        self._source = source
        self._images = images
        self._rows = {image_id: row for row, image_id in enumerate(images)}
        self._skipped = skipped
        self._labels = labels
        self._by_id: dict[int, tuple[float, ...]] = {}
        self._found: list[tuple[float, ...]] = []
        self.faults: list[Fault] = []

    def read(self, entries: list[object], *, trains: bool) -> Boxes:
        """Read all annotations; `trains` leaves those out that are marked `ignore`."""
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                problem = f"{_short(entry)} is not an object"
                self._report(f"annotation entry {position} (counted from 0)", problem, "annotation dropped")
            elif not (trains and entry.get("ignore")):
                self._add(entry, position)
        table = np.array(self._found, dtype=np.float64).reshape(-1, 9)
        return Boxes(
            image=table[:, 0].astype(np.int64),
            xyxy=np.concatenate((table[:, 1:3], table[:, 1:3] + table[:, 3:5]), axis=1),
            label=table[:, 5].astype(np.int64),
            area=table[:, 6],
            is_crowd=table[:, 7] != 0,
            number=table[:, 8].astype(np.int64),
        )

    def _add(self, entry: Json, position: int) -> None:
        number, image_id, category = entry.get("id"), entry.get("image_id"), entry.get("category_id")
        row = self._rows.get(image_id) if type(image_id) is int else None
        if row is None:
            if repr(image_id) not in self._skipped:  # else its image is reported already
                problem = f"there is no image with id {_short(image_id)}"
                self._report(self._where(entry), problem, "annotation dropped")
            return
        label = self._labels.get(category) if type(category) is int else None
        if label is None:
            problem = f"there is no category with id {_short(category)}"
            self._report(self._where(entry), problem, "annotation dropped")
            return
        corners = entry.get("bbox")
        if not (isinstance(corners, list) and len(corners) == 4 and all(map(_is_number, corners))):
            self._report(self._where(entry), f"bbox {_short(corners)} is not four numbers", "annotation dropped")
            return
        is_crowd = entry.get("iscrowd", 0)
        if is_crowd not in (0, 1):
            problem = f"iscrowd {_short(is_crowd)} is neither 0 nor 1"
            self._report(self._where(entry), problem, "annotation dropped")
            return
        key = number if type(number) is int and abs(number) < 2**53 else None
        area = _number(entry.get("area"))
        found = (row, *map(_number, corners), label, area, float(is_crowd), position if key is None else key)
        if key is not None and (first := self._by_id.setdefault(key, found)) is not found:
            is_same = first[:6] == found[:6]
            action = "annotation dropped: it repeats the first" if is_same else "kept"
            self._report(self._where(entry), "the id is used before", action)
            if is_same:
                return
        self._found.append(found)

    def _where(self, entry: Json) -> str:
        """Name an annotation, and its image where there is one; only of a fault, since it takes longer than to read."""
        image_id = entry.get("image_id")
        image = self._images.get(image_id) if type(image_id) is int else None
        return f"annotation {_short(entry.get('id'))}" + (f" of {image.file.name}" if image else "")

    def _report(self, item: str, problem: str, action: str) -> None:
        self.faults.append(Fault(self._source, item, problem, action))


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) <= _LARGEST_ID


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    """Return a JSON number as a float, an integer beyond all floats as infinity; NaN for anything else."""
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _short(value: object) -> str:
    """Show a value of an annotation file, cut to a bearable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
