"""The folder of a run: taken once, and continued only by the spec that it was started with."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from ldctl import distributed, toml
from ldctl.errors import OutputError, SpecError
from ldctl.spec import RunSpec

SPEC_FILE = "spec.toml"
HEADER = "# The resolved spec of this run, written by ldctl.\n\n"
FAULTS_FILE = "data_faults.txt"
# What a resumed run may change: nothing of what it learns from. Another number of micro-batches rounds differently.
RESUMABLE = (
    "device",
    "output",
    "data.path",
    "data.unlabelled",
    "data.workers",
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
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    # A run that failed before it computed anything left but these; a spec without the header is the user's own work.
    is_own = saved.is_file() and not saved.read_text(errors="replace").startswith(HEADER)
    is_begun = is_own or not found <= {SPEC_FILE, FAULTS_FILE}
    if is_begun and SPEC_FILE in found:
        raise OutputError(f"{folder}: holds a run already: continue it with --resume, or pass another --output")
    if is_begun or folder.is_file():
        raise OutputError(f"{folder}: exists and holds something else: pass another --output")
    if target.suffix == ".safetensors" and target.exists():
        raise OutputError(f"{target}: exists already: pass another --output")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"{folder}: cannot be written ({nearest.name} is a file): pass another --output")
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"{folder}: cannot be written (no permission in {nearest}): pass another --output")
    return folder


def open_folder(spec: RunSpec, folder: Path, faults: tuple[str, ...], remark: str = "") -> None:
    """Make the folder, and write what is to be run and what is wrong with its data.

    Args:
        spec: What is to be run.
        folder: Where.
        faults: What is wrong with the data, a line each.
        remark: What else is known of the run before it starts: a comment in its spec.

    Raises:
        OutputError: It cannot be written.
    """
    distributed.barrier()  # every rank has looked at the folder before one writes
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            comment = f"# {' '.join(remark.split())}\n\n" if remark else ""
            (folder / SPEC_FILE).write_text(HEADER + comment + toml.dumps(spec))
            if faults:
                (folder / FAULTS_FILE).write_text("".join(f"{fault}\n" for fault in faults))
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror}): pass another --output") from error
    distributed.barrier()


def _check_same(spec: RunSpec, saved: Path) -> None:
    """Refuse to go on with another spec than the run was started with."""
    try:
        old = _flat(tomllib.loads(saved.read_text()))
    except (OSError, ValueError) as error:
        raise SpecError(f"{saved}: cannot be read ({error}): restore it, or start a new run") from error
    new = _flat(tomllib.loads(toml.dumps(spec)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in RESUMABLE]
    if changed:
        shown = "; ".join(f"{key}: was {old.get(key, 'unset')}, now {new.get(key, 'unset')}" for key in changed)
        raise SpecError(
            f"--resume: {saved} says otherwise: {shown}: resume with the values that the run was started with"
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
