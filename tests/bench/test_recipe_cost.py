"""How much a step of each recipe costs on one core: `pytest -m bench -s tests/bench/test_recipe_cost.py` shows it."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from figures import report
from scenes import random_targets

from ldctl import checkpoint, preset_files, spec
from ldctl.assemble import frozen, lay_out
from ldctl.caching import cache_teacher
from ldctl.checkpoint import CheckpointMeta
from ldctl.data import DataSpec, open_dataset
from ldctl.data.loader import train_batches
from ldctl.data.synthetic import SyntheticSpec
from ldctl.data.teacher_cache import open_cache
from ldctl.models import Detector, ModelSpec, ResNetSpec
from ldctl.optim import build_optimizer
from ldctl.spec import DistillSpec, TeacherSpec
from ldctl.step import Learner, Teaching, training_losses
from ldctl.types import Batch

RECIPES = tuple(name for name in preset_files.preset_names() if name.startswith("small") and name != "small-teacher")
CPU = torch.device("cpu")
HEIGHT, WIDTH, IMAGES, CLASSES, ROUNDS = 256, 320, 8, 3, 7


def batch() -> Batch:
    size_hw = torch.tensor([[HEIGHT, WIDTH]]).expand(IMAGES, 2)
    images = torch.randint(0, 256, (IMAGES, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    targets = random_targets(IMAGES, HEIGHT, CLASSES, seed=0, most=15)
    return Batch(images, size_hw, size_hw, tuple(range(IMAGES)), targets)


def stepper(
    loaded: DistillSpec, teaching: Teaching | None, images: Batch, classes: int = CLASSES
) -> Callable[[], None]:
    """Return what takes one training step."""
    torch.manual_seed(0)
    student = lay_out(Detector(loaded.student, classes), CPU, is_trained=True).train()
    learner = Learner(student, teaching)
    optimizer = build_optimizer(loaded.train.optim, {"student": student, "adapters": learner.adapters})

    def step() -> None:
        losses = training_losses(learner, student, teaching, images, loaded.train.losses)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def medians_of(steppers: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each step, and print them."""
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):  # in turns, so that what else the machine does falls on all alike
        for name, step in steppers.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, median in medians.items():
        report(what="cost of a step", recipe=name, ms=median * 1000, ratio_to_plain=median / medians["plain"])
    return medians


@pytest.mark.bench
def test_cost_of_a_step() -> None:
    model = spec.load(TeacherSpec, "small-teacher", {}, []).model
    teacher = frozen(Detector(model, CLASSES), CPU)
    recipes = {name: spec.load(DistillSpec, name, {}, []) for name in RECIPES}
    steppers = {"plain": stepper(recipes["small"], None, batch())}
    steppers |= {name: stepper(one, Teaching(teacher, one.distill, "0"), batch()) for name, one in recipes.items()}
    medians = medians_of(steppers, ROUNDS)
    assert max(medians.values()) < 4 * medians["plain"]


def resnet(depth: int) -> ModelSpec:
    return ModelSpec(backbone=ResNetSpec(depth=depth, init="none"))


SMALL = (spec.load(DistillSpec, "small", {}, []).student, spec.load(TeacherSpec, "small-teacher", {}, []).model)


@pytest.mark.bench
@pytest.mark.parametrize(
    ("student", "teacher", "size", "images"),
    [(*SMALL, 256, IMAGES), (resnet(18), resnet(50), 320, 2)],
    ids=["small", "r18-r50"],
)
@pytest.mark.parametrize("recipe", ["ld-main", "ld-full"])
def test_a_cached_teacher_costs_next_to_nothing(
    tmp_path: Path, student: ModelSpec, teacher: ModelSpec, size: int, images: int, recipe: str
) -> None:
    """Without the loader, which reads the cache in processes of its own; the bound leaves room for a busy machine."""
    known = Detector(teacher, 4)
    path = tmp_path / "teacher.safetensors"
    model, classes = teacher.model_dump(mode="json"), ("disc", "box", "triangle", "cross")
    checkpoint.save(
        path, known.state_dict(), CheckpointMeta(model=model, classes=classes, short_side=size, long_side=size)
    )
    data = DataSpec(
        format="synthetic",
        synthetic=SyntheticSpec(train=images, size=size),
        short_side=(size, size),
        long_side=size,
        workers=0,
        canvas=True,
    )
    flags = {"teacher.path": str(path), "train.batch": images, "device": "cpu"}
    loaded = spec.load(DistillSpec, recipe, flags, []).model_copy(update={"student": student, "data": data})
    cache_teacher(loaded, tmp_path / "t.cache", "float16", quiet=True)
    dataset = open_dataset(data, "train")
    plain, cached = (
        next(train_batches(dataset, data, batch_size=images, seed=0, epoch=0, cache=cache))
        for cache in (None, open_cache(tmp_path / "t.cache"))
    )
    live = Teaching(frozen(known, CPU), loaded.distill, "0")
    medians = medians_of(
        {
            "plain": stepper(loaded, None, plain, len(classes)),
            "live": stepper(loaded, live, plain, len(classes)),
            "cached": stepper(loaded, Teaching(None, loaded.distill, "0"), cached, len(classes)),
        },
        ROUNDS if images == 2 else 3 * ROUNDS,
    )
    assert medians["cached"] < 1.1 * medians["plain"]
