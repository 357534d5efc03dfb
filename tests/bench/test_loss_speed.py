"""The loss part of a step by itself, at 16 x 800 x 1344: assignment, regions, detection losses, LD, VLR-LD and KD."""

import pytest
import runs
import torch
from figures import coco_like, medians, mmdet_ms, peak_mb, report, threads
from scenes import NO_MAPS, grid
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ldctl.assign import assign
from ldctl.boxes import box_area, center_penalty, encode_ltrb, intersection, prior_boxes
from ldctl.distill import KD, LD
from ldctl.distillation import DistillationSpec
from ldctl.losses import LossSpec, detection_losses, distribution_focal_loss, giou_loss, normalizer, positives
from ldctl.models.detector import Detector, ModelSpec
from ldctl.step import Lesson, Teaching, distillation_losses, look
from ldctl.types import Assigned, Dense, Pair, Targets, Where

IMAGES, HEIGHT, WIDTH, CLASSES, BINS, ROUNDS = 16, 800, 1344, 80, 17, 5
SPEC = DistillationSpec(terms=(LD(), LD(region="vlr", weight=0.0625), KD()), normalize="reference")
PAD_HW = torch.tensor([[HEIGHT, WIDTH]]).expand(IMAGES, 2)
LOCATIONS = grid(HEIGHT, WIDTH)


def outputs(seed: int) -> Dense:
    generator, count = torch.Generator().manual_seed(seed), len(LOCATIONS.level)
    cls = torch.randn(IMAGES, count, CLASSES, generator=generator) - 3
    return Dense(cls, torch.randn(IMAGES, count, 4, BINS, generator=generator), (), NO_MAPS, LOCATIONS)


class Losses:
    """The losses of fixed outputs and their gradients: as the step computes them, and as the papers' formulas read."""

    def __init__(self, num_objects: int) -> None:
        self.targets = coco_like(IMAGES, num_objects, HEIGHT, WIDTH, CLASSES)
        self.student, self.teacher = outputs(0), outputs(1)
        self.leaves = (self.student.cls.requires_grad_(), self.student.edge.requires_grad_())
        self.teaching = Teaching(Detector(ModelSpec.model_validate(runs.MODEL), CLASSES), SPEC, "0")

    def backward(self, losses: list[Tensor]) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.grad = None
        torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    def regions(self) -> None:
        assigned = assign(LOCATIONS, self.targets, PAD_HW, CLASSES)
        with torch.no_grad():
            look(self.student, self.teaching, assigned, self.targets)

    def ours(self) -> list[Tensor]:
        assigned = assign(LOCATIONS, self.targets, PAD_HW, CLASSES)
        seen = look(self.student, self.teaching, assigned, self.targets)
        norm = normalizer("reference", assigned, seen.where["main"])
        own = detection_losses(LossSpec(), self.student, seen.at["main"], assigned, seen.where["main"], norm)
        lesson = Lesson(Pair(self.student, self.teacher), self.targets, assigned, norm)
        return self.backward([*own.values(), *distillation_losses(self.teaching, lesson, seen).values()])

    def naive(self) -> list[Tensor]:
        assigned = assigned_one_by_one(self.targets)
        main = rows_of(assigned.is_positive.float())
        main = Where(**{**vars(main), "weight": self.student.best_score.detach().flatten()[main.picked]})
        norm = normalizer("reference", assigned, main)
        found = positives(self.student.at([main.picked])[0], assigned, main)
        target = torch.zeros_like(self.student.cls)
        target.flatten(0, 1)[main.row, assigned.label.flatten()[main.row]] = 1 - giou_loss(found).detach().clamp(max=1)
        score = self.student.cls.sigmoid()
        entropy = binary_cross_entropy_with_logits(self.student.cls, target, reduction="none")
        ltrb = encode_ltrb(found.xy, found.gt_xyxy, found.xy.new_ones(len(found.xy)))
        losses = [
            ((target - score).abs() ** 2 * entropy).sum() / norm.num_positive,
            2 * (giou_loss(found) * main.weight).sum() / norm.weight_sum,
            0.25 * (distribution_focal_loss(found.edge, ltrb) * main.weight).sum() / norm.weight_sum,
        ]
        where = {"main": main, "vlr": rows_of(dense_vlr(self.targets, assigned.threshold))}
        pair = Pair(self.student, self.teacher)
        return self.backward(losses + [term(pair, where[term.region], norm) for term in SPEC.terms])


