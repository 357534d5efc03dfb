"""YOLO text files: `data.yaml` names classes and image folders, `labels/` mirrors `images/` with a text file per image.

Of YAML, what such files use is read: `key: value` lines; `names`, `train` and `val` also as `[a, b]`, `{0: a, 1: b}`,
or as indented `- a` or `0: a` lines; quotes and comments. Keys other than `path`, `train`, `val`, `test`, `names` and
`nc` are passed over.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ldctl.data.images import SUFFIXES, Header, read_header
from ldctl.data.raw import Boxes, ImageEntry, Raw, Split, is_inside
from ldctl.errors import DataError
from ldctl.samples import Fault

_KEYS = ("path", "train", "val", "test", "names", "nc")
_FLOW_ITEM = re.compile(r"""\s*(?:(\d+)\s*:\s*)?('[^']*'|"[^"]*"|[^,\s][^,]*?)\s*(?:,|$)""")
_LINE_ITEM = re.compile(r"(?:(\d+)\s*:\s*)?(.+)")
_THREADS = 16  # waiting for files, not computing

Entries = dict[str, list[tuple[str, str]]]


def find_yaml(path: Path) -> Path | None:
    """Return the file that describes a data set: `path` itself, its `data.yaml`, or the only `.yaml` file in it."""
    if path.suffix in (".yaml", ".yml"):
        return path if path.is_file() else None
    if (path / "data.yaml").is_file():
        return path / "data.yaml"
    others = [*path.glob("*.yaml"), *path.glob("*.yml")]
    return others[0] if len(others) == 1 else None


def read_yolo(yaml: Path, split: Split, value: str | None) -> Raw:
    """Read a split: an image folder, a text file that lists images, or several of either.

    A line of a label file is `class x y width height`: the box's middle and size as shares of the image's. An image
    without label file has no objects. The image's id is its position among the sorted files.

    Args:
        yaml: The describing file.
        split: Which split.
        value: Another key (`test`) or folder to use instead of the split's own.

    Raises:
        DataError: The file cannot be understood, or an image folder is not there.
    """
    entries = parse_yaml(yaml)
    classes = _class_names(entries, yaml)
    faults: list[Fault] = []
    files = _image_files(entries, yaml, value or split, faults)
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(_header, files))
    images: list[ImageEntry] = []
    rows: list[tuple[float, ...]] = []
    for file, header in zip(files, headers, strict=True):
        if isinstance(header, str):
            faults.append(Fault(str(file), "", header, "image skipped"))
            continue
        label_file = _label_file(file)
        height, width = header.upright_hw
        rows += [(float(len(images)), *box) for box in _lines(label_file, file.name, len(classes), faults)]
        images.append(ImageEntry(len(images), file, height, width, str(label_file)))
    return Raw(
        name=f"{yaml} {value or split}",
        classes=classes,
        category_id=tuple(range(len(classes))),
        folder=Path(),
        images=images,
        boxes=_boxes(rows, images),
        noun="line",
        faults=faults,
    )


def parse_yaml(yaml: Path) -> Entries:
    """Return the items of each known key as `(index, value)` pairs; the index is empty but in `0: name`.

    Raises:
        DataError: Names the line that cannot be understood.
    """
    try:
        lines = yaml.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{yaml}: not a readable text file ({error}): save it as UTF-8") from error
    entries: Entries = {}
    key, is_flow, is_open = "", False, False
    for number, line in enumerate(map(_uncommented, lines), start=1):
        if not line.strip() or line.startswith(("---", "%")):
            continue
        if is_open or line[0] in " \t-":
            text = line.strip().removeprefix("- ")
        elif match := re.match(r"""["']?([\w.-]+)["']?\s*:(?:\s+(.*)|$)""", line):
            key, text = match[1], (match[2] or "").strip()
            is_flow = is_open = text.startswith(("[", "{"))
            if key == "names" and text and not is_flow:
                raise DataError(f'{yaml}, line {number}: names is {text}, not a list: write "names: [cat, dog]"')
            entries.setdefault(key, [])
        else:
            raise DataError(f"{yaml}, line {number}: not `key: value` nor an item of a list: {line.strip()[:60]}")
        is_open = is_open and not text.endswith(("]", "}"))
        if key in _KEYS:
            entries[key] += _items(text, is_flow)
    return {known: found for known, found in entries.items() if known in _KEYS}


def _items(text: str, is_flow: bool) -> list[tuple[str, str]]:
    """Return the items of a line: those of `[a, b]` or `{0: a}` without the brackets, else at most one."""
    found = _FLOW_ITEM.finditer(text.strip("[]{} ")) if is_flow else filter(None, [_LINE_ITEM.fullmatch(text.strip())])
    return [(match[1] or "", match[2].strip("'\"")) for match in found]


