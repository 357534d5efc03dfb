"""Run a detector over a data set."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldctl import distributed
from ldctl.data import DataSpec
from ldctl.data.loader import eval_batches
from ldctl.models.detector import Detector, PostprocessSpec, detect
from ldctl.samples import Dataset
from ldctl.types import Batch, Detections, Scaled, Targets


@torch.no_grad()
def find(detector: Detector, batch: Batch, postprocess: PostprocessSpec) -> list[Detections]:
    """Return the detections of a batch that is on the detector's device, on the CPU."""
    dense = detector(detector.normalize(batch.images, batch.size_hw))
    return detect(dense, batch.size_hw, batch.original_hw, batch.image_id, postprocess)


def predict(
    detector: Detector,
    dataset: Dataset,
    data: DataSpec,
    postprocess: PostprocessSpec,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], object],
) -> list[Detections]:
    """Run a detector over a data set; each rank takes its share and receives everything.

    Args:
        detector: On `device`; its mode is restored.
        dataset: Images.
        data: How to load them.
        postprocess: From predictions to boxes.
        batch_size: Images at once.
        device: Where to compute.
        on_batch: Called with the number of images done and of all images.

    Returns:
        The detections of every image, on the CPU.
    """
    was_training = detector.training
    detector.eval()
    found: list[Detections] = []
    rank, world_size = distributed.rank(), distributed.world_size()
    total = len(dataset.samples)
    on_batch(0, total)
    batches = eval_batches(dataset, data, batch_size=batch_size, rank=rank, world_size=world_size)
    with closing(batches):
        for batch in batches:
            found += find(detector, to_device(batch, device), postprocess)
            on_batch(min(len(found) * world_size, total), total)
    detector.train(was_training)
    return distributed.gather(found)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a device.

    A GPU copies on a stream of its own: it is still busy with the last batch when the host asks for the next, and does
    both at once.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        user = torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            moved = to_device(batch, device, user)
        user.wait_stream(copying)
        yield moved


def to_device(batch: Batch, device: torch.device, user: torch.cuda.Stream | None = None) -> Batch:
    """Return the batch on a device; the host does not wait for the copies where the loader pins memory.

    Args:
        batch: Anywhere.
        device: Where it is wanted.
        user: Which stream will compute with it, if not the current one: its memory is not given away before that has.
    """

    def move(value: Tensor) -> Tensor:
        moved = value.to(device, non_blocking=True)
        if user is not None:
            moved.record_stream(user)
        return moved

    targets = Targets(*(move(value) for value in vars(batch.targets).values()))
    taught = batch.taught
    if taught:
        tensors = {name: value for name, value in vars(taught).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: move(value) for name, value in tensors.items()}
        taught = replace(taught, **moved)
    other = batch.for_teacher and Scaled(move(batch.for_teacher.images), move(batch.for_teacher.size_hw))
    return Batch(
        images=move(batch.images),
        size_hw=move(batch.size_hw),
        original_hw=move(batch.original_hw),
        image_id=batch.image_id,
        targets=targets,
        for_teacher=other,
        is_labelled=None if batch.is_labelled is None else move(batch.is_labelled),
        taught=taught,
    )
