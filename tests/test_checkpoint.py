"""Weights files and run states: the way there and back, and every damaged or foreign file."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldctl import __version__, checkpoint
from ldctl.checkpoint import CheckpointMeta
from ldctl.errors import CheckpointError, OutputError

META = CheckpointMeta(
    model={"channels": 32, "backbone": {"depth": 18, "width": 0.125}},
    classes=("person", "traffic light"),
    short_side=800,
    long_side=1333,
    spec='seed = 1\nname = "a"\n',
    metrics={"ap": 0.1 + 0.2, "ap_small": -1.0, "ap_large": float("nan")},
    teacher_sha256="0" * 64,
    data_fingerprint="f" * 64,
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "backbone.conv1.weight": torch.randn(4, 3, 7, 7, generator=generator),
        "backbone.bn1.num_batches_tracked": torch.tensor(3),
        "head.scales.0": torch.tensor(1.5),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "strided": torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, tensors(), META)
    return path


def fault(path: Path) -> str:
    """Return what reading the file says; its metadata alone must say the same."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert error.value.exit_code == 5
    return str(error.value)


def test_round_trip(good: Path) -> None:
    read = checkpoint.load(good)
    assert same(read.tensors, tensors())
    assert read.meta.model_dump(exclude={"metrics"}) == META.model_dump(exclude={"metrics"})
    assert repr(read.meta.metrics) == repr(META.metrics)  # NaN too
    assert repr(checkpoint.load_meta(good)) == repr(read.meta)


def test_what_a_file_says_of_itself() -> None:
    assert META.format_version == 1
    assert META.versions.keys() == {"ldctl", "torch", "torchvision"}
    assert META.created.endswith("+00:00")


def test_the_same_weights_give_the_same_bytes(tmp_path: Path, good: Path) -> None:
    checkpoint.save(tmp_path / "again.safetensors", tensors(), META)
    assert checkpoint.sha256(good) == checkpoint.sha256(tmp_path / "again.safetensors")
    assert len(checkpoint.sha256(good)) == 64


def test_state_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    values = {
        "step": 12,
        "rng": [1, 2**63],
        "lr": 0.1 + 0.2,
        "nested": {"name": "a", "none": None, "inf": float("inf")},
    }
    infinite = tensors() | {"moment": torch.tensor(float("inf"))}
    checkpoint.save_state(path, infinite, values)
    read = checkpoint.load_state(path)
    assert same(read.tensors, infinite)
    assert read.values == values


