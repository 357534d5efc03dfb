"""The verbs: train a teacher, distil, export; and the specs of all."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from ldctl import checkpoint, distributed, toml
from ldctl.assemble import (
    Setting,
    check_initial_weights,
    compare_classes,
    hire,
    in_teachers_order,
    load_detector,
    look_at,
    make_job,
    model_in,
    note,
    open_data,
    read_annotations,
    start,
)
from ldctl.cacheable import check_data, default_terms, open_matching
from ldctl.caching import recorded_metrics
from ldctl.data import DataSpec, open_dataset
from ldctl.data.check import inspect
from ldctl.data.synthetic import SyntheticSpec
from ldctl.errors import DataError, ExportError, SpecError
from ldctl.evaluation import print_metrics
from ldctl.export import OnnxExporter
from ldctl.metrics import Metrics
from ldctl.metrics import evaluate as evaluate_detections
from ldctl.models.detector import ModelSpec, PostprocessSpec
from ldctl.predict import predict
from ldctl.probe import settle_batch
from ldctl.run_folder import SPEC_FILE, check_output, open_folder, run_folder, with_saved_batch, write_spec
from ldctl.samples import Dataset
from ldctl.spec import (
    AUTO,
    DistillSpec,
    EvalSpec,
    ExportSpec,
    RunSpec,
    TeacherSpec,
    TrainSpec,
    load,
)
from ldctl.step import Teaching
from ldctl.trainer import BEST_FILE, STATE_FILE, Job, Trainer

SAME_AP = 0.001  # evaluations of the same weights on the same images differ less, whatever the device
USELESS_AP = 0.01

S = TypeVar("S", TeacherSpec, DistillSpec, EvalSpec, ExportSpec)
P = TypeVar("P", TeacherSpec, DistillSpec)

# --- specs ----------------------------------------------------------------------------------------------------------


def teacher_spec(
    preset: str | None, flags: Mapping[str, object], assignments: Sequence[str], *, resume: bool
) -> TeacherSpec:
    """Resolve the spec of `ldctl teacher train`; a resumed run starts from its own."""
    spec = _load(TeacherSpec, preset or _saved_spec(flags, resume), flags, assignments)
    name = _name(preset) if preset else f"teacher-{_short(spec.model)}"
    spec = spec if spec.output else spec.model_copy(update={"output": f"runs/{name}"})
    return with_saved_batch(spec) if resume and spec.train.batch == AUTO else spec


def distill_spec(
    preset: str | None, flags: Mapping[str, object], assignments: Sequence[str], *, resume: bool
) -> DistillSpec:
    """Resolve the spec of `ldctl distill`; a resumed run starts from its own.

    Without a preset, a run from a cache has the default terms where a cache tells something.
    """
    if "teacher.cache" in flags and not preset and not resume:
        flags = {"distill.terms": default_terms(), **flags}
    spec = _load(DistillSpec, preset or _saved_spec(flags, resume), flags, assignments)
    if spec.teacher.cache and "teacher.path" not in flags and not Path(spec.teacher.path or "").is_file():
        # a preset's teacher that is not here has nothing to do with the one of the cache
        spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"path": None})})
    parts = [_name(preset)] if preset else []
    if not preset or {"student.backbone", "student.backbone.depth"} & set(flags):  # one recipe serves several students
        parts.append(_short(spec.student))
    spec = spec if spec.output else spec.model_copy(update={"output": f"runs/{'-'.join(parts)}"})
    return with_saved_batch(spec) if resume and spec.train.batch == AUTO else spec


def cache_spec(preset: str | None, flags: Mapping[str, object], assignments: Sequence[str]) -> DistillSpec:
    """Resolve the spec of the run for which `ldctl teacher cache` works."""
    return _load(DistillSpec, preset, ({} if preset else {"distill.terms": default_terms()}) | dict(flags), assignments)


def eval_spec(path: Path, flags: Mapping[str, object], assignments: Sequence[str]) -> EvalSpec:
    """Resolve the spec of `ldctl eval`: what the checkpoint says of data and thresholds, then the command line."""
    return _load(EvalSpec, None, {"checkpoint": str(path), **_recorded(path), **flags}, assignments)


def export_spec(path: Path, flags: Mapping[str, object], assignments: Sequence[str]) -> ExportSpec:
    """Resolve the spec of `ldctl export` in the same way."""
    return _load(ExportSpec, None, {"checkpoint": str(path), **_recorded(path), **flags}, assignments)


def _load(cls: type[S], base: str | None, flags: Mapping[str, object], assignments: Sequence[str]) -> S:
    """Load a spec; where `--data` names a folder, a generated data set of the base gives way to it."""
    spec = load(cls, base, flags, assignments)
    if "data.path" in flags and spec.data.format == "synthetic":
        return load(cls, base, {**flags, "data.format": "auto"}, assignments)
    return spec


def resolved(spec: RunSpec) -> str:
    """Return the spec as TOML text, every default spelled out: what a checkpoint embeds."""
    return toml.dumps(spec)


def _name(preset: str) -> str:
    return Path(preset).stem


def _short(model: ModelSpec) -> str:
    return model.backbone.short


def _saved_spec(flags: Mapping[str, object], resume: bool) -> str | None:
    """Return the spec file of the run to resume, where the command line names its folder."""
    if not resume or "output" not in flags:
        return None
    path = run_folder(str(flags["output"])) / SPEC_FILE
    return str(path) if path.is_file() else None


def _recorded(path: Path) -> dict[str, object]:
    """Return the sections of a checkpoint's spec that its use depends on, as flags."""
    meta = checkpoint.load_meta(path)
    sections = tomllib.loads(meta.spec)
    flags: dict[str, object] = {key: sections[key] for key in ("data", "postprocess") if key in sections}
    return flags or {"data": {"short_side": [meta.short_side, meta.short_side], "long_side": meta.long_side}}


