"""Keep two processes from writing to one file."""

import errno
import sys

if sys.platform != "win32":
    import fcntl


def is_locked(handle: int) -> bool:
    """Lock an open file for this process until it ends or closes the file; return whether another one has done so.

    Where locks are not to be had, as on some network file systems, nothing is locked and nothing is said.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False
