"""The file of a cached teacher: what goes in comes out, whatever kills the writer, and nothing else ever does."""

import errno
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import runs

import ldctl.files
from ldctl.data import cache_writer
from ldctl.data.cache_writer import CacheWriter, partial_path
from ldctl.data.teacher_cache import CacheHeader, TeacherCache, ViewRows, open_cache
from ldctl.errors import CheckpointError, OutputError
from ldctl.locks import is_locked

NUM_IMAGES, BINS, CLASSES, LOCATIONS = 7, 5, ("a", "b", "c"), 100
PLAN = [[0, 1, 4], [5, 8, 9], [12, 13], [2, 3, 6], [7, 10, 11]]  # two canvases, the first with a smaller last batch
DAMAGED = "take another copy of the file, or build it again with `ldctl teacher cache`"


def header(**values: object) -> CacheHeader:
    known: dict[str, object] = {
        "teacher_sha256": "1" * 64,
        "model": {"channels": 32},
        "classes": CLASSES,
        "metrics": {"ap": 0.5, "ap_large": float("nan")},
        "metrics_fingerprint": None,
        "train_fingerprint": "2" * 64,
        "num_images": NUM_IMAGES,
        "flips": (False, True),
        "short_side": 64,
        "long_side": 96,
        "scaled_jpeg": False,
        "assignment": "atss",
        "edge_regions": ("main", "vlr"),
        "cls_regions": ("main",),
        "vlr": "diou",
        "gamma": 0.25,
        "dtype": "float32",
        "num_bins": BINS,
        "has_quality": False,
        "location_offset": 0.0,
        "num_locations": LOCATIONS,
        "batch": 3,
        "bf16": False,
        "versions": {},
    }
    return CacheHeader.model_validate(known | values)


def said_of(number: int, head: CacheHeader) -> ViewRows:
    """Something of every size, nothing included, that only the number of the view decides."""
    rng = np.random.default_rng(number)
    num_edge, num_cls = rng.integers(0, 9, 2) if number % 3 else (0, 0)
    dtype = np.dtype(head.dtype)

    def places(count: int) -> np.ndarray:
        return np.sort(rng.choice(LOCATIONS, count, replace=False)).astype(np.int32)

    return ViewRows(
        edge_location=places(num_edge),
        edge=rng.normal(size=(num_edge, 4, BINS)).astype(dtype),
        cls_location=places(num_cls),
        cls=rng.normal(size=(num_cls, len(CLASSES))).astype(dtype),
        quality=rng.normal(size=num_cls).astype(dtype) if head.has_quality else None,
    )


def write(target: Path, head: CacheHeader, plan: list[list[int]] = PLAN, *, pause: float = 0.0) -> None:
    writer = CacheWriter(target, head, plan)
    for batch in plan[writer.num_done :]:
        writer.append([said_of(number, head) for number in batch])
        time.sleep(pause)
    writer.finish()
    writer.close()


def numbers(plan: list[list[int]]) -> list[int]:
    return sorted(number for batch in plan for number in batch)


def check(cache: TeacherCache, plan: list[list[int]] = PLAN) -> None:
    """Compare all that a cache says with what was written."""
    for number in numbers(plan):
        found, expected = cache.view(number // 2, bool(number % 2)), said_of(number, cache.header)
        for name, value in vars(expected).items():
            if value is None:
                assert getattr(found, name) is None
            else:
                assert getattr(found, name).dtype == value.dtype
                np.testing.assert_array_equal(getattr(found, name), value)


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    write(tmp_path / "t.cache", header())
    return tmp_path / "t.cache"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("has_quality", [False, True])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: str, has_quality: bool) -> None:
    head = header(dtype=dtype, has_quality=has_quality)
    write(tmp_path / "t.cache", head)
    assert [path.name for path in tmp_path.iterdir()] == ["t.cache"]
    cache = open_cache(tmp_path / "t.cache")
    check(cache)
    check(pickle.loads(pickle.dumps(cache)))  # as it travels to a worker
    said = cache.header.model_dump(exclude={"index_sha256", "metrics"})
    assert said == head.model_dump(exclude={"index_sha256", "metrics"})
    assert repr(cache.header.metrics) == repr(head.metrics)


