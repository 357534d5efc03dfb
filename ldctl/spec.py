"""Run specs: all that a run depends on, composed from the leaf schemas, loaded from presets, flags and `--set`."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ldctl import toml
from ldctl.data import SMALLEST_SIDE, DataSpec
from ldctl.distill import BinaryKD
from ldctl.distillation import DistillationSpec, without_edges
from ldctl.errors import SpecError
from ldctl.losses import LossSpec
from ldctl.models.detector import ModelSpec, PostprocessSpec
from ldctl.optim import EmaSpec, OptimSpec, ScheduleSpec
from ldctl.preset_files import find_preset
from ldctl.schema import Spec

AUTO: Literal["auto"] = "auto"  # a batch that is tried out before the run
SCALES = (0.5, 1.0, 2.0)  # powers of two; at 4 no more than three of five levels would have a partner


class TrainSpec(Spec):
    """How long and how to train.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per optimizer step, over all ranks and accumulated micro-batches. `"auto"` takes what fits into
            memory, see `probe.py`; once a run has begun, its spec holds the number.
        accumulate: Micro-batches per optimizer step; divides the batch of a rank. The class losses are divided by what
            the whole batch holds; the box losses' divisor depends on predictions and is summed per micro-batch, `kd`
            and `imitation` average over pairs of images of one micro-batch, the `crosskd` terms align and `pkd`
            standardises maps over one. With
            unlabelled images, what the terms are divided by depends on the teacher's predictions, and is counted per
            micro-batch, too.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Exponential moving average of the weights, which is then evaluated and saved; none if left out.
        losses: Weights of the detection losses.
        bf16: Autocast to bfloat16 on a GPU; the losses stay in float32. No effect on a CPU.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        save_every: Optimizer steps between saves of the training state, besides the end of every epoch.
        log_every: Optimizer steps between log records.
        seed: Decides initial weights, order of images and augmentation.
    """

    epochs: int = Field(default=12, ge=1, le=1_000_000)
    batch: int | Literal["auto"] = 16
    accumulate: int = Field(default=1, ge=1)
    optim: OptimSpec = OptimSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    ema: EmaSpec | None = None
    losses: LossSpec = LossSpec()
    bf16: bool = True
    eval_every: int = Field(default=1, ge=1)
    save_every: int = Field(default=1000, ge=1)
    log_every: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("batch")
    @classmethod
    def _check_images(cls, batch: int | Literal["auto"]) -> int | Literal["auto"]:
        if batch != AUTO and batch < 1:
            raise ValueError(f"must be greater than or equal to 1, given {batch}")
        return batch

    @model_validator(mode="after")
    def _check_batch(self) -> "TrainSpec":
        if self.batch != AUTO and self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} does not divide into {self.accumulate} micro-batches (accumulate)")
        return self

    @property
    def batch_size(self) -> int:
        """Return the batch, which is a number by now."""
        assert self.batch != AUTO, "settled before the run"
        return self.batch


class TaughtSpec(Spec):
    """Where the teacher comes from.

    Attributes:
        path: Checkpoint of a detector. If left out, one is trained on the same data first (or taken from the run's
            folder, when it is there already).
        model: What to train.
        train: How to train it.
        cache: File of `ldctl teacher cache` with all that the teacher says of the training images; no teacher is loaded
            or trained then. Where there is a file at `path`, it has to be the cached teacher's.
        classes: The name that the teacher has for some of the data's classes, where names differ by more than upper and
            lower case, spaces and underscores. Terms on classes see the classes that both know; LD does not look at
            classes.
        scale: At how many times the student's input size the teacher sees the same view of an image, with the detail
            that the stored image has: 0.5, 1 or 2. Levels of the two pyramids are then compared that lie at the same
            places of the image; no term looks at the one level of the student that has no such partner: its coarsest at
            2, its finest at 0.5, which small objects are on. At other scales no places would be the same.
    """

    path: str | None = None
    model: ModelSpec | None = None
    train: TrainSpec = TrainSpec()
    cache: str | None = None
    classes: dict[str, str] = Field(default_factory=dict)
    scale: float = 1.0

    @property
    def is_in_a_file(self) -> bool:
        """Return whether the teacher, or all that it says, is in a file; else it is trained first."""
        return self.path is not None or self.cache is not None

    @model_validator(mode="after")
    def _check_source(self) -> "TaughtSpec":
        if self.model is None and not self.is_in_a_file:
            raise ValueError("no teacher: pass --teacher FILE, or say in [teacher.model] what to train first")
        if self.classes and not self.is_in_a_file:
            raise ValueError(
                "classes are named for a teacher's file: pass --teacher FILE, or leave out teacher.classes"
            )
        return self

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: float) -> float:
        if scale not in SCALES:
            raise ValueError(
                f"{scale:g} times the student's size puts the teacher's locations at other places than the student's: "
                "take 0.5, 1 or 2"
            )
        return scale

    @field_validator("classes")
    @classmethod
    def _check_distinct(cls, classes: dict[str, str]) -> dict[str, str]:
        if repeated := sorted({name for name in classes.values() if list(classes.values()).count(name) > 1}):
            raise ValueError(f"the teacher's {', '.join(repeated)} cannot stand for two classes: name each once")
        return classes


class AssistantSpec(Spec):
    """A detector between teacher and student in size: it learns from the one and teaches the other.

    Attributes:
        model: The detector.
        train: How to train it; like the student, unless given.

    Source: teacher assistant (AAAI 2020, arXiv:1902.03393).
    """

    model: ModelSpec = ModelSpec()
    train: TrainSpec | None = None


class RunSpec(Spec):
    """What every training run says.

    Attributes:
        data: Images and boxes.
        train: How to train.
        postprocess: From predictions to final boxes, in evaluation and export.
        device: `"auto"` is a GPU when there is one; else a name that torch knows, such as `cpu` or `cuda:1`.
        output: Folder of the run; by default `runs/` and a name that the command chooses.
    """

    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    postprocess: PostprocessSpec = PostprocessSpec()
    device: str = "auto"
    output: str | None = Field(default=None, min_length=1)


class TeacherSpec(RunSpec):
    """`ldctl teacher train`: a plain detector.

    Attributes:
        model: The detector.
    """

    model: ModelSpec = ModelSpec()

    @model_validator(mode="after")
    def _check_labelled(self) -> "TeacherSpec":
        if self.data.unlabelled is not None:
            raise ValueError(
                "data.unlabelled: only a teacher can say what is in images without annotations: use `ldctl distill`, "
                "or leave it out"
            )
        return self


class DistillSpec(RunSpec):
    """`ldctl distill`: a student learns from a teacher.

    Attributes:
        teacher: Where the teacher comes from.
        assistant: Learns from the teacher first, by the same terms, and then teaches the student in its place.
        student: The detector to train.
        distill: What it learns from the teacher.
        compare: Also train the same student without its teacher, with the same budget and seed, and report both.
    """

    # nothing given is checked like an empty table, which says what is missing
    teacher: TaughtSpec = Field(default_factory=dict, validate_default=True)
    assistant: AssistantSpec | None = None
    student: ModelSpec = ModelSpec()
    distill: DistillationSpec = DistillationSpec()
    compare: bool = False

    @model_validator(mode="after")
    def _check_unlabelled(self) -> "DistillSpec":
        if self.data.unlabelled_only and self.compare:
            raise ValueError(
                "compare trains a plain student, which cannot learn from images without annotations: leave out compare "
                "or data.unlabelled_only"
            )
        if self.data.unlabelled_only and self.teacher.path is None:
            raise ValueError(
                "data.unlabelled_only leaves no annotated image to train a teacher on: pass --teacher FILE, or leave "
                "it out"
            )
        is_scored = any(isinstance(term, BinaryKD) for term in self.distill.terms)
        if self.data.unlabelled_only and self.student.head.has_quality and not is_scored:
            raise ValueError(
                f'without annotations the quality of a "{self.student.head.kind}" head learns from "binary_kd" alone, '
                'which is not among distill.terms: add it, or take student.head.kind "gfl"'
            )
        return self

    @model_validator(mode="after")
    def _check_scale(self) -> "DistillSpec":
        if self.data.scaled(self.teacher.scale).short_side[0] < SMALLEST_SIDE:
            raise ValueError(
                f"teacher.scale {self.teacher.scale:g} with data.short_side {list(self.data.short_side)} shows the "
                f"teacher images under {SMALLEST_SIDE} px: pass --set teacher.scale=1, or larger images"
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> "DistillSpec":
        fault = self.fault_of_heads(None if self.teacher.is_in_a_file else self.teacher.model)
        if fault is not None:
            raise ValueError(fault)
        return self

    def fault_of_heads(self, teacher: ModelSpec | None) -> str | None:
        """Return why the terms cannot compare the detectors' heads, and what to change; none where they can.

        Args:
            teacher: The first to teach; none where only its file knows, which leaves the cut unchecked.
        """
        assistant = self.assistant.model if self.assistant else None
        models = {"teacher": teacher, "assistant": assistant, "student": self.student}
        heads = {name: model.head for name, model in models.items() if model is not None}
        first, wanted = next(iter(heads.items()))
        if fault := self.distill.fault_of_pairs(heads):
            return fault
        for name, head in heads.items() if self.distill.compares_edges else ():
            key = "assistant.model" if name == "assistant" else name
            if head.reg_max != wanted.reg_max:
                return (
                    f"the {first} has reg_max {wanted.reg_max}, the {name} {head.reg_max}, and distributions over "
                    f"different bins cannot be compared: pass --set {key}.head.reg_max={wanted.reg_max}"
                )
            if head.location_offset != wanted.location_offset:
                return (
                    f'the {first} has a head "{wanted.kind}", the {name} "{head.kind}", whose locations lie half a '
                    'stride apart, so "ld" would compare distances from different places: '
                    f"pass --set {key}.head.kind={wanted.kind}, or compare boxes instead: "
                    f"{self.distill.instead(without_edges, heads)}"
                )
        largest = min(head.num_convs for head in heads.values())
        if teacher is not None and self.distill.tower_cut > largest:
            layers = ", ".join(f"{name} {head.num_convs}" for name, head in heads.items())
            return (
                f"distill.cut is {self.distill.cut}, but a head's towers have fewer layers ({layers}): "
                f"pass --set distill.cut={largest}, the largest that works"
            )
        return None


class EvalSpec(Spec):
    """`ldctl eval`.

    Attributes:
        checkpoint: The detector.
        data: Images and boxes; what the checkpoint was trained with, unless given.
        postprocess: From predictions to final boxes; as in training, unless given.
        batch: Images at once.
        device: As in training.
    """

    checkpoint: str
    data: DataSpec = DataSpec()
    postprocess: PostprocessSpec = PostprocessSpec()
    batch: int = Field(default=8, ge=1)
    device: str = "auto"


class ExportSpec(Spec):
    """`ldctl export`.

    Attributes:
        checkpoint: The detector.
        data: Images to check the exported file with; what the checkpoint was trained with, unless given.
        postprocess: From predictions to final boxes; as in training, unless given.
        images: How many images to check it with.
    """

    checkpoint: str
    data: DataSpec = DataSpec()
    postprocess: PostprocessSpec = PostprocessSpec()
    images: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check_nms(self) -> "ExportSpec":
        if self.postprocess.nms != "class":
            raise ValueError(
                f'postprocess.nms "{self.postprocess.nms}" cannot be exported: ONNX has no operator for it: '
                "export with --set postprocess.nms=class"
            )
        return self


S = TypeVar("S", bound=Spec)


def load(cls: type[S], preset: str | None, flags: Mapping[str, object], assignments: Sequence[str]) -> S:
    """Resolve a spec: the schema's defaults, then the preset, then command-line options, then `--set`.

    Args:
        cls: What to load.
        preset: Name of a shipped preset, or path of a TOML file.
        flags: Values of options by dotted path.
        assignments: `section.key=value` strings.

    Raises:
        SpecError: Lists every fault, each with where it stands.
    """
    file = find_preset(preset) if preset else None
    if file:
        _check_command(cls, file)
    return toml.load(cls, file=file, flags=flags, assignments=assignments)


def _check_command(cls: type[Spec], file: Path) -> None:
    """Refuse a file that another command reads.

    Raises:
        SpecError: Names that command.
    """
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError):  # what is wrong with it is said where it is read
        return
    if keys <= cls.model_fields.keys():
        return
    for other, command in ((TeacherSpec, "ldctl teacher train"), (DistillSpec, "ldctl distill")):
        if other is not cls and keys <= other.model_fields.keys():
            raise SpecError(f"{file}: this preset is for `{command}`")
