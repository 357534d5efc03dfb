"""One training step, from a batch to its losses: the whole method on one screen."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldctl.assign import assign
from ldctl.boxes import PAD_MULTIPLE, location_grid
from ldctl.distributed import reduce_mean
from ldctl.losses import LossSpec, detection_losses, normalizer
from ldctl.models.detector import Detector
from ldctl.regions import all_region, main_region, vlr_region
from ldctl.spec import DistillationSpec
from ldctl.types import Batch, Dense, Pair, Targets, Where


def training_losses(
    student: Callable[[Tensor], Dense],
    detector: Detector,
    teacher: Detector | None,
    batch: Batch,
    losses: LossSpec,
    distill: DistillationSpec | None,
    *,
    parts: int = 1,
    num_positive: Float[Tensor, ""] | None = None,
    bf16: bool = False,
) -> dict[str, Float[Tensor, ""]]:
    """Return every weighted loss of a batch by name; their sum is what training minimises.

    Args:
        student: Images to predictions: `detector`, or what wraps it for several ranks.
        detector: The detector that is trained.
        teacher: Frozen and in evaluation mode; none trains a plain detector.
        batch: On the detector's device.
        losses: Weights of the detection losses.
        distill: What to learn from the teacher; given exactly when a teacher is.
        parts: Micro-batches of the step, of which this batch is one.
        num_positive: What the class losses are divided by, over the whole step; counted if left out.
        bf16: Run both networks, but nothing of the losses, in bfloat16.
    """
    assert (teacher is None) == (distill is None)
    autocast = torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16)
    images = detector.normalize(batch.images, batch.size_hw)  # the teacher's statistics are the same constants
    with autocast:
        dense = student(images)
    assigned = assign(dense.locations, batch.targets, padded_hw(batch.size_hw), detector.num_classes)
    main = main_region(dense.cls, assigned, dense.locations)  # synchronises: number of positives
    norm = normalizer(distill.normalize if distill else "synced", assigned, main, parts=parts)
    if num_positive is not None:
        norm = replace(norm, num_positive=num_positive)
    named = detection_losses(losses, dense, assigned, main, norm)
    if teacher is None or distill is None:
        return named

    with torch.no_grad(), autocast:
        pair = Pair(student=dense, teacher=teacher(images))
    where: dict[str, Where] = {"main": main}
    used = {term.region for term in distill.terms}
    if "vlr" in used:
        where["vlr"] = vlr_region(distill, assigned, batch.targets, dense.locations)  # synchronises: size of the VLR
    if "all" in used:
        where["all"] = all_region(assigned, dense.locations)
    return named | {term.name: term(pair, where[term.region], norm) for term in distill.terms}


def count_positive(detector: Detector, batch: Batch) -> Float[Tensor, ""]:
    """Count the positives of a batch, at least one per image, averaged over ranks; needs no prediction."""
    height, width = batch.images.shape[-2:]
    sizes_hw = tuple((-(-height // stride), -(-width // stride)) for stride in detector.strides)
    locations = location_grid(sizes_hw, detector.strides, batch.images.device)
    assigned = assign(locations, batch.targets, padded_hw(batch.size_hw), detector.num_classes)
    return reduce_mean(assigned.is_positive.sum(dim=1).clamp(min=1).sum().float())


def padded_hw(size_hw: Int[Tensor, "B 2"]) -> Int[Tensor, "B 2"]:
    """Return each image's height and width, rounded up to a multiple of 32."""
    return (size_hw + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal micro-batches."""
    size = len(batch.image_id) // parts
    cuts = [slice(index * size, (index + 1) * size) for index in range(parts)]
    return [
        Batch(
            batch.images[cut],
            batch.size_hw[cut],
            batch.original_hw[cut],
            batch.image_id[cut],
            Targets(*(value[cut] for value in vars(batch.targets).values())),
        )
        for cut in cuts
    ]
