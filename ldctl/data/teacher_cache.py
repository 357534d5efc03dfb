"""What a teacher says of every view of a data set, computed once: one file.

Regions that follow from the objects alone are the same in every epoch, and so are the teacher's outputs there, as long
as an image is shown in finitely many ways: at one scale, mirrored or not. Only these outputs are kept.

| part of the file, little-endian | bytes |
| --- | --- |
| `MAGIC`, length of the header, SHA-256 of the header | 8, 8, 32 |
| header: `CacheHeader` as JSON | as said |
| index: for every view its number, how many edges and classes are told, and a CRC-32 | 16 for each view |
| records, in the order of the index, with nothing between | `CacheHeader.record_bytes` |

A view's number is `2 * image + is_flipped`. Its record holds the locations whose edges are told and those whose classes
are (int32, ascending, on the grid of the view's canvas), then the edge logits of the ones, and the class logits of the
others, with the logits of their quality, where the teacher has any.
The header holds the hash of the index, and a CRC-32 is of the header (without that hash), the entry and the record, so
that every byte of the file is checked: header and index when it is opened, a record whenever it is read.

The header ties the file to the names, sizes and boxes of the training images (`train_fingerprint`), not to their
pixels: where images were replaced by others of the same names and sizes, the cache still tells what the teacher said of
the old ones, and nothing notices.
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
from ldctl.types import Rule

MAGIC = b"ldcache\x01"  # the last byte is the version of the format
PREFIX = len(MAGIC) + 8 + 32
MAX_HEADER = 1 << 22  # bytes; of which class names are most
ENTRY = np.dtype([("view", "<u4"), ("num_edge", "<u4"), ("num_cls", "<u4"), ("crc", "<u4")])
UNFINISHED = "0" * 64  # in the place of the index's hash
MAX_IMAGES = 2**31  # so that the number of a view has 32 bits

Dtype = Literal["float16", "float32"]
CachedRegion = Literal["main", "vlr"]  # which follow from the objects alone, and are small


class CacheHeader(Spec):
    """Whose outputs a cache holds, on what, and where.

    Attributes:
        teacher_sha256: SHA-256 of the teacher's file.
        model: The teacher's spec as a JSON object.
        classes: The teacher's class names.
        metrics: Figures that the teacher's file says of it.
        metrics_fingerprint: Of the images that those are of; None where the file does not say.
        train_fingerprint: Of the training set.
        num_images: Of the training set.
        flips: Whether views are mirrored: one or both.
        short_side: Pixels of the shorter side of an image.
        long_side: Most pixels of the longer side.
        scaled_jpeg: See `DataSpec`.
        assignment: The rule by which the student's head assigns objects.
        edge_regions: Where it tells edges.
        cls_regions: Where it tells classes.
        vlr: How the VLR is drawn.
        gamma: Lower end of the VLR.
        dtype: Of the logits.
        num_bins: Of an edge distribution.
        has_quality: Whether the teacher tells the quality of a location besides its classes.
        location_offset: Of the teacher's locations from the corners of their cells, in strides.
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
    scaled_jpeg: bool
    assignment: Rule
    edge_regions: tuple[CachedRegion, ...]
    cls_regions: tuple[CachedRegion, ...]
    vlr: str
    gamma: float
    dtype: Dtype
    num_bins: int = Field(ge=2, le=1 << 10)
    has_quality: bool
    location_offset: float
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

    def record_bytes(self, num_edge: int, num_cls: int) -> int:
        """Return the size of a record."""
        size = np.dtype(self.dtype).itemsize
        edge, cls = 4 * self.num_bins, len(self.classes) + self.has_quality
        return num_edge * (4 + size * edge) + num_cls * (4 + size * cls)

    def packed(self) -> bytes:
        """Return everything that stands before the index."""
        text = self.model_dump_json().encode()
        return MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text


