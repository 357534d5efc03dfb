"""A whole training step and its parts: an R18 student by itself, and with an R50 teacher, at 2 x 320 x 320."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import pytest
import torch
from figures import coco_like, mmdet_ms, peak_mb, report, threads

from ldctl.distill import KD, LD
from ldctl.distillation import DistillationSpec
from ldctl.models.detector import Detector, ModelSpec
from ldctl.models.resnet import ResNetSpec
from ldctl.optim import build_optimizer
from ldctl.spec import TrainSpec
from ldctl.step import Learner, Teaching, training_losses
from ldctl.types import Batch

IMAGES, SIDE, CLASSES, OBJECTS, ROUNDS = 2, 320, 80, 7, 9
SPEC = DistillationSpec(terms=(LD(), LD(region="vlr", weight=0.0625), KD()))


def detector(depth: int) -> Detector:
    """Build a detector as one with pretrained weights: frozen norms and first stage."""
    return Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init="imagenet")), CLASSES)


def batch() -> Batch:
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    size_hw = torch.full((IMAGES, 2), SIDE)
    targets = coco_like(IMAGES, OBJECTS, SIDE, SIDE, CLASSES)
    return Batch(images, size_hw, size_hw, tuple(range(IMAGES)), targets)


class Stepper:
    """Takes training steps, and remembers the seconds of each part."""

    def __init__(self, teacher: Detector | None) -> None:
        self.student = detector(18).train()
        self.teaching = teacher and Teaching(teacher, SPEC, "0")
        self.learner, self.train = Learner(self.student, self.teaching), TrainSpec()
        self.optimizer = build_optimizer(self.train.optim, {"student": self.student, "adapters": self.learner.adapters})
        self.batch = batch()
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
    teacher = detector(50).eval().requires_grad_(False)
    with threads(2):
        steppers = {"plain": Stepper(None), "live teacher": Stepper(teacher)}
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
        ms = live.medians_ms()["step"]
        report(what="step of mmdet, live teacher", ms=theirs["TOTAL"], ratio=ms / theirs["TOTAL"])
    assert live.medians_ms()["step"] < 3 * plain_ms
