"""PASCAL VOC: `ImageSets/Main/<set>.txt` lists images, `Annotations/<image>.xml` holds boxes, `JPEGImages/` pixels."""

import math

# Entity declarations, the hole that untrusted XML opens, are refused before parsing.
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldctl.data.images import SUFFIXES, read_header
from ldctl.data.raw import Boxes, ImageEntry, Raw, Split
from ldctl.errors import DataError
from ldctl.samples import Fault

# The first pair of sets that is there whole, so that what is evaluated on is never trained on.
PAIRS = (("train", "val"), ("trainval", "test"), ("train", "test"))


@dataclass(frozen=True)
class _Object:
    """An object of an annotation file, as it stands there.

    Attributes:
        number: Its place in the file, from 1.
        name: Its class; empty where there is none.
        xyxy: Its box as VOC counts it, pixels from 1; NaN where there is no number.
        is_difficult: The flag.
        problem: Why it cannot be read, or None.
    """

    number: int
    name: str
    xyxy: tuple[float, ...]
    is_difficult: bool
    problem: str | None


@dataclass(frozen=True)
class _Annotation:
    """What an annotation file says: `size` is height and width, or None where it does not say."""

    size: tuple[int, int] | None
    objects: tuple[_Object, ...]


def set_name(root: Path, split: Split, value: str | None) -> str:
    """Return the name of the image set of a split, by default from the first of `PAIRS` that is there."""
    if value is not None:
        return value
    folder = root / "ImageSets" / "Main"
    position = 0 if split == "train" else 1
    whole = [pair for pair in PAIRS if all((folder / f"{name}.txt").is_file() for name in pair)]
    half = [pair for pair in PAIRS if (folder / f"{pair[position]}.txt").is_file()]
    return (whole or half or list(PAIRS))[0][position]


def read_voc(root: Path, name: str, other: str) -> Raw:
    """Read an image set.

    VOC counts pixels from 1: 1 is taken off all four numbers, as the reference does. `difficult` objects are marked
    as crowds: not trained on, not counted. Classes are the sorted names of all objects of both splits, which for
    VOC's 20 is their usual order. An image's id is its position in the set.

    Args:
        root: Folder of the data set, or with several years the folder above theirs.
        name: A set such as `trainval`, or several as `VOC2007/trainval+VOC2012/trainval`.
        other: The set of the other split, read for its classes only; it need not exist.

    Raises:
        DataError: The set cannot be read, or is empty.
    """
    faults: list[Fault] = []
    listed = _listed(root, name, faults)
    found: list[tuple[ImageEntry, tuple[_Object, ...]]] = []
    for folder, image in listed:
        entry = _entry(folder, image, len(found), faults)
        if entry is not None:
            found.append(entry)
    names = {item.name for _, objects in found for item in objects}
    if other != name:
        names |= _names(root, other)
    classes = tuple(sorted(names))
    return Raw(
        name=f"{root} {name}",
        classes=classes,
        category_id=tuple(range(1, len(classes) + 1)),
        folder=Path(),
        images=[entry for entry, _ in found],
        boxes=_boxes([objects for _, objects in found], classes),
        noun="object",
        faults=faults,
    )


def _listed(root: Path, name: str, faults: list[Fault]) -> list[tuple[Path, str]]:
    """Return folder and name of each image of a set, without repetitions, which are noted."""
    images: dict[tuple[Path, str], None] = {}
    for part in name.split("+"):
        year, _, plain = part.strip().rpartition("/")
        file = root / year / "ImageSets" / "Main" / f"{plain}.txt"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            there = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt"))) or "none"
            raise DataError(f"{file}: no such image set (there are: {there}): see data.train and data.val") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}: not a readable list of images ({error}): replace it, or see data.train and data.val"
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            image = (root / year, line.split()[0])  # lists per class have a second column
            if image in images:
                faults.append(Fault(str(file), f"line {number}", f"{image[1]} is listed before", "line ignored"))
            images[image] = None
    if not images:
        raise DataError(f"{root}: the image set {name} is empty: see data.train and data.val")
    return list(images)