@dataclass(frozen=True)
class ViewRows:
    """What the teacher says of the locations of one view that matter.

    Attributes:
        edge_location: Ascending.
        edge: Logits of the edge distributions there.
        cls_location: Ascending.
        cls: Class logits there.
        quality: Logits there; none where the teacher has none.
    """

    edge_location: Int32[np.ndarray, " N"]
    edge: Float[np.ndarray, "N 4 R"]
    cls_location: Int32[np.ndarray, " M"]
    cls: Float[np.ndarray, "M C"]
    quality: Float[np.ndarray, " M"] | None

    def packed(self) -> bytes:
        """Return the record."""
        parts = (self.edge_location, self.cls_location, self.edge, self.cls, self.quality)
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts if part is not None)


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache, opened; can be sent to other processes.

    Attributes:
        path: The file.
        header: What it holds.
        seed: See `CacheHeader`.
        offset: Where the record of each view starts in the file, by the number of the view.
        num_edge: Rows with edges of each view; -1 for views that the cache does not hold.
        num_cls: The same of rows with classes.
        crc: CRC-32 of each view.
    """

    path: Path
    header: CacheHeader
    seed: int
    offset: Int64[np.ndarray, " V"]
    num_edge: Int64[np.ndarray, " V"]
    num_cls: Int64[np.ndarray, " V"]
    crc: Int64[np.ndarray, " V"]

    @property
    def fingerprint(self) -> str:
        """Return a hash of the whole content."""
        return hashlib.sha256(self.header.packed()).hexdigest()

    def view(self, image: int, is_flipped: bool) -> ViewRows:
        """Read what the teacher says of a view.

        Args:
            image: Position of the image in the training set.
            is_flipped: Whether it is mirrored.

        Raises:
            CheckpointError: The record is damaged, or the file was cut or taken away since it was opened.
        """
        number = view_number(image, is_flipped)
        counts = int(self.num_edge[number]), int(self.num_cls[number])
        assert min(counts) >= 0, "the run's flips were held against the cache's"
        size = self.header.record_bytes(*counts)
        try:
            with self.path.open("rb") as file:  # mapped into memory, a file that is cut would end the process
                file.seek(int(self.offset[number]))
                record = file.read(size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read any more ({error.strerror}): put it back") from error
        if len(record) < size:
            raise CheckpointError(f"{self.path}: cannot be read any more (it was cut): put it back")
        if entry_crc(self.seed, number, *counts, record) != self.crc[number]:
            raise _damaged(self.path, f"what it says of image {image} of the data set is not what was written")
        rows = unpacked(record, *counts, self.header)
        if not all(_is_ascending(each, self.header.num_locations) for each in (rows.edge_location, rows.cls_location)):
            raise _damaged(self.path, f"image {image} of the data set has locations that there are not")
        return rows


def _is_ascending(location: Int32[np.ndarray, " N"], limit: int) -> bool:
    return not len(location) or bool(location[-1] < limit and (np.diff(location, prepend=-1) > 0).all())


def view_number(image: int, is_flipped: bool) -> int:
    """Return the number of a view."""
    return 2 * image + is_flipped


def entry_crc(seed: int, number: int, num_edge: int, num_cls: int, record: bytes) -> int:
    """Return the CRC-32 of the header, an entry of the index, and its record."""
    entry = b"".join(value.to_bytes(4, "little") for value in (number, num_edge, num_cls))
    return zlib.crc32(record, zlib.crc32(entry, seed))


def unpacked(record: bytes, num_edge: int, num_cls: int, header: CacheHeader) -> ViewRows:
    """Return what a record says; its arrays share the record's memory."""
    location = np.frombuffer(record, "<i4", num_edge + num_cls)
    logits = np.frombuffer(record, np.dtype(header.dtype).newbyteorder("<"), offset=location.nbytes)
    sizes = (num_edge * 4 * header.num_bins, num_cls * len(header.classes))
    edge, cls, quality = np.split(logits, np.cumsum(sizes))
    return ViewRows(
        edge_location=location[:num_edge],
        edge=edge.reshape(num_edge, 4, header.num_bins),
        cls_location=location[num_edge:],
        cls=cls.reshape(num_cls, len(header.classes)),
        quality=quality if header.has_quality else None,
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
    number, num_edge, num_cls, crc = (entries[name].astype(np.int64) for name in ENTRY.names or ())
    sizes = header.record_bytes(1, 0) * num_edge + header.record_bytes(0, 1) * num_cls
    expected = start + int(sizes.sum())
    if size != expected:
        raise _damaged(path, f"{size} bytes instead of {expected}")
    if not np.array_equal(np.sort(number), view_numbers(header)):
        raise _damaged(path, "the index does not name each view once")
    by_view = np.full((4, 2 * header.num_images), -1, dtype=np.int64)
    by_view[:, number] = start + np.cumsum(sizes) - sizes, num_edge, num_cls, crc
    return TeacherCache(path, header, header.seed, *by_view)


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
