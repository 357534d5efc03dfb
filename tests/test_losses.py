"""Detection losses: golden values, closed forms, gradients, and what they are divided by."""

import math
from dataclasses import replace

import pytest
import torch
from scenes import grid, images_of, random_dense, random_targets, targets_of
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from ldctl.assign import assign
from ldctl.boxes import box_giou, decode_ltrb, expected_distance
from ldctl.fused import PIECE, focal_cross_entropy
from ldctl.losses import (
    LossSpec,
    by_centerness,
    centerness_losses,
    detection_losses,
    distribution_focal_loss,
    focal_loss,
    normalizer,
    quality_focal_loss,
)
from ldctl.regions import main_region, pick_rows
from ldctl.types import Assigned, Dense, Targets, joint_logit

CLASSES = 5
BINS = torch.arange(17, dtype=torch.float64)
STUDENT_EDGE, TEACHER_EDGE = 0.1 * BINS, -((BINS - 5) ** 2) / 8


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene(seed: int = 0, num_images: int = 3) -> tuple[Dense, Targets, Assigned]:
    locations = grid(128, 160)
    targets = random_targets(num_images, 128, CLASSES, seed)
    pad_hw = torch.tensor([[128, 160], [96, 64], [128, 128]])[:num_images]
    return random_dense(locations, num_images, CLASSES, seed), targets, assign(locations, targets, pad_hw, CLASSES)


def losses_of(
    dense: Dense, assigned: Assigned, kind: str = "synced", spec: LossSpec | None = None
) -> dict[str, Tensor]:
    main = main_region(dense, assigned)
    (at_main,) = dense.at([main.picked])
    return detection_losses(spec or LossSpec(), dense, at_main, assigned, main, normalizer(kind, assigned, main))


def one(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.float64)


def test_quality_focal_loss_golden_values() -> None:
    logit = torch.tensor([[-2.0, 0.5, 1.0]], dtype=torch.float64)
    positive = quality_focal_loss(logit, torch.tensor([[0.0, 0.8, 0.0]], dtype=torch.float64), one(1))
    assert positive.item() == pytest.approx(0.7217671683713964, rel=1e-12)
    assert quality_focal_loss(logit, torch.zeros_like(logit), one(1)).item() == pytest.approx(
        1.0810834671060352, rel=1e-12
    )


def test_quality_focal_loss_closed_forms() -> None:
    logit = uniform(50, 1, seed=0) * 12 - 6
    p, weight = logit.sigmoid(), uniform(50, seed=1)
    assert not quality_focal_loss(logit, p, one(50))  # the score equals its target
    zero, ones = torch.zeros_like(p), torch.ones_like(p)
    assert_close(quality_focal_loss(logit, zero, weight), (-weight * (p**2 * (1 - p).log()).squeeze(1)).sum())
    assert_close(quality_focal_loss(logit, ones, weight), (-weight * ((1 - p) ** 2 * p.log()).squeeze(1)).sum())
    assert_close(focal_cross_entropy(logit, ones, one(50), beta=1.0), (-(1 - p) * p.log()).sum())
    for value, expected in ((-200.0, 0.0), (200.0, 200.0)):
        assert quality_focal_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.ones(1)).item() == expected


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_cross_entropy_is_what_autograd_makes_of_the_formula(beta: float, alpha: float | None) -> None:
    """Over several pieces, the last of them short; with rows that do not count, and targets of 0."""
    num_classes = 7
    rows = 2 * (PIECE // num_classes) + 5
    logit = (uniform(rows, num_classes, seed=2) * 16 - 8).requires_grad_()
    target = (uniform(rows, num_classes, seed=3) - 0.7).clamp(min=0)
    weight = (uniform(rows, seed=4) - 0.2).clamp(min=0)
    balance = 1.0 if alpha is None else torch.where(target > 0, alpha, 1 - alpha)
    entropy = binary_cross_entropy_with_logits(logit, target, reduction="none")
    expected = (weight[:, None] * balance * (target - logit.sigmoid()).abs() ** beta * entropy).sum()
    found = focal_cross_entropy(logit, target, weight, beta=beta, alpha=alpha)
    assert_close(found, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * x, logit)[0] for x in (found, expected))
    assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_focal_loss_is_torchvisions() -> None:
    logit = (uniform(40, 6, seed=6) * 30 - 15).requires_grad_()
    target = (uniform(40, 6, seed=7) > 0.8).double()
    found = focal_loss(logit, target, one(40))
    expected = sigmoid_focal_loss(logit, target, alpha=0.25, gamma=2.0, reduction="sum")
    assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x, logit)[0] for x in (found, expected))
    assert_close(ours, theirs)
    half = torch.tensor([[0.0]], dtype=torch.float64)
    assert focal_loss(half, torch.ones_like(half), one(1)).item() == pytest.approx(0.25 * 0.25 * math.log(2))


