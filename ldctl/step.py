"""One training step, from a batch to its losses: the whole method on one screen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ldctl.assign import RULES
from ldctl.boxes import PAD_MULTIPLE
from ldctl.data.teacher_cache import TeacherCache
from ldctl.distill import PredictionTerm
from ldctl.distill.crosskd import aligned_towers
from ldctl.distillation import DistillationSpec
from ldctl.distributed import reduce_mean, world_size
from ldctl.losses import (
    LossSpec,
    by_centerness,
    centerness_losses,
    detection_losses,
    normalizer,
    overlap_losses,
    positive_count,
)
from ldctl.models.detector import Detector, PostprocessSpec
from ldctl.models.pseudo import pseudo_objects
from ldctl.pairing import (
    SharedClasses,
    in_teachers_levels,
    of_classes,
    of_images,
    recall,
    share_assigned,
    share_classes,
    share_levels,
)
from ldctl.regions import DRAWN, Region, RegionSpec, draw, main_region, region
from ldctl.types import Assigned, Batch, Dense, Locations, Normalizer, Pair, Scaled, Targets, TeacherRows, Where

# By kind of head.
OWN_LOSSES = {
    "gfl": detection_losses,
    "gflv2": detection_losses,
    "atss": centerness_losses,
    "fcos": centerness_losses,
    "retina": overlap_losses,
}


@dataclass(frozen=True)
class Teaching:
    """From whom a student learns, and what.

    Attributes:
        teacher: Frozen, in evaluation mode, on the student's device; none where a cache says what it would.
        spec: The terms and their regions.
        sha256: Hash of the teacher's file.
        shared: The classes that both know; none where they have the same in the same order.
        scale: At how many times the student's scale the teacher sees an image; a power of two.
        pseudo: Which of its detections stand for objects in unlabelled images; none where there are no such images.
        cache: What the teacher says of each view, wherever the terms look; batches come with their part of it.
    """

    teacher: Detector | None
    spec: DistillationSpec
    sha256: str
    shared: SharedClasses | None = None
    scale: float = 1.0
    pseudo: PostprocessSpec | None = None
    cache: TeacherCache | None = None

    @property
    def detector(self) -> Detector:
        """Return the teacher itself; only where there is no cache."""
        assert self.teacher is not None, "whatever asks for it was refused with a cache"
        return self.teacher

    @property
    def level_shift(self) -> int:
        """Return how many levels coarser the teacher's pyramid level is that matches one of the student's."""
        return round(math.log2(self.scale))

    @property
    def changes_lesson(self) -> bool:
        """Return whether the terms look at other objects or levels than the detection losses do."""
        return self.level_shift != 0 or self.pseudo is not None


@dataclass(frozen=True)
class Lesson:
    """What distillation terms and their regions look at.

    Attributes:
        pair: What student and teacher say.
        targets: The objects; in unlabelled images those that the teacher finds.
        assigned: Which location answers for which object.
        norm: What losses are divided by.
    """

    pair: Pair
    targets: Targets
    assigned: Assigned
    norm: Normalizer


@dataclass(frozen=True)
class Seen:
    """Regions that the objects decide, and what a detector says there.

    Attributes:
        where: The regions.
        at: The predictions in those of them in which predictions are compared.
    """

    where: dict[Region, Where]
    at: dict[Region, Dense]


class Learner(nn.Module):
    """The student as training sees it: a detector, and adapters where its maps are narrower than the teacher's.

    Whatever of it learns is in the optimizer and in the saved state; checkpoints hold the detector alone.
    """

    def __init__(self, detector: Detector, teaching: Teaching | None) -> None:
        super().__init__()
        self.detector = detector
        self.adapters = nn.ModuleDict()
        self.cut = teaching.spec.tower_cut if teaching else 0
        if teaching and teaching.spec.compared_maps:
            own, wanted = detector.spec.channels, teaching.detector.spec.channels
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
    with autocast:
        dense = learner(detector.normalize(batch.images, batch.size_hw))
    assigned = assign_labelled(detector, dense.locations, batch)
    seen = look(dense, teaching if teaching and not teaching.changes_lesson else None, assigned, batch.targets)
    main, at_main = seen.where["main"], seen.at["main"]
    has_centerness = detector.spec.head.has_centerness
    boxes = by_centerness(main, assigned, dense.locations) if has_centerness else main
    norm = normalizer(teaching.spec.normalize if teaching else "synced", assigned, boxes, parts=parts)
    if num_positive is not None:
        norm = replace(norm, num_positive=num_positive)
    named = OWN_LOSSES[detector.spec.head.kind](losses, dense, at_main, assigned, boxes, norm)
    if teaching is None:
        return named
    if batch.taught is not None:
        return named | recalled_losses(teaching, batch.taught, seen, norm)

    with autocast:
        pair = compare(teaching, seen_by_teacher(teaching, batch), dense)
    lesson = Lesson(pair, batch.targets, assigned, norm)
    if teaching.changes_lesson:
        lesson = made_comparable(lesson, detector, teaching, batch, parts=parts)
        seen = look(lesson.pair.student, teaching, lesson.assigned, lesson.targets)
    return named | distillation_losses(teaching, lesson, seen)


def look(dense: Dense, teaching: Teaching | None, assigned: Assigned, targets: Targets) -> Seen:
    """Draw the main region and those of a teacher's terms, and gather the predictions there; see `draw`.

    Args:
        dense: The student's predictions.
        teaching: Whose terms to look for; none looks at the main region alone.
        assigned: Which location answers for which object.
        targets: The objects.
    """
    terms = teaching.spec.terms if teaching else ()
    asked = {"main", *(term.region for term in terms)}
    compared = {"main", *(term.region for term in terms if isinstance(term, PredictionTerm))}
    spec = teaching.spec if teaching else RegionSpec()
    where = draw([name for name in DRAWN if name in asked], spec, dense, assigned, targets)
    gathered = {name: region.picked for name, region in where.items() if name in compared}
    return Seen(where, dict(zip(gathered, dense.at(list(gathered.values())), strict=True)))


def distillation_losses(teaching: Teaching, lesson: Lesson, seen: Seen) -> dict[str, Float[Tensor, ""]]:
    """Return the loss of each term by name.

    Args:
        teaching: The terms.
        lesson: What they look at.
        seen: The regions that the objects decide, and the student's predictions there.
    """
    asked = {term.region for term in teaching.spec.terms if isinstance(term, PredictionTerm)}
    own = {name: at for name, at in seen.at.items() if name in asked}  # elsewhere the teacher's locations may be others
    theirs = lesson.pair.teacher.at([seen.where[name].picked for name in own]) if own else []
    pairs = zip(own, own.values(), theirs, strict=True)
    pair_at = {name: share_classes(Pair(student, teacher), teaching.shared) for name, student, teacher in pairs}
    pair, where = share_classes(lesson.pair, teaching.shared), dict(seen.where)
    for name in sorted({term.region for term in teaching.spec.terms} - where.keys()):
        where[name] = region(name, teaching.spec, pair, lesson.assigned, lesson.targets)
    losses = {}
    for term in teaching.spec.terms:
        if isinstance(term, PredictionTerm) and term.region in pair_at:
            gathered = replace(where[term.region], row=slice(None))
            losses[term.name] = term(pair_at[term.region], gathered, lesson.norm)
        else:
            losses[term.name] = term(pair, where[term.region], lesson.norm)
    return losses


def recalled_losses(
    teaching: Teaching, taught: TeacherRows, seen: Seen, norm: Normalizer
) -> dict[str, Float[Tensor, ""]]:
    """Return the loss of each term by name, with what a cache tells in the place of the teacher.

    Rounding may put a location at the rim of a region elsewhere than where the cache was made: it counts nothing then.

    Args:
        teaching: The terms.
        taught: What the cache tells of the batch.
        seen: The regions, and the student's predictions there.
        norm: What losses are divided by.
    """
    losses = {}
    asked = {term.region for term in teaching.spec.terms}
    recalled = {name: recall(taught, name, seen.where[name].picked, seen.at[name]) for name in asked}
    for term in teaching.spec.terms:
        assert isinstance(term, PredictionTerm), "others were refused"
        where, there = seen.where[term.region], recalled[term.region]
        gathered = replace(where, row=slice(None), weight=where.weight * there.is_told)
        losses[term.name] = term(Pair(seen.at[term.region], there.teacher), gathered, norm)
    return losses


def seen_by_teacher(teaching: Teaching, batch: Batch) -> Float[Tensor, "B 3 h w"]:
    """Return the student's views at the teacher's scale, normalized as the teacher's own backbone expects."""
    seen = batch.for_teacher or batch
    return teaching.detector.normalize(seen.images, seen.size_hw)


