"""One training step, from a batch to its losses: the whole method on one screen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldctl.assign import assign
from ldctl.boxes import PAD_MULTIPLE, location_grid
from ldctl.distill.crosskd import aligned_towers
from ldctl.distributed import reduce_mean
from ldctl.losses import LossSpec, detection_losses, normalizer
from ldctl.models.detector import Detector
from ldctl.pairing import SharedClasses, in_teachers_levels, share_assigned, share_classes, share_levels
from ldctl.regions import main_region, region
from ldctl.spec import DistillationSpec
from ldctl.types import Batch, Dense, Pair, Scaled, Targets, Where


@dataclass(frozen=True)
class Teaching:
    """From whom a student learns, and what.

    Attributes:
        teacher: Frozen, in evaluation mode, on the student's device.
        spec: The terms and their regions.
        sha256: Hash of the teacher's file.
        shared: The classes that both know; none where they have the same in the same order.
        scale: At how many times the student's scale the teacher sees an image; a power of two.
    """

    teacher: Detector
    spec: DistillationSpec
    sha256: str
    shared: SharedClasses | None = None
    scale: float = 1.0

    @property
    def level_shift(self) -> int:
        """Return how many levels coarser the teacher's pyramid level is that matches one of the student's."""
        return round(math.log2(self.scale))


class Learner(nn.Module):
    """The student as training sees it: a detector, and adapters where its maps are narrower than the teacher's.

    Whatever of it learns is in the optimizer and in the saved state; checkpoints hold the detector alone.
    """

    def __init__(self, detector: Detector, teaching: Teaching | None) -> None:
        super().__init__()
        self.detector = detector
        self.adapters = nn.ModuleDict()
        self.cut = teaching.spec.tower_cut if teaching else 0
        if teaching:
            own, wanted = detector.spec.channels, teaching.teacher.spec.channels
            names = teaching.spec.compared_maps if own != wanted else ()
            # one for all levels, as the head that reads them is one
            self.adapters.update({name: nn.Conv2d(own, wanted, kernel_size=1) for name in names})

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Dense:
        """Return the detector's predictions, with maps as wide as the teacher's where terms compare those."""
        dense: Dense = self.detector(images, self.cut)
        towers = replace(
            dense.towers, cls=self._adapt("cls", dense.towers.cls), edge=self._adapt("edge", dense.towers.edge)
        )
        return replace(dense, features=self._adapt("features", dense.features), towers=towers)

    def _adapt(self, name: str, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.adapters[name](each) for each in maps) if name in self.adapters else maps


def training_losses(
    learner: Callable[[Tensor], Dense],
    detector: Detector,
    teaching: Teaching | None,
    batch: Batch,
    losses: LossSpec,
    *,
    parts: int = 1,
    num_positive: Float[Tensor, ""] | None = None,
    bf16: bool = False,
) -> dict[str, Float[Tensor, ""]]:
    """Return every weighted loss of a batch by name; their sum is what training minimises.

    Args:
        learner: Images to predictions: a `Learner`, or what wraps it for several ranks.
        detector: The detector that is trained.
        teaching: The teacher and what to learn from it; none trains a plain detector.
        batch: On the detector's device.
        losses: Weights of the detection losses.
        parts: Micro-batches of the step, of which this batch is one.
        num_positive: What the class losses are divided by, over the whole step; counted if left out.
        bf16: Run both networks, but nothing of the losses, in bfloat16.
    """
    autocast = torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16)
    images = detector.normalize(batch.images, batch.size_hw)
    with autocast:
        dense = learner(images)
    assigned = assign(dense.locations, batch.targets, padded_hw(batch.size_hw), detector.num_classes)
    main = main_region(dense.cls, assigned, dense.locations)  # synchronises: number of positives
    norm = normalizer(teaching.spec.normalize if teaching else "synced", assigned, main, parts=parts)
    if num_positive is not None:
        norm = replace(norm, num_positive=num_positive)
    named = detection_losses(losses, dense, assigned, main, norm)
    if teaching is None:
        return named

    with autocast:
        pair = compare(teaching, batch, images, dense)
    if shift := teaching.level_shift:
        pair, assigned = share_levels(pair, shift), share_assigned(assigned, dense.locations, shift)
        main = main_region(pair.student.cls, assigned, pair.student.locations)  # synchronises, as above
    where: dict[str, Where] = {"main": main}
    for name in sorted({term.region for term in teaching.spec.terms} - {"main"}):
        where[name] = region(name, teaching.spec, pair, assigned, batch.targets)  # synchronises, but for "all"
    pair = share_classes(pair, teaching.shared)
    return named | {term.name: term(pair, where[term.region], norm) for term in teaching.spec.terms}


def compare(teaching: Teaching, batch: Batch, images: Float[Tensor, "B 3 H W"], student: Dense) -> Pair:
    """Return what student and teacher say of the same views, at all levels and of all classes.

    If a term asks, also what the teacher's head makes of the student's maps. The teacher is frozen, but cross-head
    predictions carry gradient through its head to the student.

    Args:
        teaching: The teacher, and what is learnt from it.
        batch: What the teacher sees, where that is of another scale.
        images: What the student saw; the teacher's input statistics are the same constants.
        student: The student's predictions.
    """
    cut, towers, seen = teaching.spec.tower_cut, teaching.spec.crossed_towers, images
    if batch.for_teacher is not None:
        seen = teaching.teacher.normalize(batch.for_teacher.images, batch.for_teacher.size_hw)
    with torch.no_grad():
        teacher: Dense = teaching.teacher(seen, cut)
    if not towers:
        return Pair(student, teacher)
    maps = in_teachers_levels(student.towers, teacher.towers, teaching.level_shift)
    aligned = aligned_towers(maps, teacher.towers, towers)
    return Pair(student, teacher, crossed=teaching.teacher.head.resume(aligned, cut, teacher.features))


def gradient_shares(losses: dict[str, Float[Tensor, ""]], detector: Detector) -> Float[Tensor, " K"]:
    """Return each loss's share of the gradient at the pyramid's output layers, which all of them pass: norm over sum.

    Costs a backward pass through the head for each loss; leaves the graph and the parameters' gradients alone.

    Returns:
        Values in [0, 1] in the order of the losses; their sum is 1 unless no loss has a gradient.

    Source: gradients at the last shared layer are compared as in GradNorm (ICML 2018, arXiv:1711.02257).
    """
    weights = list(detector.fpn.output.parameters())
    norms = []
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
    stacked = torch.stack(norms)
    return stacked / stacked.sum().clamp(min=torch.finfo(stacked.dtype).tiny)


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
            batch.for_teacher and Scaled(batch.for_teacher.images[cut], batch.for_teacher.size_hw[cut]),
        )
        for cut in cuts
    ]