def test_centerness_by_hand() -> None:
    """Locations in a box of 8 by 4 strides: at its centre, beside it, and in a corner's middle."""
    locations = grid(64, 64)
    targets = targets_of([[(0.0, 0.0, 64.0, 32.0, 1)]])
    assigned = assign(locations, targets, torch.tensor([[64, 64]]), CLASSES)
    assigned = replace(assigned, gt_xyxy=targets.gt_xyxy.expand(1, len(locations.level), 4))
    mask = torch.zeros(1, len(locations.level), dtype=torch.bool)
    mask[0, [1 * 8 + 2, 2 * 8 + 2, 2 * 8 + 4]] = True  # (16, 8), (16, 16), (32, 16)
    main = pick_rows({"main": mask.float()}, locations)["main"]
    assert by_centerness(main, assigned, locations).weight.tolist() == pytest.approx([1 / 3, (1 / 3) ** 0.5, 1.0])


@pytest.mark.parametrize("kind", ["synced", "reference"])
def test_losses_with_centerness_written_out(kind: str) -> None:
    """The three losses as loops over images, locations and classes, in float64; the boxes' GIoU is tested elsewhere."""
    dense, _, assigned = scene()
    dense = replace(dense, quality=uniform(*dense.cls.shape[:2], seed=20).float() * 6 - 3)
    focal = giou = bce = weights = 0.0
    positives = [0, 0, 0]
    for image, index in assigned.is_valid.nonzero().tolist():
        label = assigned.label[image, index].item()
        if assigned.is_positive[image, index]:
            stride, xy = dense.locations.stride[index].double(), dense.locations.xy[index].double()
            ltrb = dense.edge.detach()[image, index].double().softmax(dim=-1) @ BINS * stride
            gt = assigned.gt_xyxy[image, index].double()
            left, top, right, bottom = xy[0] - gt[0], xy[1] - gt[1], gt[2] - xy[0], gt[3] - xy[1]
            central = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)) ** 0.5
            giou += central * (1 - box_giou(torch.cat((xy - ltrb[:2], xy + ltrb[2:])), gt))
            p = dense.quality[image, index].double().sigmoid()
            bce -= central * p.log() + (1 - central) * (1 - p).log()
            weights += central
            positives[image] += 1
        for number, logit in enumerate(dense.cls.detach()[image, index].double()):
            p = logit.sigmoid()
            is_object = number == label
            focal -= 0.25 * (1 - p) ** 2 * p.log() if is_object else 0.75 * p**2 * (1 - p).log()
    main = by_centerness(main_region(dense, assigned), assigned, dense.locations)
    norm, (at_main,) = normalizer(kind, assigned, main), dense.at([main.picked])
    found = centerness_losses(LossSpec(), dense, at_main, assigned, main, norm)
    num_positive = sum(max(count, 1) for count in positives)
    assert weights > 1
    assert found.keys() == {"focal", "giou", "centerness"}
    assert found["focal"].item() == pytest.approx((focal / num_positive).item(), rel=1e-5)
    assert found["giou"].item() == pytest.approx((2 * giou / weights).item(), rel=1e-5)
    assert found["centerness"].item() == pytest.approx((bce / num_positive).item(), rel=1e-5)
    weighted = centerness_losses(LossSpec(focal=3.0, giou=4.0, centerness=5.0), dense, at_main, assigned, main, norm)
    for name, factor in (("focal", 3.0), ("giou", 2.0), ("centerness", 5.0)):
        assert_close(weighted[name], factor * found[name])