def compare(teaching: Teaching, images: Float[Tensor, "B 3 H W"], student: Dense) -> Pair:
    """Return what the teacher says of the same views; if a term asks, also what its head makes of the student's maps.

    The teacher is frozen, but cross-head predictions carry gradient through its head to the student.

    Args:
        teaching: The teacher, and what is learnt from it.
        images: What the teacher sees.
        student: What the student says; all its levels and classes, as the teacher's, are in the result.
    """
    cut, towers = teaching.spec.tower_cut, teaching.spec.crossed_towers
    with torch.no_grad():
        teacher: Dense = teaching.detector(images, cut)
    if not towers:
        return Pair(student, teacher)
    maps = in_teachers_levels(student.towers, teacher.towers, teaching.level_shift)
    aligned = aligned_towers(maps, teacher.towers, towers)
    return Pair(student, teacher, crossed=teaching.detector.head.resume(aligned, cut, teacher.features))


def assign_by_head(detector: Detector, locations: Locations, targets: Targets, batch: Batch) -> Assigned:
    """Assign objects to locations by the rule of the detector's head."""
    rule = RULES[detector.spec.head.traits.assignment]
    return rule(locations, targets, padded_hw(batch.size_hw), detector.num_classes)


def assign_labelled(detector: Detector, locations: Locations, batch: Batch) -> Assigned:
    """Assign the annotated objects; no location of an unlabelled image is valid, so that no detection loss sees it."""
    assigned = assign_by_head(detector, locations, batch.targets, batch)
    return assigned if batch.is_labelled is None else of_images(assigned, batch.is_labelled)


