"""Assemble a run: its device, data and detectors, as the spec says."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from ldctl import checkpoint, distributed, toml
from ldctl.checkpoint import CheckpointMeta
from ldctl.classes import ClassMatch, match_names
from ldctl.data import (
    DataSpec,
    as_many_labelled,
    check_classes,
    in_class_order,
    join,
    only_labelled,
    open_dataset,
    read_unlabelled,
)
from ldctl.data.check import inspect
from ldctl.distillation import DistillationSpec
from ldctl.errors import CheckpointError, MissingError, SpecError
from ldctl.models.detector import Detector, ModelSpec, PostprocessSpec, initialize
from ldctl.models.fold import fold_batch_norm
from ldctl.pairing import SharedClasses
from ldctl.run_folder import FAULTS_FILE
from ldctl.samples import Dataset
from ldctl.spec import AUTO, DistillSpec, RunSpec, TrainSpec
from ldctl.step import Teaching
from ldctl.trainer import STATE_FILE, Job, shapes

SHOWN_FAULTS = 20
SAFE_CHANNELS = 32  # twice as many as crashed; see `lay_out`


def note(text: str) -> None:
    """Tell the user something that is no result, once over all ranks."""
    if distributed.is_main():
        print(text, file=sys.stderr)  # noqa: T201 (the terminal is where this belongs)


def start(spec: RunSpec) -> torch.device:
    """Choose the device and join the other ranks, if torchrun started several.

    Raises:
        MissingError: There is no such device.
        SpecError: The batch cannot be shared out.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_share("train", spec.train, ranks)
    if isinstance(spec, DistillSpec) and not spec.teacher.is_in_a_file:
        check_share("teacher.train", spec.teacher.train, ranks)
    if isinstance(spec, DistillSpec) and spec.assistant and spec.assistant.train:
        check_share("assistant.train", spec.assistant.train, ranks)
    device = choose_device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects travel between ranks through the current one
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def check_share(section: str, train: TrainSpec, ranks: int) -> None:
    """Refuse a batch that ranks and micro-batches cannot share evenly.

    Raises:
        SpecError: They cannot.
    """
    share = ranks * train.accumulate
    if train.batch != AUTO and train.batch % share:
        raise SpecError(
            f"{section}.batch {train.batch} does not divide into {ranks} ranks x {train.accumulate} micro-batches: "
            f"make it a multiple of {share}"
        )