def test_losses_with_centerness_without_positives() -> None:
    dense = random_dense(grid(64, 64), 2, CLASSES, 0)
    dense = replace(dense, quality=torch.zeros(2, dense.cls.shape[1], requires_grad=True))
    assigned = assign(dense.locations, targets_of([[], []]), torch.full((2, 2), 64), CLASSES)
    main = by_centerness(main_region(dense, assigned), assigned, dense.locations)
    (at_main,) = dense.at([main.picked])
    found = centerness_losses(LossSpec(), dense, at_main, assigned, main, normalizer("synced", assigned, main))
    assert found["giou"].item() == found["centerness"].item() == 0.0
    sum(found.values()).backward()
    assert not dense.edge.grad.any()
    assert not dense.quality.grad.any()
    assert dense.cls.grad.all()


def test_joint_logit_is_the_logit_of_the_product() -> None:
    cls, quality = (uniform(200, seed=seed) * 30 - 15 for seed in (8, 9))
    product = cls.sigmoid() * quality.sigmoid()
    assert_close(joint_logit(cls, quality), (product / (1 - product)).log(), rtol=1e-7, atol=1e-9)
    assert_close(joint_logit(cls.float(), quality.float()).sigmoid(), product.float(), rtol=1e-5, atol=0)
    # beyond what a probability in float32 can tell apart from 0 and 1
    extreme = joint_logit(torch.tensor([-200.0, 200.0, 200.0, 0.0]), torch.tensor([-300.0, 90.0, 200.0, 400.0]))
    assert_close(extreme, torch.tensor([-500.0, 90.0, 200.0 - math.log(2), 0.0]), rtol=1e-6, atol=1e-6)


def test_quality_focal_loss_of_a_product() -> None:
    cls, quality = uniform(50, 4, seed=10) * 8 - 4, uniform(50, 1, seed=11) * 8 - 4
    target = uniform(50, 4, seed=12)
    p = cls.sigmoid() * quality.sigmoid()
    expected = (target - p).abs() ** 2 * -(target * p.log() + (1 - target) * (1 - p).log())
    assert_close(quality_focal_loss(joint_logit(cls, quality), target, one(50)), expected.sum())
    inputs = (cls[:3].requires_grad_(), quality[:3].requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: quality_focal_loss(joint_logit(x, y), target[:3], one(3)), inputs)


def test_distribution_focal_loss_golden_values() -> None:
    edge = torch.stack((STUDENT_EDGE, TEACHER_EDGE))[:, None].expand(2, 4, 17)
    target = torch.full((2, 4), 5.3, dtype=torch.float64)
    expected = torch.tensor([3.2204395653766453, 1.6468540099591742], dtype=torch.float64)
    assert_close(distribution_focal_loss(edge, target), expected, rtol=1e-12, atol=0)


def test_distribution_focal_loss_closed_forms() -> None:
    uniform_edge = torch.zeros(1, 4, 17, dtype=torch.float64)
    for target in (0.0, 3.0, 7.25, 15.9):
        found = distribution_focal_loss(uniform_edge, torch.full((1, 4), target, dtype=torch.float64))
        assert found.item() == pytest.approx(math.log(17), rel=1e-12)
    # the least possible: the entropy of the two bins' shares
    share = torch.tensor([0.7, 0.3], dtype=torch.float64)
    best = torch.full((1, 4, 17), -1e4, dtype=torch.float64)
    best[..., 5:7] = share.log()
    target = torch.full((1, 4), 5.3, dtype=torch.float64)
    assert distribution_focal_loss(best, target).item() == pytest.approx(-(share * share.log()).sum().item(), rel=1e-9)
    assert distribution_focal_loss(best.flip(-1), target).item() > 1000


@pytest.mark.parametrize(("target", "clamped"), [(-3.0, 0.0), (16.0, 15.9), (400.0, 15.9)])
def test_distribution_targets_are_clamped(target: float, clamped: float) -> None:
    edge = uniform(1, 4, 17, seed=1)
    found, expected = (
        distribution_focal_loss(edge, torch.full((1, 4), value, dtype=torch.float64)) for value in (target, clamped)
    )
    assert torch.equal(found, expected)


