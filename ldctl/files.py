"""Files that are written whole or not at all."""

import contextlib
import errno
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


def move_to_new(source: Path, target: Path) -> None:
    """Move a file to a name in its folder that nothing has yet; what came there in the meantime is not replaced.

    Raises:
        FileExistsError: Something is there.
        OSError: The file cannot be moved.
    """
    try:
        target.hardlink_to(source)  # unlike a rename, it never replaces anything
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        source.rename(target)
    else:
        source.unlink()
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut."""
    with contextlib.suppress(OSError):  # not every file system can; the file itself is on the disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
