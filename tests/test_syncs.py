"""How often a training step waits for its device: whatever needs a tensor's values on the host, or shapes from them."""
# ruff: noqa: ANN401 (the signatures are torch's)

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import first_batch, small_job
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldctl import checkpoint, spec
from ldctl.predict import to_device
from ldctl.preset_files import preset_names
from ldctl.spec import DistillSpec
from ldctl.trainer import Job, Trainer

# Operators whose output has a shape that the values of their inputs decide, or that hand values to Python.
VALUE_DEPENDENT = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "repeat_interleave",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "bincount",
    "nms",
    "equal",
}
READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}  # methods of a tensor
FULL = [{"kind": "ld"}, {"kind": "ld", "region": "vlr", "weight": 0.0625}, {"kind": "kd"}]
RECIPES = tuple(name for name in preset_names() if name.startswith("small-") and name != "small-teacher")
DEFEAT = [{"kind": "imitation", "region": region} for region in ("inside_gt", "outside_gt")]


def terms_of(recipe: str) -> list[dict[str, Any]]:
    terms = spec.load(DistillSpec, recipe, {"teacher.path": "t"}, []).distill.terms
    return [term.model_dump() for term in terms]


class Reads(TorchFunctionMode):
    """Counts what reads a tensor from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Counts operators that make a shape of values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if has_mask or (name in VALUE_DEPENDENT and "output_size" not in (kwargs or {})):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def syncs(work: Callable[[], object]) -> Counter[str]:
    """Count what waits for the device; a value read by Python counts once, whichever of both sees it."""
    with Reads() as reads, Shapes() as shapes:
        work()
    found = reads.found + shapes.found
    found.subtract({"_local_scalar_dense": reads.found["item"] + reads.found["__bool__"] + reads.found["__float__"]})
    return +found


def test_the_counter_sees_what_waits() -> None:
    value = torch.arange(4.0)
    counted = {
        "item": lambda: value[0].item(),
        "tolist": lambda: value.tolist(),
        "__bool__": lambda: bool(value.sum() > 0),
        "__float__": lambda: float(value[1]),
        "nonzero": lambda: value.nonzero(),
        "index": lambda: value[value > 1],
        "repeat_interleave": lambda: value.repeat_interleave(torch.tensor([1, 0, 2, 1])),
        "nms": lambda: torch.ops.torchvision.nms(torch.rand(3, 4), torch.rand(3), 0.5),
    }
    for name, work in counted.items():
        assert syncs(work) == {name: 1}, name
    counts = torch.tensor([1, 0, 2, 1])
    assert not syncs(lambda: value.repeat_interleave(counts, output_size=4)[counts].sum())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of random weights."""
    job, path = small_job(), tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    checkpoint.save(path, job.detector.state_dict(), job.meta({}))
    return path


@pytest.mark.parametrize("recipe", ["plain", "default", "full", "defeat", *RECIPES])
def test_a_step_waits_at_most_three_times(teacher: Path, recipe: str) -> None:
    """Once for the rows of all regions, once if boxes are compared, and once to suppress general instances."""
    recipes = {"full": FULL, "defeat": DEFEAT} | {name: terms_of(name) for name in RECIPES}
    values = {"distill__terms": recipes[recipe]} if recipe in recipes else {}
    job = small_job(None if recipe == "plain" else teacher, **values, train__ema={})
    trainer = Trainer(job)
    trainer.wrapped.train()
    batch = first_batch(job)
    trainer.pending.append(trainer.take_step(batch))  # the first also measures shares of the gradient
    trainer.step += 1
    found = syncs(lambda: trainer.pending.append(trainer.take_step(batch)))
    regions = {term.region for term in job.teaching.spec.terms} if job.teaching else set()
    assert found.total() == 1 + bool(regions & {"vlr", "inside_gt", "outside_gt"}) + ("gi" in regions), found
    assert syncs(trainer._mean_losses).total() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, FULL])
def test_a_step_waits_at_most_three_times_on_a_gpu(teacher: Path, recipe: object) -> None:
    job = on_gpu(small_job(teacher if recipe else None, **({"distill__terms": recipe} if recipe else {})))
    trainer = Trainer(job)
    batch = to_device(first_batch(job), job.device)
    trainer.take_step(batch)
    trainer.step += 1
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.pending.append(trainer.take_step(batch))
            trainer._mean_losses()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert 1 <= len(waits) <= 3, waits


def on_gpu(job: Job) -> Job:
    device = torch.device("cuda")
    teaching = job.teaching and replace(job.teaching, teacher=job.teaching.teacher.to(device))
    return replace(job, detector=job.detector.to(device), teaching=teaching, device=device)