# --- training -------------------------------------------------------------------------------------------------------


def train_teacher(spec: TeacherSpec, *, resume: bool = False, quiet: bool = False) -> Metrics:
    """Train a plain detector.

    Args:
        spec: What to train; `output` is a folder, or a `.safetensors` file beside which the run's folder is made.
        resume: Continue from the saved state.
        quiet: No progress display.

    Returns:
        The metrics of the best checkpoint, without those per class.
    """
    device = start(spec)
    folder = check_output(spec, resume=resume)
    setting = open_data(spec.data, device, quiet=quiet)
    spec = settle_batch(spec, "teacher", spec.model, setting)
    open_folder(spec, folder, setting.faults, resume=resume)
    metrics = run(make_job(spec, "teacher", folder, spec.model, setting))
    publish(spec, folder)
    print_metrics({"teacher": metrics})
    return metrics


def distill(spec: DistillSpec, *, resume: bool = False, quiet: bool = False) -> dict[str, Metrics]:
    """Distil a student; before it train the teacher, where there is none, then its assistant and the plain student.

    Returns:
        The metrics of the teacher, unless its classes are not the data's, and of the best checkpoint of `student`, and
        of `assistant` and `plain` where they were asked for; all but the teacher's without AP per class.
    """
    device = start(spec)
    folder = check_output(spec, resume=resume)
    cache = open_matching(spec) if spec.teacher.cache else None
    source = cache.path if cache else Path(spec.teacher.path) if spec.teacher.path else None
    known = cache.header if cache else checkpoint.load_meta(source) if source else None
    if known and source:
        check_heads(model_in(known.model, source), spec, source)  # before any data is read
    annotations = read_annotations(spec.data)
    # before any image is looked at
    match = compare_classes(known.classes if known else None, spec, annotations.val.classes)
    setting = in_teachers_order(look_at(annotations, spec.data, device, quiet=quiet), match)
    if cache:
        check_data(cache, match, setting.train_set)
    if not resume:
        models = (None if known else spec.teacher.model, spec.assistant and spec.assistant.model, spec.student)
        check_initial_weights(model for model in models if model)
    if str(match):
        note(str(match))
    open_folder(spec, folder, setting.faults, str(match), resume=resume)
    if cache:
        path = cache.path
        teaching = Teaching(None, spec.distill, cache.header.teacher_sha256, cache=cache)
    else:
        path = source or train_own_teacher(spec, folder, setting.labelled, resume=resume)
        teaching = hire(path, spec.distill, device, match=match, scale=spec.teacher.scale, pseudo=pseudo_spec(spec))
    # its spec is written before the student's number takes the place of "auto"
    assistant = begin_assistant(spec, path, folder, setting, teaching, resume=resume)
    # what a cache tells takes next to no memory
    spec = settle_batch(spec, "student", spec.student, setting, None if cache else teaching)
    write_spec(spec, folder, str(match))
    results: dict[str, Metrics] = {}
    if cache:
        results |= recorded_metrics(cache, setting)
    elif match.is_complete:
        results["teacher"] = examine(teaching, path, spec, setting.labelled)
    else:
        note("teacher: its classes are not the data's, so its AP on these images is not known")
    if assistant:
        results["assistant"] = run_part(assistant, "assistant", assistant.student, setting, teaching)
        teaching = hire(folder / "assistant" / BEST_FILE, spec.distill, device, pseudo=pseudo_spec(spec))
    if spec.compare:
        part = plain_part(spec, "plain", spec.student, spec.train, folder)
        if spec.data.unlabelled:
            note("plain: trains on the labelled images alone, for as many steps as the student")
        results["plain"] = train_part(part, "plain", spec.student, setting.as_many_labelled, resume=resume)
    results["student"] = run(make_job(spec, "student", folder, spec.student, setting, teaching))
    publish(spec, folder)
    print_metrics(results)
    note(verdict(results))
    return results