def _names(root: Path, name: str) -> set[str]:
    """Return the class names of a set; none where it is not there."""
    names: set[str] = set()
    try:
        listed = _listed(root, name, [])
    except DataError:  # reported where that split is opened
        return names
    for folder, image in listed:
        if _is_plain(image):
            parsed = _parse(folder / "Annotations" / f"{image}.xml")
            names |= set() if isinstance(parsed, str) else {item.name for item in parsed.objects if not item.problem}
    return names


def _entry(folder: Path, image: str, index: int, faults: list[Fault]) -> tuple[ImageEntry, tuple[_Object, ...]] | None:
    """Return an image and its objects, or note why it is skipped."""
    if not _is_plain(image):
        faults.append(Fault(str(folder / "ImageSets"), image, "not the name of an image", "image skipped"))
        return None
    xml = folder / "Annotations" / f"{image}.xml"
    parsed = _parse(xml)
    if isinstance(parsed, str):
        faults.append(Fault(str(xml), "", parsed, "image skipped"))
        return None
    places = [folder / "JPEGImages" / f"{image}{suffix}" for suffix in SUFFIXES]
    file = next((place for place in places if place.is_file()), places[0])
    try:
        height, width = parsed.size or read_header(file).upright_hw
    except DataError as error:
        faults.append(Fault(str(file), "", str(error).removeprefix(f"{file}: "), "image skipped"))
        return None
    faults += [
        Fault(str(xml), f"object {item.number} of {file.name}", item.problem, "box dropped")
        for item in parsed.objects
        if item.problem
    ]
    return ImageEntry(index, file, height, width, str(xml)), tuple(item for item in parsed.objects if not item.problem)


def _parse(path: Path) -> _Annotation | str:
    """Return what an annotation file says, or why it cannot be told."""
    try:
        text = path.read_bytes()
    except OSError as error:
        return f"no annotation: {error.strerror}"
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text or b"\0" in text:  # the last: UTF-16, which would hide the others
        return "declares a document type or entities, or is not in UTF-8: neither is read"
    try:
        tree = ElementTree.fromstring(text)  # noqa: S314 (see the import)
    except ElementTree.ParseError as error:
        return f"not valid XML: {error}"
    size = tuple(_number(tree.findtext(f"size/{side}")) for side in ("height", "width"))
    is_known = all(math.isfinite(side) and side >= 1 for side in size)
    return _Annotation(
        size=(int(size[0]), int(size[1])) if is_known else None,
        objects=tuple(_object(number, item) for number, item in enumerate(tree.findall("object"), start=1)),
    )


def _object(number: int, item: ElementTree.Element) -> _Object:
    name = (item.findtext("name") or "").strip()
    problem = "no name" if not name else "no bndbox" if item.find("bndbox") is None else None
    return _Object(
        number=number,
        name=name,
        xyxy=tuple(_number(item.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")),
        is_difficult=_number(item.findtext("difficult")) == 1,
        problem=problem,
    )


def _boxes(objects: list[tuple[_Object, ...]], classes: tuple[str, ...]) -> Boxes:
    labels = {name: label for label, name in enumerate(classes)}
    flat = [(row, item) for row, items in enumerate(objects) for item in items]
    return Boxes(
        image=np.array([row for row, _ in flat], dtype=np.int64),
        xyxy=np.array([item.xyxy for _, item in flat], dtype=np.float64).reshape(-1, 4) - 1,
        label=np.array([labels[item.name] for _, item in flat], dtype=np.int64),
        area=np.full(len(flat), math.nan),
        is_crowd=np.array([item.is_difficult for _, item in flat], dtype=np.bool_),
        number=np.array([item.number for _, item in flat], dtype=np.int64),
    )


def _is_plain(image: str) -> bool:
    return image not in (".", "..") and not any(mark in image for mark in "/\\:")


def _number(text: str | None) -> float:
    """Return a number; NaN where there is none, which the rules for boxes then report."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
