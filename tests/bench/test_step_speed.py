"""A whole step and its parts: an R18 student alone, with an R50 teacher, and with that teacher's cache."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import pytest
import torch
from figures import coco_like, mmdet_ms, peak_mb, report, threads

from ldctl.assemble import frozen, lay_out
from ldctl.distill import KD, LD
from ldctl.distillation import DistillationSpec
from ldctl.models.detector import Detector, ModelSpec
from ldctl.models.resnet import ResNetSpec
from ldctl.optim import build_optimizer
from ldctl.spec import TrainSpec
from ldctl.step import Learner, Teaching, assign_labelled, look, training_losses
from ldctl.types import Batch, TeacherRows

IMAGES, SIDE, CLASSES, OBJECTS, ROUNDS = 2, 320, 80, 7, 9
CPU = torch.device("cpu")
SPEC = DistillationSpec(terms=(LD(), LD(region="vlr", weight=0.0625), KD()))


def detector(depth: int) -> Detector:
    """Build a detector as one with pretrained weights: frozen norms and first stage."""
    return Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init="imagenet")), CLASSES)


def batch() -> Batch:
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    size_hw = torch.full((IMAGES, 2), SIDE)
    targets = coco_like(IMAGES, OBJECTS, SIDE, SIDE, CLASSES)
    return Batch(images, size_hw, size_hw, tuple(range(IMAGES)), targets)


@torch.no_grad()
def told_by(teacher: Detector, images: Batch) -> TeacherRows:
    """Return what a cache would tell of the main region and the VLR."""
    dense = teacher(teacher.normalize(images.images, images.size_hw))
    assigned = assign_labelled(teacher, dense.locations, images)
    seen = look(dense, Teaching(teacher, SPEC, "0"), assigned, images.targets)
    row = torch.cat([where.picked for where in seen.where.values()]).unique()
    (at,) = dense.at([row])
    regions, count = ("main", "vlr"), len(dense.locations.level)
    counts = tuple((int(number), int(number)) for number in (row // count).bincount(minlength=IMAGES))
    return TeacherRows(
        edge_row=row,
        edge=at.edge[0],
        cls_row=row,
        cls=at.cls[0],
        quality=None,
        counts=counts,
        num_locations=count,
        offset=0.0,
        edge_regions=regions,
        cls_regions=regions,
    )


class Stepper:
    """Takes training steps, and remembers the seconds of each part."""

    def __init__(self, teaching: Teaching | None, images: Batch) -> None:
        self.student = lay_out(detector(18), CPU, is_trained=True).train()
        self.teaching, self.batch = teaching, images
        self.learner, self.train = Learner(self.student, self.teaching), TrainSpec()
        self.optimizer = build_optimizer(self.train.optim, {"student": self.student, "adapters": self.learner.adapters})
        self.seconds: dict[str, list[float]] = {}

    def __call__(self) -> None:
        with self.clocked("step"):
            with self.clocked("forward and losses"):
                losses = training_losses(self.learner, self.student, self.teaching, self.batch, self.train.losses)
            with self.clocked("backward"):
                self.optimizer.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
            with self.clocked("optimizer"):
                self.optimizer.step()

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def clock(self, patch: pytest.MonkeyPatch, owner: object, method: str, name: str) -> None:
        """Note the seconds of each call of a method or a function of a module."""
        original: Callable[..., object] = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            with self.clocked(name):
                return original(*args, **kwargs)

        patch.setattr(owner, method, timed)

    def medians_ms(self) -> dict[str, float]:
        return {name: 1e3 * median(values) for name, values in self.seconds.items()}


@pytest.mark.bench
def test_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher, images = frozen(detector(50), CPU), batch()
    with threads(2):
        steppers = {
            "plain": Stepper(None, images),
            "live teacher": Stepper(Teaching(teacher, SPEC, "0"), images),
            "cached teacher": Stepper(Teaching(None, SPEC, "0"), replace(images, taught=told_by(teacher, images))),
        }
        live = steppers["live teacher"]
        live.clock(monkeypatch, teacher, "forward", "teacher")
        live.clock(monkeypatch, live.student, "forward", "student")
        for stepper in steppers.values():
            stepper()
            stepper.seconds.clear()
        for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all alike
            for stepper in steppers.values():
                stepper()
        peak = peak_mb(live)
    plain_ms = steppers["plain"].medians_ms()["step"]
    for name, stepper in steppers.items():
        parts = stepper.medians_ms()
        report(what=f"step, {name}", ratio_to_plain=parts["step"] / plain_ms, **parts)
    report(what="memory of a step with a live teacher", peak_mb=peak)
    arguments = ("--student", "18", "--teacher", "50", "--bs", str(IMAGES), "--hw", str(SIDE), str(SIDE))
    if theirs := mmdet_ms("step", *arguments, "--gts", str(OBJECTS), "--reps", str(ROUNDS)):
        ratios = {name: stepper.medians_ms()["step"] / theirs["TOTAL"] for name, stepper in steppers.items()}
        report(what="step of mmdet, live teacher", ms=theirs["TOTAL"], ratios=ratios)
    assert live.medians_ms()["step"] < 3 * plain_ms
