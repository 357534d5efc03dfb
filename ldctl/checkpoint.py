"""Weights files and run states: safetensors with one JSON string, written whole or not at all, never a pickle."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldctl import __version__
from ldctl.errors import CheckpointError, OutputError
from ldctl.files import write_whole
from ldctl.keys import key_faults
from ldctl.preset_files import preset_training
from ldctl.schema import Spec

FORMAT_VERSION = 1
META_KEY = "ldctl"  # weights; of the strings in a safetensors header
STATE_KEY = "ldctl-state"  # a run's state
IS_STATE = "a run's saved state, which only --resume reads: pass best.safetensors beside it"
MAX_HEADER = 100_000_000  # bytes. Source: the safetensors format
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages on which the content of a file depends."""
    return {"ldctl": __version__} | {name: version(name) for name in ("torch", "torchvision")}


class CheckpointMeta(Spec):
    """Everything, but for the weights, that it takes to use a weights file.

    Attributes:
        format_version: Of this metadata.
        model: The detector's spec as a JSON object.
        classes: Class names; a label indexes them.
        short_side: Pixels that the shorter side of an image is resized to.
        long_side: Most pixels of the longer side.
        spec: Text of the resolved run spec; empty for imported weights.
        metrics: Figures of the evaluation that chose these weights.
        versions: Of the packages that wrote the file.
        teacher_sha256: SHA-256 of the teacher's file; None without one.
        data_fingerprint: Of the images to train and to evaluate on; None for imported weights.
        val_fingerprint: Of those that `metrics` are of; None for imported weights.
        created: Time, ISO 8601, UTC.
    """

    # a figure may be NaN, and must not come back as null
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    format_version: int = FORMAT_VERSION
    model: dict[str, Any]
    classes: tuple[str, ...]
    short_side: int
    long_side: int
    spec: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=package_versions)
    teacher_sha256: str | None = None
    data_fingerprint: str | None = None
    val_fingerprint: str | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Checkpoint:
    """A weights file in memory.

    Attributes:
        tensors: Weights by name, on the CPU.
        meta: What they are of.
    """

    tensors: dict[str, Tensor]
    meta: CheckpointMeta


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, but for the weights file.

    Attributes:
        tensors: By name, on the CPU.
        values: A JSON object.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save(path: Path, tensors: Mapping[str, Tensor], meta: CheckpointMeta) -> None:
    """Write a weights file; whatever happens, `path` holds the old file or the new one.

    Raises:
        OutputError: The place cannot be written to, or the disk is full.
    """
    _write(path, tensors, {META_KEY: meta.model_dump_json()})


def save_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write the state of a run, in the same way.

    Args:
        path: The file.
        tensors: By name.
        values: A JSON object; floats come back bit for bit.

    Raises:
        OutputError: The place cannot be written to, or the disk is full.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, "values": dict(values)})
    _write(path, tensors, {STATE_KEY: text})


def load(path: Path) -> Checkpoint:
    """Read a weights file.

    Raises:
        CheckpointError: The file is missing, damaged or foreign, or holds weights that are not finite.
    """
    meta = load_meta(path)
    tensors = _read_tensors(path)
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(broken)} of {len(tensors)} entries, first in {broken[0]}: "
            "training had diverged; use an earlier file"
        )
    return Checkpoint(tensors, meta)


def load_meta(path: Path) -> CheckpointMeta:
    """Read what a weights file is of, without its weights.

    Raises:
        CheckpointError: The file is missing, damaged or foreign.
    """
    text = _read_text(
        path, META_KEY, other="no metadata of ldctl, as other tools' files: pass a file that `ldctl` wrote"
    )
    try:
        return CheckpointMeta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "(top)"
        raise CheckpointError(
            f"{path}: damaged metadata at {place} ({first['msg']}): take another copy of the file"
        ) from error


