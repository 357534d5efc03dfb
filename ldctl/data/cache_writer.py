"""Build a teacher's cache, in one go or in several."""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldctl.data.teacher_cache import (
    ENTRY,
    MAGIC,
    MAX_HEADER,
    CacheHeader,
    ViewRows,
    entry_crc,
    read_header,
    view_numbers,
)
from ldctl.errors import CheckpointError, OutputError
from ldctl.files import move_to_new
from ldctl.locks import is_locked


def partial_path(target: Path) -> Path:
    """Return where a cache is built before it is moved to its place."""
    return target.with_name(f"{target.name}.partial")


class CacheWriter:
    """Builds a cache beside its final place; killed at any moment, the next one goes on where it was.

    Views are written in a fixed order, their records before their entries of the index, and what is there is checked
    before it is kept: a cache that was built in several goes is the same, byte for byte.

    Attributes:
        num_done: Batches of the plan that are written.
        num_bytes: Size of the file so far.
    """

    def __init__(self, target: Path, header: CacheHeader, plan: Sequence[Sequence[int]]) -> None:
        """Open or go on with `TARGET.partial`.

        Args:
            target: The final place.
            header: Without the index's hash.
            plan: The numbers of the views of each batch; each view once.

        Raises:
            OutputError: The file cannot be written; another process is writing it, or has just finished; it is half a
                cache of something else, or no cache.
        """
        self._target, self._header = target, header
        self._path = partial_path(target)
        self._views = np.array([number for batch in plan for number in batch], dtype=np.int64)
        assert np.array_equal(np.sort(self._views), view_numbers(header)), "each view once"
        self._ends = np.cumsum([len(batch) for batch in plan])
        self._index = np.zeros(len(self._views), ENTRY)
        self._head = header.packed()
        self._seed = zlib.crc32(self._head)
        self._start = len(self._head) + self._index.nbytes
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if is_locked(self._handle):
                raise OutputError(f"{self._path}: another ldctl is writing here: wait for it, or pass another --output")
            # who had the lock before may have moved the file to its place since it was opened here
            if target.exists() or not _is_at(self._path, self._handle):
                raise OutputError(f"{target}: another ldctl has just finished it: use it, or pass another --output")
            self._claim()
            self.num_done = self._count_done()
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except OutputError:
            self.close()
            raise

    def append(self, batch: Sequence[ViewRows]) -> None:
        """Write the next batch of the plan.

        Raises:
            OutputError: The disk is full, or the file cannot be written; what was there before is intact.
        """
        first = int(self._ends[self.num_done - 1]) if self.num_done else 0
        entries = self._index[first : int(self._ends[self.num_done])]
        records = [rows.packed() for rows in batch]
        for slot, (rows, record) in enumerate(zip(batch, records, strict=True)):
            entry = int(self._views[first + slot]), len(rows.edge_location), len(rows.cls_location)
            entries[slot] = (*entry, entry_crc(self._seed, *entry, record))
        try:
            _write_at(self._handle, b"".join(records), self.num_bytes)
            _write_at(self._handle, entries.tobytes(), len(self._head) + first * ENTRY.itemsize)
        except OSError as error:
            raise self._unwritable(error) from error
        self.num_bytes += sum(map(len, records))
        self.num_done += 1

    def finish(self) -> None:
        """Write the header that says that all is there, and move the file to its place.

        Raises:
            OutputError: The file cannot be written, or its place was taken since; what was written is kept.
        """
        assert self.num_done == len(self._ends), "all batches are written"
        digest = hashlib.sha256(self._index.tobytes()).hexdigest()
        try:
            os.fsync(self._handle)
            _write_at(self._handle, self._header.model_copy(update={"index_sha256": digest}).packed(), 0)
            os.fsync(self._handle)
            move_to_new(self._path, self._target)
        except FileExistsError as error:
            raise OutputError(f"{self._target}: exists by now: move it away and repeat the command") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file; what is not finished can be gone on with."""
        os.close(self._handle)

    def _claim(self) -> None:
        """Begin a new file, unless ours is there."""
        found = os.pread(self._handle, MAX_HEADER, 0)
        if found and not MAGIC.startswith(found[: len(MAGIC)]):
            raise OutputError(f"{self._path}: exists and holds something else: move it away, or pass another --output")
        with contextlib.suppress(CheckpointError):  # the header was being written: the index tells whose records follow
            other, _ = read_header(found, self._path)
            left_out = {"index_sha256", "metrics"}  # not known yet; as the teacher's file says, and maybe NaN
            wanted, there = (one.model_dump(exclude=left_out) for one in (self._header, other))
            if differs := [key for key, value in wanted.items() if there[key] != value]:
                raise OutputError(
                    f"{self._path}: half a cache of something else (other {', '.join(differs)}): finish it by the "
                    "command that began it, delete it, or pass another --output"
                )
        _write_at(self._handle, self._head, 0)

    def _count_done(self) -> int:
        """Find the batches that a former process left whole, cut off what is behind them, and return how many."""
        size = os.fstat(self._handle).st_size
        entries = np.zeros_like(self._index)
        there = np.frombuffer(os.pread(self._handle, entries.nbytes, len(self._head)), np.uint8)
        entries.view(np.uint8)[: len(there)] = there
        ends = [self._start]
        for number, (found, num_edge, num_cls, crc) in zip(self._views.tolist(), entries.tolist(), strict=True):
            length = self._header.record_bytes(num_edge, num_cls)
            if found != number or ends[-1] + length > size:
                break
            record = os.pread(self._handle, length, ends[-1])
            if entry_crc(self._seed, number, num_edge, num_cls, record) != crc:
                break
            ends.append(ends[-1] + length)
        num_done = int(np.searchsorted(self._ends, len(ends) - 1, side="right"))
        kept = int(self._ends[num_done - 1]) if num_done else 0
        self._index[:kept] = entries[:kept]
        self.num_bytes = ends[kept]
        os.ftruncate(self._handle, self.num_bytes)
        return num_done

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._path}: cannot be written ({error.strerror}): free some space and repeat the command, which goes "
            "on, or pass another --output"
        )


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _write_at(handle: int, content: bytes, offset: int) -> None:
    """Write all of the content at a place of a file."""
    view = memoryview(content)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
