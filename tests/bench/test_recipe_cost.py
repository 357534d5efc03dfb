"""How much a step of each recipe costs on one core: `pytest -m bench -s tests/bench/test_recipe_cost.py` shows it."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from scenes import random_targets

from ldctl import spec
from ldctl.models import Detector
from ldctl.optim import build_optimizer
from ldctl.spec import DistillSpec, TeacherSpec
from ldctl.step import Learner, Teaching, training_losses
from ldctl.types import Batch

RECIPES = tuple(name for name in spec.preset_names() if name.startswith("small") and name != "small-teacher")
HEIGHT, WIDTH, IMAGES, CLASSES, ROUNDS = 256, 320, 8, 3, 7


def batch() -> Batch:
    size_hw = torch.tensor([[HEIGHT, WIDTH]]).expand(IMAGES, 2)
    images = torch.randint(0, 256, (IMAGES, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    targets = random_targets(IMAGES, HEIGHT, CLASSES, seed=0, most=15)
    return Batch(images, size_hw, size_hw, tuple(range(IMAGES)), targets)


def stepper(recipe: str, teacher: Detector | None) -> Callable[[], None]:
    """Return what takes one training step."""
    loaded = spec.load(DistillSpec, recipe, {}, [])
    torch.manual_seed(0)
    student = Detector(loaded.student, CLASSES).train()
    teaching = Teaching(teacher, loaded.distill, "0") if teacher else None
    learner = Learner(student, teaching)
    optimizer = build_optimizer(loaded.train.optim, {"student": student, "adapters": learner.adapters})
    images = batch()

    def step() -> None:
        losses = training_losses(learner, student, teaching, images, loaded.train.losses)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


@pytest.mark.bench
def test_cost_of_a_step() -> None:
    model = spec.load(TeacherSpec, "small-teacher", {}, []).model
    teacher = Detector(model, CLASSES).eval().requires_grad_(False)
    steppers = {"plain": stepper("small", None)} | {name: stepper(name, teacher) for name in RECIPES}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all alike
        for name, step in steppers.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:20} {median * 1000:6.0f} ms  {median / medians['plain']:.2f} x plain")
    assert max(medians.values()) < 4 * medians["plain"]
