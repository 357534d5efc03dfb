"""The command line: parse, load the spec, call the engine, turn errors into exit codes.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""

import contextlib
import errno
import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ldctl import __version__
from ldctl.errors import Interrupted, LdctlError, OutputError, TrainingError, Unread
from ldctl.options import (
    BACKBONES,
    Assignments,
    BatchSize,
    Checkpoint,
    Data,
    Device,
    DryRun,
    Epochs,
    Init,
    Output,
    OwnData,
    Preset,
    Quiet,
    Resume,
    Seed,
    backbone_flags,
    given,
    read_batch,
)

# What makes a place to write to unusable, whichever part of ldctl or Python's libraries meets it first.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG)

app = typer.Typer(
    name="ldctl",
    help="Distil dense object detectors with Localization Distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes twice as long to appear
    context_settings={"help_option_names": ["-h", "--help"]},
)
teacher_app = typer.Typer(
    help="Get a teacher: train, import or cache one.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(teacher_app, name="teacher")


class ExportFormat(StrEnum):
    """What `ldctl export` can write."""

    ONNX = "onnx"
    MMDET = "mmdet"


class LogitType(StrEnum):
    """How `ldctl teacher cache` can store numbers."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"ldctl {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil dense object detectors with Localization Distillation."""


@teacher_app.command("train")
def teacher_train(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Backbone: {BACKBONES}. [default: r50]", show_default=False)
    ] = None,
    preset: Preset = None,
    data: Data = None,
    output: Output = None,
    init: Init = None,
    epochs: Epochs = None,
    batch: BatchSize = None,
    device: Device = None,
    seed: Seed = None,
    assignments: Assignments = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train a detector: a teacher, or a plain baseline.

    Example: ldctl teacher train --model r101 --data data/coco -o gfl_r101.safetensors
    """
    from ldctl import engine

    flags = given(
        {
            **backbone_flags("model", model),
            "model.backbone.init": init,
            "data.path": data,
            "output": output,
            "train.epochs": epochs,
            "train.batch": read_batch(batch),
            "train.seed": seed,
            "device": device,
        }
    )
    spec = engine.teacher_spec(preset, flags, assignments or [], resume=resume)
    if dry_run:
        typer.echo(engine.resolved(spec), nl=False)
        return
    engine.train_teacher(spec, resume=resume, quiet=quiet)


@teacher_app.command("import")
def teacher_import(
    source: Annotated[Path, typer.Argument(help="Checkpoint of mmdet 2 or 3 (.pth).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the .safetensors.")],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class names: a,b,c or a text file with one per line. [default: COCO's for 80 classes, VOC's for 20]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Import a detector of mmdet: GFL, an LD student, or GFLv2, ATSS, FCOS or RetinaNet with edge distributions.

    Example: ldctl teacher import gfl_r101_fpn_mstrain_2x_coco.pth -o gfl_r101.safetensors
    """
    from ldctl import exchange

    typer.echo(exchange.import_teacher(source, output, classes))


@teacher_app.command("cache")
def teacher_cache(
    teacher: Annotated[str, typer.Argument(help="Checkpoint of the teacher.")],
    preset: Preset = None,
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. [default: TEACHER with .cache]", show_default=False),
    ] = None,
    dtype: Annotated[LogitType, typer.Option(help="Numbers to store.")] = LogitType.FLOAT16,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Images at once. [default: 16]", show_default=False)
    ] = None,
    device: Device = None,
    assignments: Assignments = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Let a teacher look at all training images once, for `ldctl distill --cache`.

    Takes the preset and the values of that run. Whatever stops it, the same command goes on.

    Example: ldctl teacher cache gfl_r101.safetensors --preset ld-full -o gfl_r101.cache
    """
    from ldctl import caching, engine

    flags = given(
        {
            "teacher.path": teacher,
            "data.path": data,
            "data.canvas": True,
            "train.batch": batch,
            "device": device,
        }
    )
    spec = engine.cache_spec(preset, flags, assignments or [])
    if dry_run:
        typer.echo(engine.resolved(spec), nl=False)
        return
    typer.echo(caching.cache_teacher(spec, output, dtype.value, quiet=quiet))


@app.command()
def distill(
    teacher: Annotated[
        Path | None, typer.Option("--teacher", "-t", help="Checkpoint of the teacher.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="What `ldctl teacher cache` wrote, in the place of the teacher.", show_default=False
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help=f"Backbone: {BACKBONES}. [default: r50]", show_default=False)
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(
            "--assistant", help="Backbone of a detector between the two, distilled first.", show_default=False
        ),
    ] = None,
    preset: Preset = None,
    data: Data = None,
    output: Output = None,
    init: Init = None,
    epochs: Epochs = None,
    batch: BatchSize = None,
    device: Device = None,
    seed: Seed = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train the student without a teacher; report both.")
    ] = False,
    assignments: Assignments = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Distil a student from a teacher.

    Example: ldctl distill --preset quickstart

    Example: ldctl distill --teacher gfl_r101.safetensors --student r50

    Example: ldctl distill --cache gfl_r101.cache --preset ld-full --student r50
    """
    from ldctl import engine

    flags = given(
        {
            "teacher.path": str(teacher) if teacher else None,
            "teacher.cache": str(cache) if cache else None,
            "data.canvas": True if cache else None,
            **backbone_flags("assistant.model", assistant),
            "assistant.model.backbone.init": init if assistant else None,
            **backbone_flags("student", student),
            "student.backbone.init": init,
            "data.path": data,
            "output": output,
            "train.epochs": epochs,
            "train.batch": read_batch(batch),
            "train.seed": seed,
            "device": device,
            "compare": compare or None,
        }
    )
    spec = engine.distill_spec(preset, flags, assignments or [], resume=resume)
    if dry_run:
        typer.echo(engine.resolved(spec), nl=False)
        return
    engine.distill(spec, resume=resume, quiet=quiet)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: OwnData = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Images at once.", show_default=False)] = None,
    detections: Annotated[
        Path | None,
        typer.Option(help="Evaluate these COCO results instead of running the detector.", show_default=False),
    ] = None,
    save_detections: Annotated[
        Path | None, typer.Option(help="Write the detections as COCO results.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    device: Device = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a detector: twelve COCO figures, AP per class, speed.

    Example: ldctl eval runs/r50/best.safetensors --data data/coco
    """
    from ldctl import engine, evaluation

    flags = given({"data.path": data, "batch": batch, "device": device})
    spec = engine.eval_spec(checkpoint, flags, assignments or [])
    found = evaluation.evaluate(spec, detections=detections, save_detections=save_detections, quiet=quiet or as_json)
    if as_json:
        typer.echo(json.dumps(found.to_json(), allow_nan=False))
        return
    evaluation.print_metrics({checkpoint.stem: found.metrics}, per_class=True)
    if found.speed:
        evaluation.print_speed(found.speed)


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[ExportFormat, typer.Option(help="Format.")] = ExportFormat.ONNX,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. [default: beside the checkpoint]", show_default=False),
    ] = None,
    data: OwnData = None,
    images: Annotated[int, typer.Option(min=1, help="Images on which the file is checked.")] = 4,
    assignments: Assignments = None,
) -> None:
    """Export a detector, and check that the file gives the same boxes.

    Example: ldctl export runs/r50/best.safetensors --to onnx
    """
    if to is ExportFormat.MMDET:
        from ldctl import exchange

        typer.echo(exchange.export_mmdet(checkpoint, output))
        return
    from ldctl import engine

    spec = engine.export_spec(checkpoint, given({"data.path": data, "images": images}), assignments or [])
    typer.echo(engine.export(spec, output))