def made_comparable(lesson: Lesson, detector: Detector, teaching: Teaching, batch: Batch, *, parts: int) -> Lesson:
    """Return the lesson with objects in all images, at the levels that student and teacher share."""
    if batch.is_labelled is not None:
        lesson = with_pseudo_objects(lesson, detector, teaching, batch, batch.is_labelled, parts=parts)  # synchronises
    if teaching.level_shift:
        lesson = on_shared_levels(lesson, teaching.level_shift)
    return lesson


def with_pseudo_objects(
    lesson: Lesson, detector: Detector, teaching: Teaching, batch: Batch, is_labelled: Bool[Tensor, " B"], *, parts: int
) -> Lesson:
    """Return the lesson with what the teacher finds in unlabelled images as their objects; labelled ones keep theirs.

    Normalisers count over all images, since all teach. What they count depends on predictions here, so that of several
    micro-batches each counts its own.

    Args:
        lesson: Of the labelled images, at all levels and of all classes.
        detector: The student.
        teaching: The teacher, and which of its detections count.
        batch: The images.
        is_labelled: Which images need none.
        parts: Micro-batches of the step.
    """
    assert teaching.pseudo is not None, "said with the images"
    student = lesson.pair.student
    seen = batch.for_teacher.size_hw if batch.for_teacher else batch.size_hw
    teacher, shared = lesson.pair.teacher, teaching.shared
    if shared:
        teacher = of_classes(teacher, shared.teacher)
    found = pseudo_objects(teacher, seen, ~is_labelled, teaching.pseudo)
    label = shared.student[found.gt_label] if shared else found.gt_label
    targets = Targets(
        gt_xyxy=torch.cat((lesson.targets.gt_xyxy, found.gt_xyxy / teaching.scale), dim=1),
        gt_label=torch.cat((lesson.targets.gt_label, label), dim=1),
        is_object=torch.cat((lesson.targets.is_object, found.is_object), dim=1),
    )
    assigned = assign_by_head(detector, student.locations, targets, batch)
    norm = normalizer(lesson.norm.kind, assigned, main_region(student, assigned), parts=parts)
    return Lesson(lesson.pair, targets, assigned, norm)


def on_shared_levels(lesson: Lesson, shift: int) -> Lesson:
    """Return the lesson at the levels that student and teacher share; what losses are divided by stays."""
    pair = share_levels(lesson.pair, shift)
    assigned = share_assigned(lesson.assigned, lesson.pair.student.locations, shift)
    return replace(lesson, pair=pair, assigned=assigned)


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
    """Count the positives of a batch, at least one per labelled image, averaged over ranks; needs no prediction."""
    height, width = batch.images.shape[-2:]
    sizes_hw = tuple((-(-height // stride), -(-width // stride)) for stride in detector.strides)
    locations = detector.head.locations(sizes_hw, batch.images.device)
    count = reduce_mean(positive_count(assign_labelled(detector, locations, batch)).float())
    return count.clamp(min=1 / world_size())  # without labelled images, the losses of those are 0 and have to stay so


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
            None if batch.is_labelled is None else batch.is_labelled[cut],
            batch.taught and rows_of(batch.taught, cut),
        )
        for cut in cuts
    ]


def rows_of(taught: TeacherRows, images: slice) -> TeacherRows:
    """Return the rows of some images that stand together, which count as images from 0 on."""
    before, until = taught.counts[: images.start], taught.counts[: images.stop]
    edges = slice(sum(count for count, _ in before), sum(count for count, _ in until))
    classes = slice(sum(count for _, count in before), sum(count for _, count in until))
    first = images.start * taught.num_locations
    return replace(
        taught,
        edge_row=taught.edge_row[edges] - first,
        edge=taught.edge[edges],
        cls_row=taught.cls_row[classes] - first,
        cls=taught.cls[classes],
        quality=None if taught.quality is None else taught.quality[classes],
        counts=taught.counts[images],
    )