def test_one_view_of_each_image(tmp_path: Path) -> None:
    plan = [[1, 3, 5], [7, 9, 11], [13]]
    write(tmp_path / "t.cache", header(flips=(True,)), plan)
    check(open_cache(tmp_path / "t.cache"), plan)


def test_bytes_of_a_view_as_computed_by_hand() -> None:
    """COCO, 80 classes, 17 bins, float16: 4 bytes for a place, 2 for each of 68 or 80 numbers."""
    classes = tuple(map(str, range(80)))
    head = header(classes=classes, num_bins=17, dtype="float16")
    assert head.record_bytes(300, 60) == 300 * (4 + 2 * 68) + 60 * (4 + 2 * 80)
    with_quality = header(classes=classes, num_bins=17, dtype="float32", has_quality=True)
    assert with_quality.record_bytes(1, 1) == 4 + 4 * 68 + 4 + 4 * 81


def test_the_file_is_as_documented(cache_file: Path) -> None:
    """Read with nothing but the table at the top of the module."""
    content = cache_file.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    index = np.frombuffer(content, "<u4", 4 * 14, offset=48 + length).reshape(14, 4)
    assert index[:, 0].tolist() == [number for batch in PLAN for number in batch]
    at = 48 + length + 16 * 14
    for number, num_edge, num_cls, _ in index.tolist():
        expected = said_of(number, header())
        assert np.frombuffer(content, "<i4", num_edge, at).tolist() == expected.edge_location.tolist()
        assert np.frombuffer(content, "<i4", num_cls, at + 4 * num_edge).tolist() == expected.cls_location.tolist()
        at += 4 * (num_edge + num_cls)
        edge = np.frombuffer(content, "<f4", num_edge * 4 * BINS, at)
        np.testing.assert_array_equal(edge, expected.edge.ravel())
        at += 4 * (num_edge * 4 * BINS + num_cls * len(CLASSES))
    assert at == len(content)


# --- several goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(len(PLAN) + 1))
def test_a_cache_in_two_goes_is_the_same_file(cache_file: Path, tmp_path: Path, done: int) -> None:
    target = tmp_path / "parts.cache"
    first = CacheWriter(target, header(), PLAN)
    for batch in PLAN[:done]:
        first.append([said_of(number, header()) for number in batch])
    first.close()
    assert not target.exists()
    second = CacheWriter(target, header(), PLAN)
    assert second.num_done == done
    second.close()
    write(target, header())
    assert target.read_bytes() == cache_file.read_bytes()
    assert not partial_path(target).exists()


def test_whatever_a_killed_writer_left_is_kept_or_written_again(cache_file: Path, tmp_path: Path) -> None:
    """A kill may leave any part of the next writes; a power cut also pages of zeros."""
    whole = cache_file.read_bytes()
    target = tmp_path / "cut.cache"
    head = header().packed()
    rng = random.Random(0)
    for trial in range(150):
        content = bytearray(whole)
        content[: len(head)] = head  # the header of an unfinished file
        cut = rng.randrange(len(content) + 1)
        if trial % 3 == 0:
            content = content[:cut]
        elif trial % 3 == 1:
            content[cut : cut + 64] = bytes(len(content[cut : cut + 64]))
        else:
            content[cut:] = rng.randbytes(len(content) - cut)
        if not content.startswith(head[:8]):
            continue  # no file of ours
        partial_path(target).write_bytes(content)
        write(target, header())
        assert target.read_bytes() == whole
        target.unlink()


def test_a_header_that_was_being_finished_loses_nothing(cache_file: Path, tmp_path: Path) -> None:
    whole = cache_file.read_bytes()
    target, head = tmp_path / "cut.cache", header().packed()
    for cut in range(0, len(head) + 1, 37):
        target.unlink(missing_ok=True)
        partial_path(target).write_bytes(whole[:cut] + head[cut:] + whole[len(head) :])
        writer = CacheWriter(target, header(), PLAN)
        assert writer.num_done == len(PLAN)
        writer.finish()
        writer.close()
        assert target.read_bytes() == whole


