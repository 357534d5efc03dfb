"""Tests of the memory that a process can still have, on files as the kernel writes them."""

from pathlib import Path

import pytest

from ldctl.memory import VERSION_1, VERSION_2, GroupFiles, available_bytes

UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


def kernel(root: Path, groups: str, available_kb: int = 1000) -> Path:
    """Write what the kernel says of the machine, and in which groups the process is."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable:    {available_kb} kB\nHugePages_Total: 0\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def group(root: Path, files: GroupFiles, name: str, limit: object, taken: int, cached: int = 0) -> None:
    folder = root / files.mount / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.limit).write_text(f"{limit}\n")
    (folder / files.taken).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 7\nactive_file 9\n{files.cached} {cached}\n")


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    assert available_bytes(kernel(tmp_path / "none", "")) == 1024_000
    (tmp_path / "none/proc/self/cgroup").unlink()
    assert available_bytes(tmp_path / "none") == 1024_000
    unlimited = kernel(tmp_path / "unlimited", "0::/a\n")
    group(unlimited, VERSION_2, "a", "max", 500)
    assert available_bytes(unlimited) == 1024_000


def test_cached_files_are_not_taken(tmp_path: Path) -> None:
    root = kernel(tmp_path, "0::/user/job\n")
    group(root, VERSION_2, "user/job", 5000, taken=4500, cached=1500)
    assert available_bytes(root) == 2000


@pytest.mark.parametrize(("outer", "inner", "expected"), [(5000, "max", 4000), (5000, 3000, 2000), (2500, 3000, 1500)])
def test_the_tightest_of_all_groups_around_decides(tmp_path: Path, outer: int, inner: object, expected: int) -> None:
    root = kernel(tmp_path, "0::/user/job/step\n")
    group(root, VERSION_2, "user", outer, taken=1000)
    group(root, VERSION_2, "user/job/step", inner, taken=1000)
    group(root, VERSION_2, "other", 10, taken=9)  # of other processes
    assert available_bytes(root) == expected


def test_version_1(tmp_path: Path) -> None:
    root = kernel(tmp_path, "3:cpu,cpuacct:/job\n2:memory,hugetlb:/job\n1:name=systemd:/job\n0::/\n")
    group(root, VERSION_1, "", UNLIMITED, taken=3000)
    group(root, VERSION_1, "job", 8000, taken=3000, cached=1000)
    assert available_bytes(root) == 6000


def test_a_container_sees_its_own_group_as_the_outermost(tmp_path: Path) -> None:
    root = kernel(tmp_path, "4:memory:/docker/0123\n")
    group(root, VERSION_1, "", 700, taken=600)
    assert available_bytes(root) == 100


def test_ranks_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kernel(tmp_path, "0::/\n")
    group(root, VERSION_2, "", 5000, taken=1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(root) == 1000
    group(root, VERSION_2, "", 500, taken=1000)
    assert available_bytes(root) == 0


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="meminfo"):
        available_bytes(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(OSError, match="has no MemAvailable"):
        available_bytes(tmp_path)