def main() -> None:
    """Run the command line."""
    # Large tensors in large pages, to be said before torch is loaded: touching small ones for the first time took half
    # of what losses cost on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app(prog_name="ldctl")
        code: str | int | None = 0
    except LdctlError as error:
        code = _fail(str(error), error.exit_code)
    except (RuntimeError, MemoryError) as error:
        said = _out_of_memory(error)
        if said is None:
            raise
        code = _fail(said, TrainingError.exit_code)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = error.filename or "stdout or stderr"
        code = _fail(f"{where}: cannot be written ({error.strerror}): choose another place", OutputError.exit_code)
    except SystemExit as stop:
        code = stop.code
        if isinstance(stop.__context__, BrokenPipeError):  # typer and rich make 1 of it
            code = Unread.exit_code
        elif code == Interrupted.exit_code:  # Ctrl-C outside of the training loop, of which typer says nothing
            _fail("interrupted", code)
    sys.exit(_flush() or code)


def _fail(text: str, code: int) -> int:
    """Say what went wrong, where that can be read; return the exit code."""
    with contextlib.suppress(OSError):
        typer.secho(f"error: {text}", fg=None if os.environ.get("NO_COLOR") else "red", err=True)
    return code


def _out_of_memory(error: Exception) -> str | None:
    """Return what to do about an error that says that memory ran out; none of another."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return "out of GPU memory: pass a smaller --batch, or --device cpu"
    if text.startswith("DataLoader worker"):
        return (
            "a process that loads images was killed, probably because memory ran out: lower data.workers or --batch; "
            "a training run goes on with --resume --set data.workers=1"
        )
    if "allocate shared memory" in text:
        return (
            "no room for a batch in the memory that processes share (/dev/shm): lower --batch, the image size or "
            "data.workers (0 needs none of it), or enlarge it, as with docker run --shm-size=2g"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory: pass a smaller --batch"
    return None


def _flush() -> int:
    """Write what is left of the output; return an exit code where that cannot be done."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else the interpreter tries again
            code = Unread.exit_code if error.errno == errno.EPIPE else OutputError.exit_code
    return code
