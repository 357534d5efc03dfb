"""Memory of the machine: what this process takes at a peak, and what it can still have. Linux tells both."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GroupFiles:
    """What the files of a control group's folder are called.

    Attributes:
        mount: Where the folders of all groups are.
        limit: Bytes that the group may take, or a word where there is no limit.
        taken: Bytes that it takes, cached files included.
        cached: Key in `memory.stat` of the bytes of files that are given back when memory runs short.
    """

    mount: str
    limit: str
    taken: str
    cached: str


# Source: Linux, admin-guide: cgroup-v2 and cgroup-v1/memory
VERSION_1 = GroupFiles("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = GroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def peak_bytes(trial: Callable[[int], None], images: int) -> int:
    """Return by how much a trial raises this process's memory.

    Raises:
        OSError: The system does not say.
    """
    return_free_memory()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew. Source: Linux, proc(5)
    trial(images)
    return max(resident_bytes("VmHWM") - before, 0)


def return_free_memory() -> None:
    """Give what was freed back to the system, as far as the C library can: else a step that takes it again is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def resident_bytes(key: str) -> int:
    """Return what the kernel says of this process's memory: `VmRSS` now, `VmHWM` at most since the peak was reset.

    Raises:
        OSError: It does not say.
    """
    return _number(Path("/proc/self/status"), f"{key}:") * 1024


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process can still have: its part, among the ranks of this machine, of what is free.

    Args:
        root: Where the kernel's files are.

    Raises:
        OSError: The system does not say.
    """
    free = [_number(root / "proc/meminfo", "MemAvailable:") * 1024, *_left_in_groups(root)]
    return max(min(free), 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each limited control group has left in which this process is, from its own to the outermost.

    A container may see its own group as the outermost, while the kernel names it by its path on the machine: folders
    that are not there are passed over.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = VERSION_1 if controllers else VERSION_2
        mount = root / files.mount
        own = mount / name.lstrip("/")
        for folder in (own, *own.parents)[: len(own.parts) - len(mount.parts) + 1]:
            limit = folder / files.limit
            if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
                taken = int((folder / files.taken).read_text())
                yield int(text) - taken + _number(folder / "memory.stat", files.cached)


def _number(path: Path, key: str) -> int:
    """Return the number behind a key in a file of the kernel's, which has one a line.

    Raises:
        OSError: It has no such key.
    """
    for line in path.read_text().splitlines():
        fields = line.split()
        if fields[:1] == [key]:
            return int(fields[1])
    raise OSError(f"{path} has no {key}")