def is_ours(path: Path) -> bool:
    """Return whether a file is a checkpoint that this ldctl can read."""
    try:
        load_meta(path)
    except CheckpointError:
        return False
    return True


def load_state(path: Path) -> RunState:
    """Read the state of a run.

    Raises:
        CheckpointError: The file is missing, damaged or foreign.
    """
    text = _read_text(path, STATE_KEY, other="not the state of a run: pass the file that the run wrote")
    return RunState(_read_tensors(path), json.loads(text)["values"])


def fit(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Make sure that the weights are exactly those of a detector.

    Args:
        tensors: Weights by name.
        expected: Shapes by name.
        path: Where the weights came from.

    Raises:
        CheckpointError: Entries are missing, unexpected or of another shape; the first are listed, one a line.
    """
    verdict = "do not fit the detector; use the model that the weights are of"
    faults = key_faults({name: value.shape for name, value in tensors.items()}, expected, "the detector's", verdict)
    if faults:
        raise CheckpointError(f"{path}: {faults}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    _check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def check_new(path: Path) -> None:
    """Refuse to overwrite a file.

    Raises:
        OutputError: It exists.
    """
    if path.exists():
        raise OutputError(f"{path}: exists already: pass another --output")


def _write(path: Path, tensors: Mapping[str, Tensor], texts: dict[str, str]) -> None:
    # Packing in memory keeps every system call in sight; no weights file here is large against memory.
    packed = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, texts)
    write_whole(path, packed)


def _read_text(path: Path, key: str, *, other: str) -> str:
    """Return one of our strings from a file's header, of a version that we can read."""
    texts = _read_header(path).get("__metadata__", {})
    text = texts.get(key)
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: {IS_STATE if STATE_KEY in texts else other}")
    try:
        found = json.loads(text)["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged metadata (no format version): take another copy of the file") from error
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {found} is newer than {FORMAT_VERSION}, which this ldctl {__version__} reads: update ldctl"
        )
    return text


def _read_header(path: Path) -> dict[str, Any]:
    """Parse a safetensors header, and tell apart the ways in which a file can be something else."""
    _check_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    if start.startswith(PICKLE_STARTS):
        raise CheckpointError(
            f"{path}: a PyTorch file, not safetensors: convert it with `ldctl teacher import {path} -o NEW.safetensors`"
        )
    if size < 9:
        raise CheckpointError(f"{path}: truncated ({size} bytes): take another copy of the file")
    if start[8:] != b"{" or length > MAX_HEADER:
        raise CheckpointError(f"{path}: not a safetensors file: pass a file that `ldctl` wrote")
    if size < 8 + length:
        raise CheckpointError(
            f"{path}: truncated ({size} bytes, the header ends at {8 + length}): take another copy of the file"
        )
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: take another copy of the file") from error
    if size != 8 + length + end:
        fault = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(f"{path}: {fault} ({size} bytes of {8 + length + end}): take another copy of the file")
    return dict(header)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file whose header is sound."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.as_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): take another copy of the file") from error


def _check_file(path: Path) -> None:
    """Refuse what is no file, and say what may have been meant."""
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a weights file: pass a file in it, as best.safetensors")
    if path.exists():
        return
    if not path.parent.is_dir() and (preset := preset_training(path.parent)):
        raise CheckpointError(
            f"{path}: no such file: train it first with `ldctl teacher train --preset {preset}`, or pass another file "
            "(`ldctl distill --teacher FILE`)"
        )
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: no such file, and no folder {path.parent}: check the path")
    found = {entry.stem: entry.name for entry in path.parent.iterdir() if entry.suffix in (".safetensors", ".pth")}
    similar = [found[stem] for stem in difflib.get_close_matches(path.stem, found)]
    hint = f"did you mean {' or '.join(similar)}? Or" if similar else "check the path, or"
    raise CheckpointError(f"{path}: no such file: {hint} make one with `ldctl teacher train` or `ldctl teacher import`")