def _uncommented(line: str) -> str:
    head, mark, _ = f" {line}".partition(" #")
    is_quoted = head.count('"') % 2 or head.count("'") % 2
    return line if is_quoted or not mark else head[1:]


def _class_names(entries: Entries, yaml: Path) -> tuple[str, ...]:
    named = entries.get("names", [])
    if not named:
        raise DataError(f'{yaml}: no class names: add a line such as "names: [cat, dog]"')
    if all(index for index, _ in named):
        named = sorted(named, key=lambda item: int(item[0]))
        if [int(index) for index, _ in named] != list(range(len(named))):
            raise DataError(f"{yaml}: names must be numbered 0 to {len(named) - 1}, each once: fill the gaps")
    names = tuple(name for _, name in named)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{yaml}: names holds {', '.join(repeated)} twice: give each class a name of its own")
    count = [value for _, value in entries.get("nc", [])]
    if count and count != [str(len(names))]:
        raise DataError(f"{yaml}: nc is {count[0]}, but there are {len(names)} names: make them agree")
    return names


def _image_files(entries: Entries, yaml: Path, split: str, faults: list[Fault]) -> list[Path]:
    """List the images of a split, each once."""
    stated = "".join(value for _, value in entries.get("path", []))
    if not (yaml.parent / stated).is_dir():
        raise DataError(f"{yaml}: path: {stated}: there is no folder {yaml.parent / stated}: mend or remove that line")
    bases = [yaml.parent / stated, yaml.parent]
    values = [value for _, value in entries.get(split, [])] or [split, f"images/{split}"]
    found: dict[Path, None] = {}
    for value in values:
        # exporters write ../train/images where they mean train/images
        places = [base / name for base in bases for name in (value, value.removeprefix("../"))]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            continue
        if place.is_dir():
            files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            files = _listed(place, faults)
        found |= dict.fromkeys(files)
    if not found:
        tried = ", ".join(dict.fromkeys(str(base / value) for base in bases for value in values))
        raise DataError(f"{yaml}: no images of the split {split}: looked in {tried}: mend the file or see data.{split}")
    return list(found)


def _listed(file: Path, faults: list[Fault]) -> list[Path]:
    """Return the images that a text file names, relative to its folder; they may not lie outside it."""
    try:
        names = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable list of images ({error}): save it as UTF-8 text") from error
    files = []
    for number, name in enumerate(map(str.strip, names), start=1):
        if not name:
            continue
        if is_inside(name):
            files.append(file.parent / name)
        else:
            faults.append(Fault(str(file), f"line {number}", f"{name[:80]} is not a path inside it", "image skipped"))
    return files


def _header(file: Path) -> Header | str:
    """Return an image's header, or why it cannot be read."""
    try:
        return read_header(file)
    except DataError as error:
        return str(error).removeprefix(f"{file}: ")


def _label_file(image: Path) -> Path:
    """Return where an image's boxes are: the last `images` of its path becomes `labels`, the suffix `.txt`."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images", 1)] = "labels"
    return Path(*parts).with_suffix(".txt")


def _lines(file: Path, image: str, num_classes: int, faults: list[Fault]) -> list[tuple[float, ...]]:
    """Return middle x and y, width and height (shares), label and line number of each box."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        faults.append(Fault(str(file), "", f"not a readable text file: {error}", "all its boxes dropped"))
        return []
    boxes: list[tuple[float, ...]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, *box = map(float, line.split())
        except ValueError:
            box = []
        if len(box) != 4:
            problem = f"{line.strip()[:60]!r} is not a class and four numbers"
        elif label not in range(num_classes):
            problem = f"class {label:g} is not among the {num_classes} of the data set"
        else:
            boxes.append((*box, label, float(number)))
            continue
        faults.append(Fault(str(file), f"line {number} of {image}", problem, "box dropped"))
    return boxes


def _boxes(rows: list[tuple[float, ...]], images: list[ImageEntry]) -> Boxes:
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    image = table[:, 0].astype(np.int64)
    size = np.array([(entry.width, entry.height) for entry in images], dtype=np.float64).reshape(-1, 2)[image]
    middle, half = table[:, 1:3] * size, table[:, 3:5] * size / 2
    return Boxes(
        image=image,
        xyxy=np.concatenate((middle - half, middle + half), axis=1),
        label=table[:, 5].astype(np.int64),
        area=np.full(len(table), math.nan),
        is_crowd=np.zeros(len(table), dtype=np.bool_),
        number=table[:, 6].astype(np.int64),
    )