def choose_device(name: str) -> torch.device:
    """Return the device that a spec names; `cuda` is this process's GPU, `auto` too, or the CPU where there is none.

    Raises:
        MissingError: There is no such device here.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name == "auto":
        name = own if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own if name == "cuda" else name)
        torch.empty(0, device=device).cpu()  # "meta" has no data to copy
    except (RuntimeError, AssertionError) as error:
        raise MissingError(
            f"--device {name}: not available here: use cpu, or check the driver and torch's build"
        ) from error
    return device


@dataclass(frozen=True)
class Setting:
    """What all detectors that a command trains have in common.

    Attributes:
        device: Where to train.
        train_set: Images to train on.
        val_set: Images to evaluate on.
        faults: What is wrong with the data, a line each; the data sets are without it.
        quiet: No progress display.
    """

    device: torch.device
    train_set: Dataset
    val_set: Dataset
    faults: tuple[str, ...]
    quiet: bool

    @property
    def labelled(self) -> "Setting":
        """Return the same without unlabelled images."""
        return replace(self, train_set=only_labelled(self.train_set))

    @property
    def as_many_labelled(self) -> "Setting":
        """Return the same with labelled images in the place of unlabelled ones: as many steps in an epoch."""
        return replace(self, train_set=as_many_labelled(self.train_set))

    @property
    def fingerprint(self) -> str:
        """Return a hash of both splits."""
        return hashlib.sha256(f"{self.train_set.fingerprint} {self.val_set.fingerprint}".encode()).hexdigest()


@dataclass(frozen=True)
class Annotations:
    """Both splits as their annotation files say; no image was looked at.

    Attributes:
        train: To train on; none where only unlabelled images are.
        val: To evaluate on; of the same classes.
    """

    train: Dataset | None
    val: Dataset


def read_annotations(spec: DataSpec) -> Annotations:
    """Read what the annotation files of both splits say.

    Raises:
        DataError: There is no data, or its splits have not the same classes.
    """
    if spec.unlabelled_only:
        return Annotations(None, open_dataset(spec, "val"))
    train, val = (open_dataset(spec, split) for split in ("train", "val"))
    check_classes(train, val)
    return Annotations(train, val)


def open_data(spec: DataSpec, device: torch.device, *, quiet: bool) -> Setting:
    """Read and check both splits; see `look_at`."""
    return look_at(read_annotations(spec), spec, device, quiet=quiet)


def look_at(annotations: Annotations, spec: DataSpec, device: torch.device, *, quiet: bool) -> Setting:
    """Check the images of both splits, and those without annotations; say what is wrong and what is done about it.

    Raises:
        DataError: Nothing of the data is usable.
    """
    unlabelled = read_unlabelled(Path(spec.unlabelled), annotations.val) if spec.unlabelled else None
    given = {"train": annotations.train, "val": annotations.val, "unlabelled": unlabelled}
    found = {name: inspect(dataset).dataset for name, dataset in given.items() if dataset is not None}
    # each once: two splits may be one file
    faults = tuple(dict.fromkeys(str(fault) for one in found.values() for fault in one.faults))
    note_faults(faults, f", all in {FAULTS_FILE} of the run's folder")
    for name, one in found.items():
        boxes = one.samples.num_objects.sum()
        what = "" if name == "unlabelled" else f", {boxes} boxes, {len(one.classes)} classes"
        note(f"{name}: {len(one.samples)} images{what} from {one.name}")
    train_sets = [found[name] for name in ("train", "unlabelled") if name in found]
    train_set = join(*train_sets) if len(train_sets) > 1 else train_sets[0]
    return Setting(device, train_set, found["val"], faults, quiet)


def note_faults(faults: Sequence[str], rest: str = "") -> None:
    """Show the first faults of the data, and how many more there are; `rest` says where those can be read."""
    for fault in faults[:SHOWN_FAULTS]:
        note(f"data: {fault}")
    if len(faults) > SHOWN_FAULTS:
        note(f"data: and {len(faults) - SHOWN_FAULTS} faults more{rest}")


def model_in(recorded: Mapping[str, object], path: Path) -> ModelSpec:
    """Return the spec of a detector that a file is of.

    Args:
        recorded: As the file has it.
        path: That file.

    Raises:
        CheckpointError: It is none that this version knows.
    """
    try:
        return ModelSpec.model_validate_json(json.dumps(recorded))
    except ValidationError as error:
        raise CheckpointError(f"{path}: holds a model that this version cannot build: update ldctl") from error


def load_detector(path: Path) -> tuple[Detector, CheckpointMeta]:
    """Build the detector of a checkpoint, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or not a detector's.
    """
    loaded = checkpoint.load(path)
    detector = Detector(model_in(loaded.meta.model, path), len(loaded.meta.classes))
    checkpoint.fit(loaded.tensors, shapes(detector), path)
    detector.load_state_dict(loaded.tensors)
    return detector, loaded.meta


def lay_out(detector: Detector, device: torch.device, *, is_trained: bool) -> Detector:
    """Move a detector to a device, in the memory format that its convolutions are fastest in: channels last.

    On a CPU a trained backbone with narrow strided 1x1 convolutions keeps the usual format: torch 2.14 crashes in their
    backward pass below 16 channels.
    """
    detector = detector.to(device)
    strided = [part for part in detector.backbone.modules() if isinstance(part, nn.Conv2d) and part.stride != (1, 1)]
    is_narrow = any(part.kernel_size == (1, 1) and part.in_channels < SAFE_CHANNELS for part in strided)
    if not (is_trained and is_narrow and device.type == "cpu"):
        detector.backbone.to(memory_format=torch.channels_last)
    for part in (detector.fpn, detector.head):
        part.to(memory_format=torch.channels_last)
    return detector


def frozen(detector: Detector, device: torch.device) -> Detector:
    """Make a teacher of a detector: nothing of it trains, so that its batch norms can be part of its convolutions."""
    detector = detector.eval().requires_grad_(False)
    detector.backbone = fold_batch_norm(detector.backbone)
    return lay_out(detector, device, is_trained=False)


def check_initial_weights(models: Iterable[ModelSpec]) -> None:
    """Load what the specs' `init` names and throw it away: hours before it is needed, if it cannot be had.

    Raises:
        MissingError: See `initialize`.
        CheckpointError: See `initialize`.
    """
    for model in models:
        if model.backbone.init != "none":
            initialize(Detector(model, num_classes=1))


def compare_classes(known: tuple[str, ...] | None, spec: DistillSpec, classes: tuple[str, ...]) -> ClassMatch:
    """Tell which of the data's classes the teacher knows, and refuse terms that have nothing to look at then.

    Args:
        known: The teacher's classes; none for one that is trained on the same data.
        spec: Names of classes, terms.
        classes: The data's.

    Raises:
        SpecError: See `match_names` and `DistillationSpec.check_classes`; or no class is shared, and there are
            unlabelled images.
    """
    match = match_names(classes, known or classes, spec.teacher.classes)
    spec.distill.check_classes(match)
    if spec.data.unlabelled is not None and not match.pairs:
        raise SpecError(
            "data.unlabelled: what is in these images is what the teacher finds of the classes that it shares with the "
            "data, and it shares none: say which are the same with --set 'teacher.classes={...}', or leave it out"
        )
    return match


def in_teachers_order(setting: Setting, match: ClassMatch) -> Setting:
    """Count the data's classes as the teacher does, where it knows them all and no others."""
    if not match.is_complete:
        return setting
    train_set, val_set = (in_class_order(one, match.in_teachers_order) for one in (setting.train_set, setting.val_set))
    return replace(setting, train_set=train_set, val_set=val_set)