def test_distribution_target_on_the_last_bins_of_a_short_distribution() -> None:
    edge = torch.zeros(1, 4, 9)
    edge[..., 8] = 5.0
    found = distribution_focal_loss(edge, torch.full((1, 4), 100.0))
    log_p = edge[0, 0].log_softmax(dim=0)
    assert found.item() == pytest.approx(-(0.1 * log_p[7] + 0.9 * log_p[8]).item(), rel=1e-5)


def test_gradients() -> None:
    logit = (uniform(3, 4, seed=2) * 6 - 3).requires_grad_()
    target = uniform(3, 4, seed=3)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, target, uniform(3, seed=4)), (logit,))
    edge = (uniform(3, 4, 9, seed=4) * 4).requires_grad_()
    ltrb = uniform(3, 4, seed=5) * 9 - 0.5
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, ltrb), (edge,))
    xy, stride = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    gt = torch.tensor([[-4.0, -3.0, 2.0, 5.0]], dtype=torch.float64)

    def giou_loss(x: Tensor) -> Tensor:
        return 1 - box_giou(decode_ltrb(xy, expected_distance(x), stride), gt)

    assert torch.autograd.gradcheck(giou_loss, (edge,))


@pytest.mark.parametrize("kind", ["synced", "reference"])
def test_sums_written_out(kind: str) -> None:
    """The three losses as loops over images, locations and classes, in float64."""
    dense, _, assigned = scene()
    cls, edge = dense.cls.detach().double(), dense.edge.detach().double()
    qfl = giou = dfl = weights = 0.0
    positives = [0, 0, 0]
    for image, index in assigned.is_valid.nonzero().tolist():
        target = torch.zeros(CLASSES, dtype=torch.float64)
        if assigned.is_positive[image, index]:
            stride = dense.locations.stride[index].double()
            xy, gt = dense.locations.xy[index] / stride, assigned.gt_xyxy[image, index] / stride
            distance = edge[image, index].softmax(dim=-1) @ BINS
            left, top, right, bottom = (
                xy[0] - distance[0],
                xy[1] - distance[1],
                xy[0] + distance[2],
                xy[1] + distance[3],
            )
            width, height = (
                min(b, d) - max(a, c) for a, b, c, d in ((left, right, gt[0], gt[2]), (top, bottom, gt[1], gt[3]))
            )
            shared = max(width, torch.tensor(0.0)) * max(height, torch.tensor(0.0))
            union = (right - left) * (bottom - top) + (gt[2] - gt[0]) * (gt[3] - gt[1]) - shared
            hull = (max(right, gt[2]) - min(left, gt[0])) * (max(bottom, gt[3]) - min(top, gt[1]))
            weight = cls[image, index].max().sigmoid()
            target[assigned.label[image, index]] = shared / union
            giou += weight * (1 - shared / union + (hull - union) / hull)
            ltrb = torch.cat((xy - gt[:2], gt[2:] - xy)).clamp(0, 15.9)
            for side in range(4):
                low = int(ltrb[side])
                log_p = edge[image, index, side].log_softmax(dim=0)
                dfl -= weight * ((low + 1 - ltrb[side]) * log_p[low] + (ltrb[side] - low) * log_p[low + 1]) / 4
            weights += weight
            positives[image] += 1
        for logit, aim in zip(cls[image, index], target, strict=True):
            p = logit.sigmoid()
            qfl -= (aim - p).abs() ** 2 * (aim * p.log() + (1 - aim) * (1 - p).log())
    divisor = weights + 1e-6 if kind == "reference" else max(weights, 1.0)
    found = losses_of(dense, assigned, kind)
    assert found["qfl"].item() == pytest.approx((qfl / sum(max(count, 1) for count in positives)).item(), rel=1e-5)
    assert found["giou"].item() == pytest.approx((2 * giou / divisor).item(), rel=1e-5)
    assert found["dfl"].item() == pytest.approx((0.25 * dfl / divisor).item(), rel=1e-5)


