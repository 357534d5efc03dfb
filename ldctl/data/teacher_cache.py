"""What a teacher says of every view of a data set, computed once: one memory-mapped file.

Regions that follow from the objects alone are the same in every epoch, and so are the teacher's outputs there, as long
as an image is shown in finitely many ways: at one scale, mirrored or not. Only these outputs are kept.

| part of the file, little-endian | bytes |
| --- | --- |
| `MAGIC`, length of the header, SHA-256 of the header | 8, 8, 32 |
| header: `CacheHeader` as JSON | as said |
| index: for every view its number, its number of rows, and a CRC-32 | 12 for each view |
| records, in the order of the index, with nothing between | `CacheHeader.row_bytes` for each row |

A view's number is `2 * image + is_flipped`. Its record holds the locations of its rows (int32, ascending, on the grid
of the view's canvas), then their edge logits, their class logits, and the logits of their quality, where there are any.
The header holds the hash of the index, and a CRC-32 is of the header (without that hash), the entry and the record, so
that every byte of the file is checked: header and index when it is opened, a record whenever it is read.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int32, Int64
from pydantic import ConfigDict, Field, ValidationError

from ldctl.errors import CheckpointError
from ldctl.schema import Spec

MAGIC = b"ldcache\x01"  # the last byte is the version of the format
PREFIX = len(MAGIC) + 8 + 32
MAX_HEADER = 1 << 22  # bytes; of which class names are most
ENTRY = np.dtype([("view", "<u4"), ("num_rows", "<u4"), ("crc", "<u4")])
UNFINISHED = "0" * 64  # in the place of the index's hash
MAX_IMAGES = 2**31  # so that the number of a view has 32 bits

Dtype = Literal["float16", "float32"]


class CacheHeader(Spec):
    """Whose outputs a cache holds, on what, and where.

    Attributes:
        teacher_sha256: SHA-256 of the teacher's file.
        model: The teacher's spec as a JSON object.
        classes: The teacher's class names.
        metrics: Figures that the teacher's file says of it.
        metrics_fingerprint: Of the data that those are of; None where the file does not say.
        train_fingerprint: Of the training set.
        num_images: Of the training set.
        flips: Whether views are mirrored: one or both.
        short_side: Pixels of the shorter side of an image.
        long_side: Most pixels of the longer side.
        assignment: The rule by which the student's head assigns objects.
        vlr: How the VLR is drawn.
        gamma: Lower end of the VLR.
        dtype: Of the logits.
        num_bins: Of an edge distribution.
        has_quality: Whether the teacher tells the quality of a location besides its classes.
        num_locations: Of a canvas, wide or tall.
        batch: Views that the teacher saw at once.
        bf16: Whether the teacher computed in bfloat16.
        versions: Of the packages that wrote the file.
        index_sha256: SHA-256 of the index.
    """

    # a figure may be NaN, and must not come back as null
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    teacher_sha256: str
    model: dict[str, Any]
    classes: tuple[str, ...] = Field(min_length=1)
    metrics: dict[str, float]
    metrics_fingerprint: str | None
    train_fingerprint: str
    num_images: int = Field(ge=1, lt=MAX_IMAGES)
    flips: tuple[bool, ...] = Field(min_length=1, max_length=2)
    short_side: int
    long_side: int
    assignment: Literal["atss", "fcos"]
    vlr: str
    gamma: float
    dtype: Dtype
    num_bins: int = Field(ge=2, le=1 << 10)
    has_quality: bool
    num_locations: int = Field(ge=1, lt=2**31)
    batch: int
    bf16: bool
    versions: dict[str, str]
    index_sha256: str = UNFINISHED

    @property
    def seed(self) -> int:
        """Return the CRC-32 of the header of the unfinished file, with which that of each entry begins."""
        return zlib.crc32(self.model_copy(update={"index_sha256": UNFINISHED}).packed())

    @property
    def num_views(self) -> int:
        """Return the number of views."""
        return self.num_images * len(self.flips)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row: its location and its logits."""
        return 4 + np.dtype(self.dtype).itemsize * (4 * self.num_bins + len(self.classes) + self.has_quality)

    def packed(self) -> bytes:
        """Return everything that stands before the index."""
        text = self.model_dump_json().encode()
        return MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text