def test_killed_at_any_moment(cache_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "killed.cache"
    rng = random.Random(1)
    kills = 0
    while not target.exists():
        process = runs.start(lambda: write(target, header(), pause=0.004))
        time.sleep(rng.uniform(0.01, 0.04))
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert kills < 200
    assert kills
    assert target.read_bytes() == cache_file.read_bytes()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_half_a_cache_of_something_else_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "t.cache"
    first = CacheWriter(target, header(), PLAN)
    first.append([said_of(number, header()) for number in PLAN[0]])
    first.close()
    before = partial_path(target).read_bytes()
    with pytest.raises(OutputError) as caught:
        CacheWriter(target, header(teacher_sha256="3" * 64, vlr="reference"), PLAN)
    assert str(caught.value) == (
        f"{target}.partial: half a cache of something else (other teacher_sha256, vlr): finish it by the command that "
        "began it, delete it, or pass another --output"
    )
    assert partial_path(target).read_bytes() == before


def test_another_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "t.cache"
    partial_path(target).write_text("a user's own work")
    with pytest.raises(OutputError) as caught:
        CacheWriter(target, header(), PLAN)
    assert str(caught.value) == (
        f"{target}.partial: exists and holds something else: move it away, or pass another --output"
    )
    assert partial_path(target).read_text() == "a user's own work"


def test_two_writers(tmp_path: Path) -> None:
    target = tmp_path / "t.cache"
    writer = CacheWriter(target, header(), PLAN)

    def another() -> None:
        with pytest.raises(OutputError, match="another ldctl is writing here: wait for it, or pass another --output"):
            CacheWriter(target, header(), PLAN)

    process = runs.start(another)
    process.join(60)
    assert process.exitcode == 0
    writer.close()


@pytest.mark.parametrize("place", ["t.cache", "moved.cache"])
def test_a_file_that_is_finished_between_opening_and_locking_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The second writer has the first one's file open, and then locks what has become the finished cache."""
    target = tmp_path / "t.cache"

    def finished_meanwhile(handle: int) -> bool:
        monkeypatch.undo()
        process = runs.start(write, target, header())
        process.join(60)
        assert process.exitcode == 0
        target.rename(tmp_path / place)
        return is_locked(handle)

    monkeypatch.setattr(cache_writer, "is_locked", finished_meanwhile)
    with pytest.raises(OutputError) as caught:
        CacheWriter(target, header(), PLAN)
    assert str(caught.value) == f"{target}: another ldctl has just finished it: use it, or pass another --output"
    check(open_cache(tmp_path / place))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_target_that_came_meanwhile_is_not_replaced(
    cache_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    target = tmp_path / "u.cache"
    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    writer = CacheWriter(target, header(), PLAN)
    for batch in PLAN:
        writer.append([said_of(number, header()) for number in batch])
    target.write_text("a user's own work")
    with pytest.raises(OutputError) as caught:
        writer.finish()
    writer.close()
    assert str(caught.value) == f"{target}: exists by now: move it away and repeat the command"
    assert target.read_text() == "a user's own work"
    target.unlink()
    again = CacheWriter(target, header(), PLAN)
    assert again.num_done == len(PLAN)
    synced: list[Path] = []
    monkeypatch.setattr(ldctl.files, "_sync_folder", synced.append)
    again.finish()
    assert synced == [tmp_path]
    again.close()
    assert target.read_bytes() == cache_file.read_bytes()
    assert not partial_path(target).exists()


def refuse_links(*_: Path) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "t.cache"
    writer = CacheWriter(target, header(), PLAN)
    writer.append([said_of(number, header()) for number in PLAN[0]])
    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda handle, content, offset: os.write(full, content))
        with pytest.raises(OutputError) as caught:
            writer.append([said_of(number, header()) for number in PLAN[1]])
    assert str(caught.value) == (
        f"{target}.partial: cannot be written (No space left on device): free some space and repeat the command, which "
        "goes on, or pass another --output"
    )
    writer.close()
    again = CacheWriter(target, header(), PLAN)
    assert again.num_done == 1
    again.close()


def every_view(path: Path) -> None:
    cache = open_cache(path)
    for number in numbers(PLAN):
        cache.view(number // 2, bool(number % 2))


def damages(content: bytes) -> Iterator[bytes]:
    rng = random.Random(2)
    for _ in range(300):
        at, changed = rng.randrange(len(content)), bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        yield bytes(changed)
    for _ in range(100):
        yield content[: rng.randrange(len(content))]
    for _ in range(50):
        start = rng.randrange(len(content))
        yield content[:start] + rng.randbytes(rng.randrange(1, 200)) + content[start:]
        yield content[:start] + content[start + rng.randrange(1, 200) :]


def test_no_damage_goes_unseen(cache_file: Path, tmp_path: Path) -> None:
    """A flipped bit, an end cut off, bytes put in or taken out: refused in one line, always."""
    path = tmp_path / "damaged.cache"
    for content in damages(cache_file.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            every_view(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_what_a_header_promises_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    path.write_bytes(header(num_images=2**31 - 1, index_sha256="0" * 63 + "1").packed())
    with pytest.raises(CheckpointError) as caught:
        open_cache(path)
    assert str(caught.value) == f"{path}: damaged (the index is not what was written): {DAMAGED}"
    path.write_bytes(header().packed()[:8] + (2**63).to_bytes(8, "little") + bytes(32))
    with pytest.raises(CheckpointError) as caught:
        open_cache(path)
    assert str(caught.value) == f"{path}: damaged (the header is not what was written): {DAMAGED}"


def test_messages(cache_file: Path, tmp_path: Path) -> None:
    def refusal(content: bytes) -> str:
        path = tmp_path / "x.cache"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            every_view(path)
        return str(caught.value).removeprefix(f"{path}: ")

    whole = cache_file.read_bytes()
    foreign = "not a teacher's cache: pass a file that `ldctl teacher cache` wrote"
    assert refusal(b"") == foreign
    assert refusal(b"PK\x03\x04 and so on") == foreign
    assert refusal(whole[:7] + b"\x02" + whole[8:]) == "of a newer format than this ldctl reads: update ldctl"
    assert refusal(header().packed() + bytes(16 * 14)) == (
        "only half built: repeat the `ldctl teacher cache` that began it"
    )
    size = len(whole)
    assert refusal(whole[:-1]) == f"damaged ({size - 1} bytes instead of {size}): {DAMAGED}"
    assert refusal(whole[:-1] + b"\x99") == (
        f"damaged (what it says of image 5 of the data set is not what was written): {DAMAGED}"
    )
    with pytest.raises(CheckpointError) as caught:
        open_cache(tmp_path / "none.cache")
    assert str(caught.value) == f"{tmp_path}/none.cache: no such file: make one with `ldctl teacher cache`"
    with pytest.raises(CheckpointError) as caught:
        open_cache(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory): check the path and its permissions"


def test_a_file_that_shrinks_or_goes_while_it_is_read(cache_file: Path) -> None:
    cache = open_cache(cache_file)
    os.truncate(cache_file, cache_file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cannot be read any more \(.*\): put it back"):
        check(cache)
    cache_file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read any more \(No such file or directory\): put it back"):
        check(cache)


def test_a_file_that_is_cut_between_opening_and_reading(cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is mapped into memory, the system would end the process."""
    cache = open_cache(cache_file)
    original = Path.open

    def cut_once_open(path: Path, *arguments: str) -> IO[bytes]:
        file = original(path, *arguments)
        os.truncate(path, cache_file.stat().st_size // 2)
        return file

    monkeypatch.setattr(Path, "open", cut_once_open)
    with pytest.raises(CheckpointError) as caught:
        cache.view(5, True)
    assert str(caught.value) == f"{cache_file}: cannot be read any more (it was cut): put it back"
