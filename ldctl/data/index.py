"""What was once learned of a large annotation file, beside it, so that it is parsed once and not by every process.

An index is a safetensors file of a few flat arrays that are mapped into memory: opening one reads no annotation, and
all processes on a machine share its pages. It is used only for the very file that it was made of, and only whole:
anything else is passed over, and made anew. Where none can be written, everything works without.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Int64, Shaped, UInt8
from safetensors import SafetensorError, safe_open

from ldctl.data.coco import image_folder, probes, read_coco
from ldctl.data.images import read_sample
from ldctl.data.raw import Split, assemble
from ldctl.data.table import prefix, whole
from ldctl.errors import DataError, OutputError
from ldctl.files import write_whole
from ldctl.samples import Dataset, Fault, Table

VERSION = 1  # of the arrays, and of the rules by which annotations become samples
WORTHWHILE = 10_000_000  # bytes of annotations; fewer are parsed in a third of a second
_BLOCKS, _BLOCK_BYTES = 64, 65_536  # of an annotation file that are hashed, from all over it
_TEXT = "ldctl-index"  # of the strings in a safetensors header: a checksum, a space, and a JSON object
_COLUMNS = dict.fromkeys(("image_id", "height", "width", "first_byte", "first_object", "label"), "int64")
_COLUMNS |= {"names": "uint8", "xyxy": "float32", "area": "float32", "is_labelled": "bool", "is_crowd": "bool"}

Arrays = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Stored:
    """A file of arrays, mapped into memory.

    Attributes:
        about: What they are of, a JSON object.
        arrays: By name.
        checksum: Over both.
    """

    about: dict[str, Any]
    arrays: Arrays
    checksum: str


def open_coco(root: Path, split: Split, annotations: Path) -> Dataset:
    """Read a COCO annotation file by way of its index, which is made if it is missing or of another file.

    Args:
        root: Folder of the data set.
        split: Whose rules to apply.
        annotations: The file.

    Raises:
        DataError: See `read_coco` and `assemble`.
    """
    made_of = _identity(annotations)
    if made_of is None:
        return assemble(read_coco(root, split, annotations), split)
    file = annotations.with_name(f"{annotations.name}.{split}.ldctl")
    known = _read(file, made_of, root, annotations)
    if known is not None:
        return known
    raw = read_coco(root, split, annotations)
    dataset = assemble(raw, split)
    if made_of == _identity(annotations):  # else it was written to while it was read
        about = {
            "made_of": made_of,
            "classes": dataset.classes,
            "category_id": dataset.category_id,
            "fingerprint": dataset.fingerprint,
            "faults": [(fault.item, fault.problem, fault.action) for fault in dataset.faults],
            "probes": [image.as_posix() for image in probes([entry.file for entry in raw.images])],
        }
        store(file, about, {name: getattr(dataset.samples.table, name) for name in _COLUMNS})
    return _read(file, made_of, root, annotations) or dataset


def store(file: Path, about: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays to a file, if it can be written."""
    text = json.dumps(dict(about))
    with contextlib.suppress(OutputError):
        write_whole(file, safetensors.numpy.save(arrays, {_TEXT: f"{_checksum(text, arrays)} {text}"}))


def load(file: Path) -> Stored | None:
    """Map the arrays of a file into memory; none where the file is missing, damaged or of something else."""
    try:
        # PyTorch's tensors are views into the mapped file; those of numpy would be copies
        with safe_open(file, framework="pt") as opened:
            texts = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return None
    checksum, _, text = texts.get(_TEXT, "").partition(" ")
    return Stored(json.loads(text), arrays, checksum) if checksum == _checksum(text, arrays) else None


def _checksum(text: str, arrays: Arrays) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].data, value)
    return f"{value:08x}"


def _identity(annotations: Path) -> dict[str, Any] | None:
    """Return what tells an annotation file from all others; none for one that is too small for an index."""
    try:
        status = annotations.stat()
        if status.st_size < WORTHWHILE:
            return None
        digest = hashlib.sha256()
        with annotations.open("rb") as file:
            for start in np.linspace(0, max(status.st_size - _BLOCK_BYTES, 0), _BLOCKS).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    except OSError:  # said where it is read
        return None
    return {"version": VERSION, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


def _read(file: Path, made_of: dict[str, Any], root: Path, annotations: Path) -> Dataset | None:
    """Return the data set of an index; none where it is not of this annotation file."""
    stored = load(file)
    if stored is None or stored.about.get("made_of") != made_of:
        return None
    about = stored.about
    if not _is_sound(stored.arrays, len(about["classes"])):
        return None
    folder = image_folder(root, annotations, [Path(name) for name in about["probes"]])
    return Dataset(
        name=str(annotations),
        classes=tuple(about["classes"]),
        category_id=tuple(about["category_id"]),
        samples=whole(_table(stored, file, prefix(folder))),
        read=read_sample,
        fingerprint=about["fingerprint"],
        faults=tuple(Fault(str(annotations), *fault) for fault in about["faults"]),
        checked=file.with_suffix(".checked.ldctl"),
    )


def _table(stored: Stored, file: Path, start: str) -> Table:
    columns: dict[str, Any] = dict(stored.arrays)
    return Table(**columns, prefix=start, reopen=partial(_reopen, file, stored.checksum, start))


def _reopen(file: Path, checksum: str, start: str) -> Table:
    """Map an index again, in a process that was started afresh.

    Raises:
        DataError: It is not the same any more.
    """
    stored = load(file)
    if stored is None or stored.checksum != checksum:
        raise DataError(f"{file}: was replaced while it was in use: repeat the command, with --resume in training")
    return _table(stored, file, start)


def _is_sound(arrays: Arrays, num_classes: int) -> bool:
    """Return whether these are the columns of a table, all positions inside it and all images inside their folder."""
    if {name: str(array.dtype) for name, array in arrays.items()} != _COLUMNS:
        return False
    shape = {name: array.shape for name, array in arrays.items()}
    num_images, num_objects = shape["image_id"][0], shape["label"][0]
    return (
        all(shape[name] == (num_images,) for name in ("image_id", "height", "width", "is_labelled"))
        and all(shape[name] == (num_objects,) for name in ("label", "area", "is_crowd"))
        and shape["xyxy"] == (num_objects, 4)
        and _are_starts(arrays["first_byte"], num_images, len(arrays["names"]))
        and _are_starts(arrays["first_object"], num_images, num_objects)
        and bool(((arrays["label"] >= 0) & (arrays["label"] < num_classes)).all())
        and _stay_inside(arrays["names"], arrays["first_byte"])
    )


def _are_starts(values: Int64[np.ndarray, " _"], count: int, end: int) -> bool:
    return values.shape == (count + 1,) and bool(values[0] == 0 and values[-1] == end and (np.diff(values) >= 0).all())


def _stay_inside(names: UInt8[np.ndarray, " M"], first_byte: Int64[np.ndarray, " _"]) -> bool:
    """Return whether no name can lead out of its folder, told without looking at the names one by one."""
    is_absolute = (names[first_byte[:-1]] == ord("/")).any()
    return not is_absolute and not any(mark in names.tobytes() for mark in (b"..", b"\\", b":"))
