"""Tiny training runs on generated images, and what must be equal of two of them."""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ldctl import checkpoint, spec
from ldctl.cli import main
from ldctl.spec import DistillSpec, TeacherSpec

TIMING = ("images_per_second", "data_wait", "eta_s")
MODEL = {"channels": 32, "backbone": {"depth": 18, "width": 0.125, "init": "none"}, "head": {"num_convs": 1}}
# 3 steps an epoch
DATA = {
    "format": "synthetic",
    "synthetic": {"train": 10, "val": 3, "size": 64},
    "short_side": [64, 64],
    "long_side": 64,
    "workers": 0,
}
TRAIN = {"epochs": 2, "batch": 4, "log_every": 2, "schedule": {"warmup_steps": 4}}


def plain_spec(output: Path, **values: object) -> TeacherSpec:
    """Return the spec of a tiny plain run; `train__epochs=1` sets `train.epochs`."""
    flags = {"output": str(output), "device": "cpu", "model": MODEL, "data": DATA, "train": TRAIN}
    return spec.load(TeacherSpec, None, deepcopy(flags) | dotted(values), [])


def distill_spec(output: Path, teacher: Path, **values: object) -> DistillSpec:
    flags = {"output": str(output), "device": "cpu", "student": MODEL, "data": DATA, "train": TRAIN}
    return spec.load(DistillSpec, None, deepcopy(flags) | {"teacher.path": str(teacher)} | dotted(values), [])


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in values.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def trace(folder: Path) -> list[dict[str, float]]:
    """Return the losses of each training record."""
    about = ("phase", "epoch", "step", "lr", "loss")
    return [{k: v for k, v in line.items() if k not in about} for line in records(folder) if line["phase"] == "train"]


def results(folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[object]]:
    """Return all that a finished run left: tensors by file, and its records, state and metadata."""
    tensors = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    metas = [checkpoint.load_meta(folder / name) for name in ("best.safetensors", "last.safetensors")]
    said = [meta.model_dump_json(exclude={"created", "spec"}) for meta in metas]
    return tensors, [records(folder), checkpoint.load_state(folder / "state.safetensors").values, *said]


def same(found: Path, expected: Path) -> None:
    """Compare two finished runs, bit by bit."""
    (ours, said), (theirs, also_said) = results(found), results(expected)
    assert said == also_said
    assert {name: set(entries) for name, entries in ours.items()} == {name: set(e) for name, e in theirs.items()}
    for name, entries in theirs.items():
        wrong = [key for key, value in entries.items() if value.numpy().tobytes() != ours[name][key].numpy().tobytes()]
        assert not wrong, f"{name}: {wrong}"


def start(work: Callable[..., object], *args: object) -> BaseProcess:
    """Run something in a process of its own, forked: a fresh one would spend seconds on importing torch."""
    process = get_context("fork").Process(target=_quiet, args=(work, args))
    process.start()
    return process


def _quiet(work: Callable[..., object], args: Sequence[object]) -> None:
    try:
        work(*args)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


def command(arguments: Sequence[str], log: Path | None = None, setup: Callable[[], object] | None = None) -> None:
    """Run `ldctl` with some arguments; to be started in a process of its own.

    Args:
        arguments: Of the command line.
        log: Where its stdout and stderr go.
        setup: What to do first.
    """
    import sys

    if log:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if setup:
        setup()
    sys.argv = ["ldctl", *arguments]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