def pseudo_spec(spec: DistillSpec) -> PostprocessSpec | None:
    """Return which detections of the teacher stand for objects in unlabelled images; none where there are no such."""
    if spec.data.unlabelled is None:
        return None
    return spec.postprocess.model_copy(update={"score_threshold": spec.distill.pseudo_score})


def examine(teaching: Teaching, path: Path, spec: DistillSpec, setting: Setting) -> Metrics:
    """Evaluate a teacher at its own scale before anything is learnt from it; hold that against what its file says.

    A teacher that was loaded wrongly or does not fit the data is the commonest reason for a student that gains nothing.
    """
    # no more pixels at once than the student trains on
    share = distributed.world_size() * spec.train.accumulate * max(spec.teacher.scale, 1.0) ** 2
    with Console(stderr=True, quiet=setting.quiet).status("") as status:
        found = predict(
            teaching.detector,
            setting.val_set,
            spec.data.scaled(spec.teacher.scale),
            spec.postprocess,
            batch_size=max(int(spec.train.batch_size / share), 1),
            device=setting.device,
            on_batch=lambda done, total: status.update(f"teacher: image {done} of {total}"),
        )
    metrics = evaluate_detections(setting.val_set, found)
    meta = checkpoint.load_meta(path)
    recorded = meta.metrics.get("ap")
    said = f"teacher: AP {metrics.ap:.3f} on these images"
    if recorded is not None:
        is_same = meta.val_fingerprint == setting.val_set.fingerprint
        said += f", its file says {recorded:.3f} for {'the same images' if is_same else 'others'}"
        if is_same and abs(metrics.ap - recorded) > SAME_AP:
            said += ": it was evaluated at another input size or by another version, or its weights were changed"
    if metrics.ap < USELESS_AP:
        said += ": it finds next to nothing here, so there is little to learn from it: check its classes and input size"
    note(said)
    return metrics


def verdict(results: Mapping[str, Metrics]) -> str:
    """Say in one line how the distilled student stands against the plain one."""
    student = results["student"].ap
    if "plain" not in results:
        return (
            f"student: AP {student:.3f}; whether the teacher helped is not known: --compare also trains a plain student"
        )
    gain = student - results["plain"].ap
    said = f"student: AP {student:.3f}, {gain:+.3f} against the plain student"
    if gain > 0:
        return said
    return said + ": look at the shares of the gradient, train longer, or take a better teacher"


def train_own_teacher(spec: DistillSpec, folder: Path, setting: Setting, *, resume: bool) -> Path:
    """Train the teacher that the spec describes; return its checkpoint."""
    assert spec.teacher.model is not None, "a spec without a teacher's path has its model"
    part = plain_part(spec, "teacher", spec.teacher.model, spec.teacher.train, folder)
    part = part.model_copy(update={"data": part.data.scaled(spec.teacher.scale)})  # which it will be shown later
    train_part(part, "teacher", spec.teacher.model, setting, resume=resume)
    return folder / "teacher" / BEST_FILE


def begin_assistant(
    spec: DistillSpec, teacher: Path, folder: Path, setting: Setting, teaching: Teaching, *, resume: bool
) -> DistillSpec | None:
    """Begin the part in which the assistant is distilled, in the same way as the student whom it will teach.

    Returns:
        Its spec with its batch; none without an assistant.
    """
    if spec.assistant is None:
        return None
    changed = {
        "teacher": spec.teacher.model_copy(update={"path": str(teacher), "model": None}),
        "assistant": None,
        "student": spec.assistant.model,
        "train": spec.assistant.train or spec.train,
        "compare": False,
        "output": str(folder / "assistant"),
    }
    part = spec.model_copy(update=changed)
    return begin_part(part, "assistant", part.student, setting, teaching, resume=resume)


def plain_part(spec: DistillSpec, name: str, model: ModelSpec, train: TrainSpec, folder: Path) -> TeacherSpec:
    """Return the spec of a plain detector that is trained as part of a distillation run, in a folder below its own."""
    return TeacherSpec(
        model=model,
        data=spec.data.labelled(),
        train=train,
        postprocess=spec.postprocess,
        device=spec.device,
        output=str(folder / name),
    )


def train_part(part: TeacherSpec, name: str, model: ModelSpec, setting: Setting, *, resume: bool) -> Metrics:
    """Train a plain detector as part of a distillation run, in a folder of its own."""
    return run_part(begin_part(part, name, model, setting, resume=resume), name, model, setting)


