"""What was once learned of a large annotation file, beside it, so that it is parsed once and not by every process.

An index is a safetensors file of a few flat arrays that are mapped into memory: opening one reads no annotation, and
all processes on a machine share its pages. It is used only for an annotation file of the same size and time of change
as the one that it was made of, with the same bytes in `_BLOCKS` places all over it: what is changed between these, with
the time set back, passes unseen. And only whole: anything else is passed over, and made anew. Where none can be
written, everything works without.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import safetensors.numpy
from jaxtyping import Int64, Shaped, UInt8
from pydantic import Field, ValidationError
from pydantic_core import PydanticSerializationError
from safetensors import SafetensorError, safe_open

from ldctl.data.coco import image_folder, probes, read_coco
from ldctl.data.images import read_sample
from ldctl.data.raw import Raw, Split, assemble
from ldctl.data.table import prefix, whole
from ldctl.errors import DataError, OutputError
from ldctl.files import write_whole
from ldctl.samples import Dataset, Fault, Table
from ldctl.schema import Spec

VERSION = 1  # of the arrays, and of the rules by which annotations become samples
WORTHWHILE = 10_000_000  # bytes of annotations; fewer are parsed in a third of a second
_BLOCKS, _BLOCK_BYTES = 64, 65_536  # of an annotation file that are hashed, from all over it
_TEXT = "ldctl-index"  # of the strings in a safetensors header: a checksum, a space, and a JSON object

Arrays = dict[str, Shaped[np.ndarray, "..."]]
Columns = Mapping[str, tuple[str, int]]  # of each array, its type as safetensors spells it, and its number of axes
A = TypeVar("A", bound=Spec)

_COLUMNS: Columns = {
    **dict.fromkeys(("image_id", "height", "width", "first_byte", "first_object", "label"), ("I64", 1)),
    **dict.fromkeys(("is_labelled", "is_crowd"), ("BOOL", 1)),
    "names": ("U8", 1),
    "xyxy": ("F32", 2),
    "area": ("F32", 1),
}


class Identity(Spec):
    """What tells an annotation file from others.

    Attributes:
        version: `VERSION`.
        size: Bytes.
        mtime_ns: Time of change.
        sample: SHA-256 of some blocks.
    """

    version: int
    size: int
    mtime_ns: int
    sample: str


class About(Spec):
    """What an index says besides its columns.

    Attributes:
        made_of: The annotation file.
        classes: As in `Dataset`.
        category_id: As in `Dataset`.
        fingerprint: As in `Dataset`.
        faults: Item, problem and action of each.
        probes: Images to look for when looking for their folder.
    """

    made_of: Identity
    classes: tuple[str, ...] = Field(min_length=1)
    category_id: tuple[int, ...]
    fingerprint: str
    faults: tuple[tuple[str, str, str], ...]
    probes: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Stored(Generic[A]):
    """A file of arrays, mapped into memory.

    Attributes:
        about: What they are of.
        arrays: By name.
        checksum: Over both.
    """

    about: A
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
        _remember(file, made_of, raw, dataset)
    return _read(file, made_of, root, annotations) or dataset


def _remember(file: Path, made_of: Identity, raw: Raw, dataset: Dataset) -> None:
    """Write the index of a data set, unless it would not be used."""
    arrays: Arrays = {name: getattr(dataset.samples.table, name) for name in _COLUMNS}
    about = About(
        made_of=made_of,
        classes=dataset.classes,
        category_id=dataset.category_id,
        fingerprint=dataset.fingerprint,
        faults=tuple((fault.item, fault.problem, fault.action) for fault in dataset.faults),
        probes=tuple(image.as_posix() for image in probes([entry.file for entry in raw.images])),
    )
    if _is_sound(about, arrays):
        store(file, about, arrays)


def store(file: Path, about: Spec, arrays: Arrays) -> None:
    """Write arrays to a file, if it can be written."""
    with contextlib.suppress(OutputError, PydanticSerializationError):  # the latter: what is no Unicode text
        text = about.model_dump_json()
        write_whole(file, safetensors.numpy.save(arrays, {_TEXT: f"{_checksum(text, arrays)} {text}"}))


def load(file: Path, kind: type[A], columns: Columns) -> Stored[A] | None:
    """Map the arrays of a file into memory; none where the file is missing, damaged or of something else.

    Args:
        file: What `store` wrote.
        kind: Of what the file says of its arrays.
        columns: Its arrays.
    """
    try:
        # PyTorch's tensors are views into the mapped file; those of numpy would be copies
        with safe_open(file, framework="pt") as opened:
            texts = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            # numpy has not all types of a file
            if {name: (one.get_dtype(), len(one.get_shape())) for name, one in slices.items()} != columns:
                return None
            arrays = {name: opened.get_tensor(name).numpy() for name in columns}
        checksum, _, text = texts.get(_TEXT, "").partition(" ")
        is_whole = checksum == _checksum(text, arrays)
        return Stored(kind.model_validate_json(text), arrays, checksum) if is_whole else None
    except (SafetensorError, OSError, ValidationError):
        return None


def _checksum(text: str, arrays: Arrays) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].data, value)
    return f"{value:08x}"


def _identity(annotations: Path) -> Identity | None:
    """Return what tells an annotation file from others; none for one that is too small for an index."""
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
    return Identity(version=VERSION, size=status.st_size, mtime_ns=status.st_mtime_ns, sample=digest.hexdigest())


def _read(file: Path, made_of: Identity, root: Path, annotations: Path) -> Dataset | None:
    """Return the data set of an index; none where it is not of this annotation file."""
    stored = load(file, About, _COLUMNS)
    if stored is None or stored.about.made_of != made_of or not _is_sound(stored.about, stored.arrays):
        return None
    about = stored.about
    folder = image_folder(root, annotations, [Path(name) for name in about.probes])
    return Dataset(
        name=str(annotations),
        classes=about.classes,
        category_id=about.category_id,
        samples=whole(_table(stored, file, prefix(folder))),
        read=read_sample,
        fingerprint=about.fingerprint,
        faults=tuple(Fault(str(annotations), *fault) for fault in about.faults),
        checked=file.with_suffix(".checked.ldctl"),
    )


def _table(stored: Stored[About], file: Path, start: str) -> Table:
    columns: dict[str, Any] = dict(stored.arrays)
    return Table(**columns, prefix=start, reopen=partial(_reopen, file, stored.checksum, start))


def _reopen(file: Path, checksum: str, start: str) -> Table:
    """Map an index again, in a process that was started afresh.

    Raises:
        DataError: It is not the same any more.
    """
    stored = load(file, About, _COLUMNS)
    if stored is None or stored.checksum != checksum:
        raise DataError(f"{file}: was replaced while it was in use: repeat the command, with --resume in training")
    return _table(stored, file, start)


def _is_sound(about: About, arrays: Arrays) -> bool:
    """Return whether these are the columns of a table that a reader can have made, every position inside it."""
    shape = {name: array.shape for name, array in arrays.items()}
    num_images, num_objects = shape["image_id"][0], shape["label"][0]
    return (
        all(shape[name] == (num_images,) for name in ("height", "width", "is_labelled"))
        and all(shape[name] == (num_objects,) for name in ("area", "is_crowd"))
        and shape["xyxy"] == (num_objects, 4)
        and _are_starts(arrays["first_byte"], num_images, len(arrays["names"]))
        and _are_starts(arrays["first_object"], num_images, num_objects)
        and len(about.category_id) == len(about.classes)
        and bool(((arrays["label"] >= 0) & (arrays["label"] < len(about.classes))).all())
        and bool((arrays["height"] >= 1).all() and (arrays["width"] >= 1).all())
        and bool(np.isfinite(arrays["xyxy"]).all() and not np.isnan(arrays["area"]).any())
        and _are_names(arrays["names"], arrays["first_byte"])
    )


def _are_starts(values: Int64[np.ndarray, " _"], count: int, end: int) -> bool:
    is_one_each = values.shape == (count + 1,)
    return is_one_each and bool(values[0] == 0 and values[-1] == end and (values[:-1] <= values[1:]).all())


def _are_names(names: UInt8[np.ndarray, " M"], first_byte: Int64[np.ndarray, " _"]) -> bool:
    """Return whether all are names of files in a folder, told without looking at them one by one."""
    content = names.tobytes()
    try:
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    if (np.diff(first_byte) == 0).any():
        return False
    first = names[first_byte[:-1]]
    is_cut = (first & 0xC0) == 0x80  # a character's later byte
    return not (is_cut | (first == ord("/"))).any() and not any(mark in content for mark in (b"..", b"\\", b":", b"\0"))
