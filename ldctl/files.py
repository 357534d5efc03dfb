"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

from ldctl.errors import OutputError


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: whatever happens, the old file is there or the new one.

    Args:
        path: Missing folders are made.
        content: Of the whole file.

    Raises:
        OutputError: The place cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"{path}: cannot be written ({reason}): free some space or choose another place") from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut."""
    with contextlib.suppress(OSError):  # not every file system can; the file itself is on the disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