def begin_part(
    part: P, name: str, model: ModelSpec, setting: Setting, teaching: Teaching | None = None, *, resume: bool
) -> P:
    """Open the folder of a detector that is trained as part of a distillation run; return its spec with its batch."""
    folder = Path(part.output or "")
    is_begun = resume and (folder / SPEC_FILE).exists()
    part = with_saved_batch(part) if is_begun else part
    check_output(part, resume=is_begun)
    part = settle_batch(part, name, model, setting, teaching)
    open_folder(part, folder, (), resume=is_begun)
    return part


def run_part(part: RunSpec, name: str, model: ModelSpec, setting: Setting, teaching: Teaching | None = None) -> Metrics:
    """Train a detector as part of a distillation run that has begun."""
    return run(make_job(part, name, Path(part.output or ""), model, setting, teaching))


def publish(spec: RunSpec, folder: Path) -> None:
    """Write the best checkpoint to the file that the spec names as its output, if it names a file."""
    target = Path(spec.output or "")
    if target.suffix == ".safetensors" and distributed.is_main():
        best = checkpoint.load(folder / BEST_FILE)
        checkpoint.save(target, best.tensors, best.meta)


def run(job: Job) -> Metrics:
    """Train a job, from its saved state where there is one; return the metrics of its best checkpoint."""
    num_parameters = sum(parameter.numel() for parameter in job.detector.parameters())
    note(f"{job.name}: {num_parameters / 1e6:.2f} M parameters, in {job.folder}")
    trainer = Trainer(job)
    if (job.folder / STATE_FILE).exists():
        trainer.load_state()
    trainer.run()
    return Metrics(**checkpoint.load_meta(job.folder / BEST_FILE).metrics, per_class={})


# --- teachers -------------------------------------------------------------------------------------------------------


def check_heads(teacher: ModelSpec, spec: DistillSpec, path: Path) -> None:
    """Refuse a teacher whose head the terms cannot compare with the student's.

    Args:
        teacher: The teacher's spec.
        spec: The student, and the terms.
        path: The file that says it.

    Raises:
        SpecError: See `DistillSpec.fault_of_heads`.
    """
    fault = spec.fault_of_heads(teacher)
    if fault is not None:
        raise SpecError(f"{path}: {fault}")


# --- export ---------------------------------------------------------------------------------------------------------


def export(spec: ExportSpec, target: Path | None) -> str:
    """Export a checkpoint to ONNX; return what was written and how it was checked.

    Args:
        spec: Checkpoint, data to check the file with.
        target: File to write; by default beside the checkpoint.

    Raises:
        OutputError: The target exists or cannot be written.
        ExportError: The backbone cannot be exported, or the file does not give the detector's boxes.
    """
    source = Path(spec.checkpoint)
    target = target or source.with_suffix(".onnx")
    checkpoint.check_new(target)
    detector, meta = load_detector(source)
    if detector.backbone.export_fault:
        raise ExportError(
            f"{source}: {detector.backbone.title} cannot be exported to ONNX ({detector.backbone.export_fault}): "
            "distil a student with a convolutional backbone from it, and export that"
        )
    dataset = images_to_check(spec)
    dataset = replace(dataset, samples=dataset.samples[: spec.images])
    found = predict(
        detector,
        dataset,
        spec.data,
        spec.postprocess,
        batch_size=1,
        device=torch.device("cpu"),
        on_batch=lambda _done, _total: None,
    )
    expected = {one.image_id: one for one in found}
    parity = OnnxExporter()(
        detector,
        target,
        classes=meta.classes,
        short_side=spec.data.short_side[1],
        long_side=spec.data.long_side,
        postprocess=spec.postprocess,
        images=[dataset.read(sample) for sample in dataset.samples],
        expected=[expected[sample.image_id] for sample in dataset.samples],
    )
    size = f"{target}: {target.stat().st_size / 2**20:.1f} MB"
    if parity.num_detections == 0:
        return (
            f"{size}; the detector finds nothing on {parity.num_images} images, so the check says little: pass --data"
        )
    return (
        f"{size}, checked on {parity.num_images} images with {parity.num_detections} detections: "
        f"largest difference {parity.max_box_difference_px:.2g} px, {parity.max_score_difference:.2g} in score"
    )


def images_to_check(spec: ExportSpec) -> Dataset:
    """Return the data set on which to compare an exported file with its detector; generated where there is none."""
    try:
        return inspect(open_dataset(spec.data, "val")).dataset
    except DataError as error:
        note(f"{error}\nchecking the file on generated images instead")
    generated = DataSpec(format="synthetic", synthetic=SyntheticSpec(val=spec.images, size=320))
    return open_dataset(generated, "val")