def test_nothing_else_is_left_in_the_folder(good: Path) -> None:
    checkpoint.save(good, tensors(), META)
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_folders_are_made_and_permissions_are_the_usual(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "r50" / "last.safetensors"
    checkpoint.save(path, tensors(), META)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failed_write_keeps_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    before = good.read_bytes()
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError) as error:
        checkpoint.save(good, {"other": torch.ones(5)}, META)
    assert str(error.value) == (
        f"{good}: cannot be written ({os.strerror(code)}): free some space or choose another place"
    )
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_an_interrupt_keeps_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = good.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(good, {"other": torch.ones(5)}, META)
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_a_disk_that_fills_up(good: Path) -> None:
    """The operating system cuts the write short, as a full disk does."""
    before = good.read_bytes()
    code = f"""
import resource, torch
from pathlib import Path
from ldctl import checkpoint, errors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path({str(good)!r})
try:
    checkpoint.save(path, {{"a": torch.zeros(100_000)}}, checkpoint.load_meta(path))
except errors.OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == f"{good}: cannot be written (File too large): free some space or choose another place\n"
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def environment() -> dict[str, str]:
    """Return an environment in which a child finds the package of this checkout."""
    return os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}


def test_a_path_that_is_a_folder_or_lies_in_a_file(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, reason in ((folder, "Is a directory"), (good / "inside.safetensors", "File exists")):
        with pytest.raises(OutputError) as error:
            checkpoint.save(path, tensors(), META)
        assert str(error.value) == f"{path}: cannot be written ({reason}): free some space or choose another place"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [good.name, "folder"]


MAKE_ONE = "make one with `ldctl teacher train` or `ldctl teacher import`"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bset.safetensors", "did you mean best.safetensors? Or"),
        ("best.pth", "did you mean best.safetensors? Or"),
        ("other.safetensors", "check the path, or"),  # a like suffix is no likeness
    ],
)
def test_no_such_file(good: Path, name: str, hint: str) -> None:
    path = good.parent / name
    assert fault(path) == f"{path}: no such file: {hint} {MAKE_ONE}"
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.sha256(path)


def test_no_such_file_in_a_folder_without_any(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    assert fault(path) == f"{path}: no such file: check the path, or {MAKE_ONE}"


def test_no_such_folder(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "best.safetensors"
    assert fault(path) == f"{path}: no such file, and no folder {tmp_path / 'runs'}: check the path"


def test_a_folder(tmp_path: Path) -> None:
    assert fault(tmp_path) == f"{tmp_path}: a folder, not a weights file: pass a file in it, as best.safetensors"


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_of_pytorch(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "gfl.pth"
    torch.save({"state_dict": tensors()}, path, _use_new_zipfile_serialization=is_zip)
    assert fault(path) == (
        f"{path}: a PyTorch file, not safetensors: convert it with `ldctl teacher import {path} -o NEW.safetensors`"
    )


@pytest.mark.parametrize("content", [b"x" * 500, b"\x10" + bytes(7) + b"not json or anything"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    assert fault(path) == f"{path}: not a safetensors file: pass a file that `ldctl` wrote"


AGAIN = "take another copy of the file"


def test_truncated_anywhere(good: Path) -> None:
    content = good.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 8, 9, header - 1, header, len(content) - 1):
        good.write_bytes(content[:size])
        if size < 9:
            message = f"truncated ({size} bytes)"
        elif size < header:
            message = f"truncated ({size} bytes, the header ends at {header})"
        else:
            message = f"truncated ({size} bytes of {len(content)})"
        assert fault(good) == f"{good}: {message}: {AGAIN}"


def test_longer_than_it_should_be(good: Path) -> None:
    size = good.stat().st_size
    good.write_bytes(good.read_bytes() + b"more")
    assert fault(good) == f"{good}: damaged ({size + 4} bytes of {size}): {AGAIN}"


@pytest.mark.parametrize(("old", "new"), [(b'"dtype"', b'"dtype '), (b'"data_offsets"', b'"data_offsetz"')])
def test_damaged_header(good: Path, old: bytes, new: bytes) -> None:
    good.write_bytes(good.read_bytes().replace(old, new))
    assert fault(good) == f"{good}: damaged header: {AGAIN}"


def test_a_header_that_contradicts_itself(good: Path) -> None:
    good.write_bytes(good.read_bytes().replace(b'"shape":[4,3,7,7]', b'"shape":[4,3,7,6]'))
    assert fault(good).startswith(f"{good}: damaged (")
    assert "\n" not in fault(good)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path, metadata)
    assert fault(path) == f"{path}: no metadata of ldctl, as other tools' files: pass a file that `ldctl` wrote"


def test_a_state_is_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"weight": torch.ones(2)}, {})
    assert fault(path) == (f"{path}: a run's saved state, which only --resume reads: pass best.safetensors beside it")


def test_weights_are_not_a_state(good: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_state(good)
    assert str(error.value) == f"{good}: not the state of a run: pass the file that the run wrote"


def test_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"ldctl": json.dumps({"format_version": 2, "unheard": "of"})})
    assert fault(path) == f"{path}: format 2 is newer than 1, which this ldctl {__version__} reads: update ldctl"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "(no format version)"),
        ("[1]", "(no format version)"),
        ('{"format_version": 1}', "at model (Field required)"),
    ],
)
def test_damaged_metadata(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"ldctl": text})
    assert fault(path) == f"{path}: damaged metadata {place}: {AGAIN}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    path = tmp_path / "diverged.safetensors"
    checkpoint.save(path, {"a": torch.ones(2), "b": torch.tensor([0.0, value])}, META)
    assert fault(path) == (
        f"{path}: NaN or infinite weights in 1 of 2 entries, first in b: training had diverged; use an earlier file"
    )
    assert checkpoint.load_meta(path).classes == META.classes


def test_fit_lists_everything() -> None:
    given = {"a": torch.zeros(2), "odd": torch.zeros(()), "c": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.fit(given, {"a": (2,), "b": (4, 1), "c": (3, 2)}, Path("x.safetensors"))
    assert str(error.value) == (
        "x.safetensors: 3 entries do not fit the detector; use the model that the weights are of\n"
        "missing: b [4, 1]\n"
        "unexpected: odd []\n"
        "shape: c is [2, 3], the detector's is [3, 2]"
    )
    checkpoint.fit(given, {"a": (2,), "odd": (), "c": (2, 3)}, Path("x.safetensors"))


def test_a_file_that_may_not_be_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    message = f"{good}: cannot be read (Permission denied): check its permissions"
    assert fault(good) == message
    with pytest.raises(CheckpointError) as error:
        checkpoint.sha256(good)
    assert str(error.value) == message