def test_weights_and_leaving_dfl_out() -> None:
    dense, _, assigned = scene()
    once, twice = losses_of(dense, assigned), losses_of(dense, assigned, spec=LossSpec(qfl=3.0, giou=4.0, dfl=1.0))
    for name, factor in (("qfl", 3.0), ("giou", 2.0), ("dfl", 4.0)):
        assert_close(twice[name], factor * once[name])
    assert set(losses_of(dense, assigned, spec=LossSpec(dfl=0.0))) == {"qfl", "giou"}


def test_floors_of_the_weight_sum_differ_between_kinds() -> None:
    dense, _, assigned = scene()
    shy = replace(dense, cls=dense.cls.detach() - 12)  # hardly any score: the sum of weights is far below 1
    main = main_region(shy, assigned)
    assert 0 < main.weight.sum() < 0.1
    synced, reference = (normalizer(kind, assigned, main) for kind in ("synced", "reference"))
    assert synced.weight_sum.item() == 1.0
    assert reference.weight_sum.item() == pytest.approx(main.weight.sum().item() + 1e-6)
    assert synced.num_positive == reference.num_positive == assigned.is_positive.sum(dim=1).clamp(min=1).sum()
    main = main_region(replace(dense, cls=dense.cls + 4), assigned)  # above the floor both are the same
    synced, reference = (normalizer(kind, assigned, main).weight_sum for kind in ("synced", "reference"))
    assert synced > 10
    assert_close(synced, reference, rtol=1e-6, atol=0)


def test_an_image_without_objects_counts_one_positive() -> None:
    locations = grid(64, 64)
    targets = targets_of([[], [(8.0, 8.0, 40.0, 40.0, 2)], []])
    assigned = assign(locations, targets, torch.full((3, 2), 64), CLASSES)
    main = main_region(random_dense(locations, 3, CLASSES, 0), assigned)
    assert normalizer("synced", assigned, main).num_positive.item() == 9 + 2


@pytest.mark.parametrize("kind", ["synced", "reference"])
def test_without_positives_every_output_gets_a_gradient(kind: str) -> None:
    dense = random_dense(grid(64, 64), 2, CLASSES, 0)
    assigned = assign(dense.locations, targets_of([[], []]), torch.full((2, 2), 64), CLASSES)
    found = losses_of(dense, assigned, kind)
    assert found["giou"].item() == found["dfl"].item() == 0.0
    sum(found.values()).backward()
    assert dense.edge.grad is not None
    assert not dense.edge.grad.any()
    assert dense.cls.grad.all()


def test_quality_and_weights_are_targets_without_gradient() -> None:
    """QFL does not move the boxes, GIoU and DFL do not move the classes."""
    dense, _, assigned = scene()
    found = losses_of(dense, assigned)
    grad = torch.autograd.grad
    assert grad(found["qfl"], dense.edge, retain_graph=True, allow_unused=True) == (None,)
    for name in ("giou", "dfl"):
        assert grad(found[name], dense.cls, retain_graph=True, allow_unused=True) == (None,)
        (gradient,) = grad(found[name], dense.edge, retain_graph=True)
        rows = gradient.abs().sum(dim=(2, 3)) > 0
        assert torch.equal(rows, assigned.is_positive)
    (gradient,) = grad(found["qfl"], dense.cls)
    assert torch.equal((gradient != 0).any(dim=-1), assigned.is_valid)


def test_order_of_images_does_not_matter() -> None:
    dense, targets, _ = scene()
    order, pad_hw = [2, 0, 1], torch.tensor([[128, 160], [96, 64], [128, 128]])
    assigned = assign(dense.locations, targets, pad_hw, CLASSES)
    moved = assign(dense.locations, images_of(targets, order), pad_hw[order], CLASSES)
    found, again = losses_of(dense, assigned), losses_of(images_of(dense, order), moved)
    for name, loss in found.items():
        assert_close(again[name], loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "spec", [{"qfl": 0.0}, {"focal": 0.0}, {"centerness": 0.0}, {"giou": -1.0}, {"dfl": -0.1}, {"iou": 1.0}]
)
def test_faulty_weights_are_refused(spec: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(spec))):
        LossSpec(**spec)