def hire(
    path: Path,
    distill: DistillationSpec,
    device: torch.device,
    *,
    match: ClassMatch | None = None,
    scale: float = 1.0,
    pseudo: PostprocessSpec | None = None,
) -> Teaching:
    """Load a teacher: frozen, in evaluation mode.

    Args:
        path: Its checkpoint.
        distill: What to learn from it.
        device: Where to compute.
        match: Its classes and the student's; unless given, they are the same in the same order.
        scale: At how many times the student's scale it sees an image.
        pseudo: Which of its detections stand for objects in unlabelled images; none where there are no such images.

    Raises:
        CheckpointError: See `load_detector`.
    """
    teacher, _ = load_detector(path)
    shared = None
    if match and not match.is_complete:
        student_class, teacher_class = (
            torch.tensor(match.pairs, dtype=torch.int64, device=device).view(-1, 2).unbind(dim=1)
        )
        shared = SharedClasses(student_class, teacher_class)
    return Teaching(
        teacher=frozen(teacher, device),
        spec=distill,
        sha256=checkpoint.sha256(path),
        shared=shared,
        scale=scale,
        pseudo=pseudo,
    )


def make_job(
    spec: RunSpec,
    name: str,
    folder: Path,
    model: ModelSpec,
    setting: Setting,
    teaching: Teaching | None = None,
) -> Job:
    """Build a detector with its initial weights, and everything else that its training needs.

    Args:
        spec: How to train it.
        name: What messages call it.
        folder: Where its files go; when they hold a state, the initial weights are not loaded.
        model: The detector.
        setting: Device and data.
        teaching: From whom it learns, and what.
    """
    torch.manual_seed(spec.train.seed)
    detector = Detector(model, len(setting.train_set.classes))
    if not (folder / STATE_FILE).exists() and (said := initialize(detector)):
        note(said)
    return job_of(spec, name, folder, detector, setting, teaching)


def job_of(
    spec: RunSpec, name: str, folder: Path, detector: Detector, setting: Setting, teaching: Teaching | None
) -> Job:
    """Return the job of training a detector; see `make_job`."""

    def meta(metrics: dict[str, float]) -> CheckpointMeta:
        return CheckpointMeta(
            model=detector.spec.model_dump(mode="json"),
            classes=setting.train_set.classes,
            short_side=spec.data.short_side[1],
            long_side=spec.data.long_side,
            spec=toml.dumps(spec),
            metrics=metrics,
            teacher_sha256=teaching.sha256 if teaching else None,
            data_fingerprint=setting.fingerprint,
            val_fingerprint=setting.val_set.fingerprint,
        )

    return Job(
        name=name,
        folder=folder,
        detector=lay_out(detector, setting.device, is_trained=True),
        teaching=teaching,
        train=spec.train,
        data=spec.data,
        postprocess=spec.postprocess,
        train_set=setting.train_set,
        val_set=setting.val_set,
        meta=meta,
        device=setting.device,
        quiet=setting.quiet,
    )
