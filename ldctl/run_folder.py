"""The folder of a run: taken once, and continued only by the spec that it was started with."""

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ldctl import distributed, toml
from ldctl.errors import OutputError, SpecError
from ldctl.files import write_whole
from ldctl.locks import is_locked
from ldctl.spec import RunSpec, TrainSpec
from ldctl.toml_text import literal

S = TypeVar("S", bound=RunSpec)

SPEC_FILE = "spec.toml"
HEADER = "# The resolved spec of this run, written by ldctl.\n\n"
FAULTS_FILE = "data_faults.txt"
LOCK_FILE = ".lock"
# All that a run leaves that failed before it computed anything.
START_FILES = {SPEC_FILE, FAULTS_FILE, LOCK_FILE}
SHOWN_KEYS = 10
# What a resumed run may change: nothing of what it learns from. Another number of micro-batches rounds differently.
RESUMABLE = (
    "device",
    "output",
    "data.path",
    "data.unlabelled",
    "data.workers",
    "teacher.cache",
    "train.accumulate",
    "train.log_every",
    "train.save_every",
)


def run_folder(output: str) -> Path:
    """Return the folder of a run whose `output` is a folder, or a checkpoint that is to end up beside it."""
    path = Path(output)
    return path.with_suffix("") if path.suffix == ".safetensors" else path


def check_output(spec: RunSpec, *, resume: bool) -> Path:
    """Return the folder of a run, before anything is written to it.

    Raises:
        OutputError: The folder holds a run already, or something else, or no run to resume, or cannot be written.
        SpecError: The run to resume has another spec.
    """
    assert spec.output, "the caller chose a name"
    folder, target = run_folder(spec.output), Path(spec.output)
    saved = folder / SPEC_FILE
    if resume:
        if not saved.is_file():
            raise OutputError(f"{folder}: holds no run to resume: mend --output, or leave out --resume")
        _check_same(spec, saved)
        return folder
    is_ours = _check_free(folder)
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not (is_ours or found <= START_FILES):
        raise OutputError(f"{folder}: exists and holds something else: pass another --output")
    if target.suffix == ".safetensors" and target.exists():
        raise OutputError(f"{target}: exists already: pass another --output")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"{folder}: cannot be written ({nearest.name} is a file): pass another --output")
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"{folder}: cannot be written (no permission in {nearest}): pass another --output")
    return folder


def _check_free(folder: Path) -> bool:
    """Return whether the folder holds what is left of a run that computed nothing.

    Raises:
        OutputError: It holds a run that computed something, or a user's own spec.
    """
    saved = folder / SPEC_FILE
    if not saved.is_file():
        return False
    # a spec without the header is the user's own work
    if not saved.read_text(errors="replace").startswith(HEADER) or _holds_results(folder):
        raise OutputError(f"{folder}: holds a run already: continue it with --resume, or pass another --output")
    return True


def open_folder(spec: RunSpec, folder: Path, faults: tuple[str, ...], remark: str = "", *, resume: bool) -> None:
    """Make the folder, keep other processes out of it, and write what is to be run and what is wrong with its data.

    Args:
        spec: What is to be run.
        folder: Where.
        faults: What is wrong with the data, a line each.
        remark: What else is known of the run before it starts: a comment in its spec.
        resume: Continue what is there.

    Raises:
        OutputError: It cannot be written, another process is writing there, or one has done so since the folder was
            checked.
    """
    distributed.barrier()  # every rank has looked at the folder before one writes
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror}): pass another --output") from error
        if not resume:
            _check_free(folder)
        write_spec(spec, folder, remark)
        if faults:
            write_whole(folder / FAULTS_FILE, "".join(f"{fault}\n" for fault in faults).encode())
    distributed.barrier()


def write_spec(spec: RunSpec, folder: Path, remark: str = "") -> None:
    """Write what is to be run; see `open_folder`."""
    if distributed.is_main():
        comment = f"# {' '.join(remark.split())}\n\n" if remark else ""
        write_whole(folder / SPEC_FILE, (HEADER + comment + toml.dumps(spec)).encode())


def with_saved_batch(spec: S) -> S:
    """Return the spec of a run to resume with the batch that it was begun with; as it is where there is no run."""
    saved = run_folder(spec.output or "") / SPEC_FILE
    if not saved.is_file():
        return spec
    try:
        batch = tomllib.loads(saved.read_text())["train"]["batch"]
        train = TrainSpec.model_validate({**dict(spec.train), "batch": batch})
    except (OSError, ValueError, LookupError, TypeError):  # what is wrong with it is said where all of it is compared
        return spec
    return spec.model_copy(update={"train": train})


def _holds_results(folder: Path) -> bool:
    """Return whether a run computed anything: it left more than `START_FILES` and files without a byte."""
    return any(path.is_file() and path.name not in START_FILES and path.stat().st_size for path in folder.rglob("*"))


def _lock(folder: Path) -> None:
    """Keep other processes from writing to a folder, until this one ends in whatever way.

    Raises:
        OutputError: Another process does so.
        OSError: The lock file cannot be opened.
    """
    if sys.platform == "win32":
        return
    # Never closed: closing a file gives up a lock of this kind, which data workers do not inherit.
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    if is_locked(handle):
        holder = os.read(handle, 20).decode(errors="replace").strip()
        raise OutputError(
            f"{folder}: another ldctl is writing here (pid {holder}): wait for it, or pass another --output"
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)


def _check_same(spec: RunSpec, saved: Path) -> None:
    """Refuse to go on with another spec than the run was started with."""
    try:
        old = _flat(tomllib.loads(saved.read_text()))
    except (OSError, ValueError) as error:
        raise SpecError(f"{saved}: cannot be read ({error}): restore it, or start a new run") from error
    new = _flat(tomllib.loads(toml.dumps(spec)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in RESUMABLE]
    if changed:
        shown = "; ".join(f"{key}: was {_shown(old, key)}, now {_shown(new, key)}" for key in changed[:SHOWN_KEYS])
        if len(changed) > SHOWN_KEYS:
            shown += f"; and {len(changed) - SHOWN_KEYS} keys more"
        raise SpecError(
            f"--resume: {saved} says otherwise: {shown}: resume with the values that the run was started with"
        )


def _shown(values: Mapping[str, object], key: str) -> str:
    return literal(values[key]) if key in values else "unset"


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