def rows_of(weight: Tensor) -> Where:
    row = (weight.flatten() > 0).nonzero()[:, 0]
    count = len(LOCATIONS.level)
    return Where(row, weight.flatten()[row], LOCATIONS.level[row % count], row // count, IMAGES, 5)


def dense_vlr(targets: Targets, threshold: Tensor) -> Tensor:
    """Compare every prior box with every object."""
    prior, gt = prior_boxes(LOCATIONS)[None, :, None], targets.gt_xyxy[:, None]
    shared = intersection(prior, gt)
    iou = shared / (box_area(prior) + box_area(gt) - shared).clamp(min=1e-6)
    overlap = iou - center_penalty(prior, gt)
    in_band = (0.25 * threshold[:, None] <= overlap) & (overlap < threshold[:, None])
    return iou.where(in_band, 0.0).amax(dim=-1)


def assigned_one_by_one(targets: Targets) -> Assigned:
    """ATSS image by image and level by level, over all prior boxes."""
    found = []
    for gt_xyxy, label in zip(targets.gt_xyxy, targets.gt_label, strict=True):
        prior, gt = prior_boxes(LOCATIONS)[:, None], gt_xyxy[None]
        shared = intersection(prior, gt)
        iou = shared / (box_area(prior) + box_area(gt) - shared).clamp(min=1e-6)
        center = (gt_xyxy[:, :2] + gt_xyxy[:, 2:]) / 2
        distance = torch.cdist(LOCATIONS.xy, center)
        start, candidates = 0, []
        for size in LOCATIONS.level_sizes:
            nearest = distance[start : start + size].topk(min(9, size), dim=0, largest=False).indices
            candidates.append(nearest + start)
            start += size
        index = torch.cat(candidates)
        overlap = iou.gather(0, index)
        threshold = overlap.mean(dim=0) + overlap.std(dim=0)
        xy = LOCATIONS.xy[index]
        inside = torch.cat((xy - gt_xyxy[:, :2], gt_xyxy[:, 2:] - xy), dim=-1).amin(dim=-1) > 0.01
        claimed = torch.full_like(iou, -1).scatter(0, index, overlap.where((overlap >= threshold) & inside, -1))
        best, owner = claimed.max(dim=1)
        is_positive = best >= 0
        own = gt_xyxy[owner] * is_positive[:, None]
        found.append((label[owner].where(is_positive, CLASSES), own, is_positive, threshold))
    labels, boxes, is_positive, thresholds = (torch.stack(values) for values in zip(*found, strict=True))
    return Assigned(
        label=labels,
        gt_xyxy=boxes,
        is_positive=is_positive,
        is_valid=torch.ones_like(is_positive),
        is_ignored=torch.zeros_like(is_positive),
        threshold=thresholds,
    )


@pytest.mark.bench
@pytest.mark.parametrize("num_objects", [7, 50])
def test_loss_part(num_objects: int) -> None:
    with threads(2):
        losses = Losses(num_objects)
        ours, naive = losses.ours(), losses.naive()
        assert torch.allclose(torch.stack(ours[1:]), torch.stack(naive[1:]), rtol=1e-3)
        peak = peak_mb(losses.ours)
        seconds = medians({"ours": losses.ours, "regions": losses.regions, "naive": losses.naive}, ROUNDS)
    report(
        what="loss part, forward and backward",
        objects=num_objects,
        ms=seconds["ours"] * 1e3,
        regions_ms=seconds["regions"] * 1e3,
        naive_ms=seconds["naive"] * 1e3,
        ratio=seconds["ours"] / seconds["naive"],
        peak_mb=peak,
    )
    size = ("--bs", str(IMAGES), "--hw", str(HEIGHT), str(WIDTH), "--gts", str(num_objects))
    if theirs := mmdet_ms("loss", "--kind", "ld", *size):
        targets = theirs["of which get_targets (valid flags, ATSS, unmap)"]
        report(
            what="loss part of mmdet, without VLR and KD",
            objects=num_objects,
            ms=theirs["TOTAL"],
            targets_ms=targets,
            ratio=seconds["ours"] * 1e3 / theirs["TOTAL"],
            regions_ratio=seconds["regions"] * 1e3 / targets,
        )
    assert seconds["ours"] < 0.6 * seconds["naive"]
    assert peak < 2048