@dataclass(frozen=True)
class ViewRows:
    """What the teacher says of the locations of one view that matter.

    Attributes:
        location: Ascending.
        edge: Logits of the edge distributions.
        cls: Class logits.
        quality: Logits; none where the teacher has none.
    """

    location: Int32[np.ndarray, " N"]
    edge: Float[np.ndarray, "N 4 R"]
    cls: Float[np.ndarray, "N C"]
    quality: Float[np.ndarray, " N"] | None

    def packed(self) -> bytes:
        """Return the record."""
        parts = (self.location, self.edge, self.cls, *(() if self.quality is None else (self.quality,)))
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache, opened; can be sent to other processes.

    Attributes:
        path: The file.
        header: What it holds.
        start: Where the records start, bytes from the start of the file.
        seed: See `CacheHeader`.
        first_row: Rows before each view's record, by the number of the view.
        num_rows: Rows of each view; -1 for views that the cache does not hold.
        crc: CRC-32 of each view.
    """

    path: Path
    header: CacheHeader
    start: int
    seed: int
    first_row: Int64[np.ndarray, " V"]
    num_rows: Int64[np.ndarray, " V"]
    crc: Int64[np.ndarray, " V"]

    @property
    def fingerprint(self) -> str:
        """Return a hash of the whole content."""
        return hashlib.sha256(self.header.packed()).hexdigest()

    def view(self, image: int, is_flipped: bool) -> ViewRows:
        """Read the rows of a view.

        Args:
            image: Position of the image in the training set.
            is_flipped: Whether it is mirrored.

        Raises:
            CheckpointError: The record is damaged, or the file was cut or taken away since it was opened.
        """
        header, number = self.header, view_number(image, is_flipped)
        count = int(self.num_rows[number])
        assert count >= 0, "the run's flips were held against the cache's"
        offset, size = self.start + int(self.first_row[number]) * header.row_bytes, count * header.row_bytes
        try:
            # mapped anew each time: that costs less than a millisecond, and tells a file that has shrunk
            record = np.memmap(self.path, np.uint8, "r", offset, (size,)).tobytes() if size else b""
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read any more ({error}): put it back") from error
        if entry_crc(self.seed, number, count, record) != self.crc[number]:
            raise _damaged(self.path, f"what it says of image {image} of the data set is not what was written")
        rows = unpacked(record, count, header)
        if count and not (rows.location[-1] < header.num_locations and (np.diff(rows.location, prepend=-1) > 0).all()):
            raise _damaged(self.path, f"image {image} of the data set has locations that there are not")
        return rows


def view_number(image: int, is_flipped: bool) -> int:
    """Return the number of a view."""
    return 2 * image + is_flipped


def entry_crc(seed: int, number: int, num_rows: int, record: bytes) -> int:
    """Return the CRC-32 of the header, an entry of the index, and its record."""
    return zlib.crc32(record, zlib.crc32(number.to_bytes(4, "little") + num_rows.to_bytes(4, "little"), seed))


def unpacked(record: bytes, num_rows: int, header: CacheHeader) -> ViewRows:
    """Return the rows of a record; their arrays share its memory."""
    dtype = np.dtype(header.dtype).newbyteorder("<")
    num_edge, num_cls = num_rows * 4 * header.num_bins, num_rows * len(header.classes)
    location = np.frombuffer(record, "<i4", num_rows)
    value = np.frombuffer(record, dtype, offset=location.nbytes)
    return ViewRows(
        location=location,
        edge=value[:num_edge].reshape(num_rows, 4, header.num_bins),
        cls=value[num_edge : num_edge + num_cls].reshape(num_rows, len(header.classes)),
        quality=value[num_edge + num_cls :] if header.has_quality else None,
    )


def open_cache(path: Path) -> TeacherCache:
    """Open a cache, and check its header, its index and its size.

    Raises:
        CheckpointError: There is no such file, it is no cache, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = read_header(file.read(PREFIX + MAX_HEADER), path)
            file.seek(start - header.num_views * ENTRY.itemsize)
            index = file.read(header.num_views * ENTRY.itemsize) if start <= size else b""
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: make one with `ldctl teacher cache`") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    if header.index_sha256 == UNFINISHED:
        raise CheckpointError(f"{path}: only half built: repeat the `ldctl teacher cache` that began it")
    if hashlib.sha256(index).hexdigest() != header.index_sha256:
        raise _damaged(path, "the index is not what was written")
    entries = np.frombuffer(index, ENTRY)
    count = entries["num_rows"].astype(np.int64)
    expected = start + int(count.sum()) * header.row_bytes
    if size != expected:
        raise _damaged(path, f"{size} bytes instead of {expected}")
    number = entries["view"].astype(np.int64)
    if not np.array_equal(np.sort(number), view_numbers(header)):
        raise _damaged(path, "the index does not name each view once")
    arrays = (np.cumsum(count) - count, count, entries["crc"].astype(np.int64))
    by_view = [np.full(2 * header.num_images, -1, dtype=np.int64) for _ in arrays]
    for target, values in zip(by_view, arrays, strict=True):
        target[number] = values
    return TeacherCache(path, header, start, header.seed, *by_view)


def view_numbers(header: CacheHeader) -> Int64[np.ndarray, " V"]:
    """Return the numbers of all views, ascending."""
    image = np.arange(header.num_images, dtype=np.int64)[:, None]
    return (2 * image + np.array(sorted(header.flips), dtype=np.int64)).ravel()


def read_header(head: bytes, path: Path) -> tuple[CacheHeader, int]:
    """Return the header, and where the records start.

    Args:
        head: The start of the file; more than the header does no harm.
        path: The file, for messages.

    Raises:
        CheckpointError: It is no cache, of another version, or damaged.
    """
    if not head.startswith(MAGIC[:-1]):
        raise CheckpointError(f"{path}: not a teacher's cache: pass a file that `ldctl teacher cache` wrote")
    version = head[len(MAGIC) - 1 : len(MAGIC)]
    if version > MAGIC[-1:]:
        raise CheckpointError(f"{path}: of a newer format than this ldctl reads: update ldctl")
    length = int.from_bytes(head[len(MAGIC) : len(MAGIC) + 8], "little")
    text = head[PREFIX : PREFIX + length]
    if hashlib.sha256(text).digest() != head[PREFIX - 32 : PREFIX]:
        raise _damaged(path, "the header is not what was written")
    try:
        header = CacheHeader.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _damaged(path, f"the header says something impossible at {where or 'its top'}") from error
    return header, PREFIX + length + header.num_views * ENTRY.itemsize


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({what}): take another copy of the file, or build it again with `ldctl teacher cache`"
    )
