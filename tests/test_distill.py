"""Distillation terms: golden values, closed forms, gradients, empty regions, and what they are divided by."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scenes import grid, images_of, random_dense, random_targets, vlr_region
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import assign
from ldctl.boxes import box_giou, decode_ltrb
from ldctl.distill import KD, LD, BCKDBox, BinaryKD, Term
from ldctl.distill.logits import (
    binary_distillation,
    box_distillation,
    class_distillation,
    localization_distillation,
    score_difference,
    sum_of_level_means,
)
from ldctl.fused import softened_kl
from ldctl.losses import normalizer
from ldctl.regions import RegionSpec, all_region, main_region
from ldctl.types import Dense, Normalizer, Pair, Targets, Where

CLASSES = 5
BINS = torch.arange(17, dtype=torch.float64)
STUDENT_EDGE, TEACHER_EDGE = 0.1 * BINS, -((BINS - 5) ** 2) / 8
STUDENT_CLS = torch.tensor([[-2.0, 0.5, 1.0]], dtype=torch.float64)
TEACHER_CLS = torch.tensor([[-1.0, 2.0, 0.0]], dtype=torch.float64)
TERMS = (
    LD(), LD(region="vlr", weight=0.0625), KD(), KD(region="vlr"), BinaryKD(), BinaryKD(region="main"),
    BCKDBox(), BCKDBox(region="main"), BCKDBox(region="vlr"),
)  # fmt: skip
NAMES = [term.name for term in TERMS]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edges(logits: Tensor) -> Tensor:
    """Return one location whose four edges are the same."""
    return logits.expand(1, 4, -1)


def read_by(term: Term, dense: Dense) -> Tensor:
    """Return what gets the gradient of a term."""
    return dense.edge if isinstance(term, LD | BCKDBox) else dense.cls


class Scene:
    """A batch of images with both detectors' outputs and every region."""

    def __init__(self, targets: Targets, student: Dense, teacher: Dense, num_classes: int) -> None:
        pad_hw = torch.full((len(student.cls), 2), 160)
        self.targets, self.pair, self.num_classes = targets, Pair(student, teacher), num_classes
        self.assigned = assign(student.locations, targets, pad_hw, num_classes)
        self.regions = {
            "main": main_region(student, self.assigned),
            "vlr": vlr_region(RegionSpec(), self.assigned, targets, student.locations),
            "all": all_region(self.assigned, student.locations),
        }

    @classmethod
    def random(cls, num_images: int = 2, seed: int = 0, num_classes: int = CLASSES) -> "Scene":
        locations = grid(160, 160)
        student, teacher = (random_dense(locations, num_images, num_classes, seed + k) for k in (0, 1000))
        return cls(random_targets(num_images, 160, num_classes, seed), student, teacher, num_classes)

    def part(self, images: list[int]) -> "Scene":
        """Return the given images as a batch of their own: what one rank sees."""
        parts = (images_of(x, images) for x in (self.targets, self.pair.student, self.pair.teacher))
        return Scene(*parts, self.num_classes)

    def norm(self, kind: str) -> Normalizer:
        return normalizer(kind, self.assigned, self.regions["main"])

    def loss(self, term: Term, kind: str) -> Tensor:
        return term(self.pair, self.regions[term.region], self.norm(kind))


def one(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.float64)


def test_golden_values() -> None:
    student, teacher = edges(STUDENT_EDGE), edges(TEACHER_EDGE)
    golden = {
        1.0: (1.1513236858787752, 0.06772492269875148),
        10.0: (0.08528470855499758, 0.5016747562058681),
    }
    for temperature, (divergence, value) in golden.items():
        found = softened_kl(STUDENT_EDGE, TEACHER_EDGE, temperature)
        assert found.item() == pytest.approx(divergence, rel=1e-12)
        assert localization_distillation(student, teacher, temperature).item() == pytest.approx(value, rel=1e-12)
    assert class_distillation(STUDENT_CLS, TEACHER_CLS, 2.0).item() == pytest.approx(0.20753657929968108, rel=1e-12)
    assert binary_distillation(STUDENT_CLS, TEACHER_CLS, one(1), 1.0).item() == pytest.approx(
        0.42532815620146136, rel=1e-12
    )


def test_edges_are_averaged() -> None:
    student, teacher = normal(3, 4, 17, seed=0), normal(3, 4, 17, seed=1)
    per_edge = [localization_distillation(*(edges(x[1, k]) for x in (student, teacher)), 10.0).item() for k in range(4)]
    assert localization_distillation(student, teacher, 10.0)[1].item() == pytest.approx(sum(per_edge) / 4, rel=1e-12)


def test_closed_forms() -> None:
    # from a distribution on one bin to the uniform one: log R
    sharp = torch.full((17,), -1e4, dtype=torch.float64)
    sharp[3] = 0
    assert softened_kl(torch.zeros(17, dtype=torch.float64), sharp, 1.0).item() == pytest.approx(
        math.log(17), rel=1e-12
    )
    # T^2 KL tends to half the variance, under the uniform distribution, of the logits' difference
    student, teacher = normal(1, 17, seed=2), normal(1, 17, seed=3)
    limit = (student - teacher).var(correction=0).item() / 2
    assert class_distillation(student, teacher, 1e4).item() * 17 == pytest.approx(limit, rel=1e-3)
    # of two coins
    p, q = 0.8, 0.3
    logits = [torch.tensor([[math.log(x), math.log(1 - x)]], dtype=torch.float64) for x in (q, p)]
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert class_distillation(*logits, 1.0).item() == pytest.approx(expected, rel=1e-12)
    single = [torch.tensor([[math.log(x / (1 - x))]], dtype=torch.float64) for x in (q, p)]
    cross_entropy = -(p * math.log(q) + (1 - p) * math.log(1 - q))
    assert binary_distillation(*single, one(1), 2.0).item() == pytest.approx((p - q) ** 2 * cross_entropy, rel=1e-12)


def test_zero_exactly_where_student_equals_teacher() -> None:
    student = normal(6, 4, 17, seed=4)
    teacher = student + normal(6, 4, 1, seed=5)  # a softmax does not see a shift of all its logits
    assert localization_distillation(student, teacher, 10.0).abs().max() < 1e-12
    teacher[2, 1, 3] += 0.01
    found = localization_distillation(student, teacher, 10.0)
    assert (found > 1e-9).tolist() == [False, False, True, False, False, False]
    assert (localization_distillation(student, normal(6, 4, 17, seed=6), 1.0) > 0).all()
    ltrb = normal(6, 4, seed=8).abs()
    assert not box_distillation(ltrb, ltrb.clone()).any()
    assert (box_distillation(ltrb, ltrb + torch.tensor([0.0, 0.0, 1e-3, 0.0])) > 1e-6).all()
    cls = normal(6, 7, seed=7)
    assert not score_difference(cls, cls.clone()).any()
    assert not binary_distillation(cls, cls.clone(), one(6), 1.0)
    assert class_distillation(cls, cls + 3.0, 2.0).abs().max() < 1e-12
    for row in range(6):  # a sigmoid does see the shift
        assert binary_distillation(cls[row, None], cls[row, None] + 3.0, one(1), 1.0) > 0


def test_logits_of_any_size_stay_finite() -> None:
    student = (normal(2, 4, 17, seed=8).float() * 1e4).requires_grad_()
    teacher = normal(2, 4, 17, seed=9).float() * 1e4
    total = localization_distillation(student, teacher, 1.0).sum() + binary_distillation(
        student.flatten(1), teacher.flatten(1), torch.ones(2), 1.0
    )
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


def test_gradients() -> None:
    student, teacher = normal(2, 4, 9, seed=10).requires_grad_(), normal(2, 4, 9, seed=11)
    for temperature in (1.0, 10.0):
        assert torch.autograd.gradcheck(lambda x, t=temperature: localization_distillation(x, teacher, t), (student,))
    cls, teacher_cls = normal(3, 5, seed=12).requires_grad_(), normal(3, 5, seed=13)
    assert torch.autograd.gradcheck(lambda x: class_distillation(x, teacher_cls, 2.0), (cls,))
    for beta in (1.0, 2.0):
        assert torch.autograd.gradcheck(lambda x, b=beta: binary_distillation(x, teacher_cls, one(3), b), (cls,))
    ltrb, teacher_ltrb = (normal(5, 4, seed=seed).abs() + 0.5 for seed in (14, 15))
    assert torch.autograd.gradcheck(lambda x: box_distillation(x, teacher_ltrb), (ltrb.requires_grad_(),))


def test_gradient_of_localization_distillation_is_the_difference_of_distributions() -> None:
    student, teacher = normal(1, 4, 17, seed=14).requires_grad_(), normal(1, 4, 17, seed=15)
    (gradient,) = torch.autograd.grad(localization_distillation(student, teacher, 10.0).sum(), student)
    difference = (student / 10).softmax(dim=-1) - (teacher / 10).softmax(dim=-1)
    assert_close(gradient, difference.detach() * 10 / (4 * 17))


@pytest.mark.parametrize("kind", ["synced", "reference"])
@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_no_gradient_into_the_teacher(term: Term, kind: str) -> None:
    scene = Scene.random()
    assert scene.pair.teacher.edge.requires_grad
    loss = scene.loss(term, kind)
    assert loss > 0
    loss.backward()
    assert scene.pair.teacher.edge.grad is None
    assert scene.pair.teacher.cls.grad is None
    leaf = read_by(term, scene.pair.student)
    assert [name for name in ("cls", "edge") if getattr(scene.pair.student, name).grad is not None] == [
        "edge" if leaf is scene.pair.student.edge else "cls"
    ]
    rows = leaf.grad.flatten(0, 1).flatten(1).any(dim=1).nonzero()[:, 0]
    where = scene.regions[term.region]
    assert torch.equal(rows, torch.arange(leaf.shape[0] * leaf.shape[1])[where.row][where.weight > 0])


@pytest.mark.parametrize("kind", ["synced", "reference"])
@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_an_empty_region_is_zero_and_reaches_the_student(term: Term, kind: str) -> None:
    scene = Scene.random()
    none = scene.regions["main"].row[:0]
    empty = replace(scene.regions["all"], row=none, weight=none.float(), level=none, image=none)
    loss = term(scene.pair, empty, scene.norm(kind))
    assert loss.item() == 0.0
    loss.backward()
    leaf = read_by(term, scene.pair.student)
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_box_distillation_by_hand() -> None:
    # of width 4 and height 4, and the same shifted by 2 to the right: they share 8 of 24, inside of 24
    student, teacher = torch.tensor([[1.0, 2.0, 3.0, 2.0]]), torch.tensor([[-1.0, 2.0, 5.0, 2.0]])
    assert box_distillation(student, teacher).tolist() == pytest.approx([1 - 8 / 24])
    # a corner apart: 4 of 28 shared, 8 of the enclosing 36 are neither's
    teacher = torch.tensor([[-1.0, 0.0, 5.0, 4.0]])
    assert box_distillation(student, teacher).tolist() == pytest.approx([1 - (4 / 28 - 8 / 36)])
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.2, 0.2]]), torch.tensor([[0.6, 0.7, 0.35], [0.2, 0.1, 0.2]])
    assert score_difference(*scores).tolist() == pytest.approx([0.25, 0.1])


def test_box_distillation_between_locations_apart() -> None:
    """The same box as told from half a stride away."""
    student, teacher = torch.tensor([[3.0, 2.0, 1.0, 2.0]]), torch.tensor([[3.5, 2.5, 0.5, 1.5]])
    assert box_distillation(student, teacher, 0.5).item() == pytest.approx(0.0, abs=1e-6)
    assert box_distillation(teacher, student, -0.5).item() == pytest.approx(0.0, abs=1e-6)
    assert box_distillation(student, teacher).item() > 0.2
    scene = Scene.random()
    dense = scene.pair.student
    half = replace(dense, cls=scene.pair.teacher.cls, locations=replace(dense.locations, offset=0.5))
    losses = [term(Pair(dense, half), scene.regions[term.region], scene.norm("synced")) for term in TERMS[6:]]
    assert all(loss > 0.1 for loss in losses)  # equal distances from there are another box


def test_box_distillation_written_out() -> None:
    """Boxes in pixels where they lie, decoded by a loop over bins, in double precision."""
    scene = Scene.random(num_images=3, seed=2)
    num_positive = scene.assigned.is_positive.sum(dim=1).clamp(min=1).sum().item()
    count = len(scene.pair.student.locations.level)
    for term in TERMS[6:]:
        where = scene.regions[term.region]
        total = 0.0
        for row in torch.arange(3 * count)[where.row][where.weight > 0].tolist():
            image, a = divmod(row, count)
            boxes, scores = [], []
            for dense in (scene.pair.student, scene.pair.teacher):
                p = dense.edge[image, a].double().softmax(dim=-1)
                ltrb = torch.stack([sum(k * p[side, k] for k in range(17)) for side in range(4)])
                locations = dense.locations
                boxes.append(decode_ltrb(locations.xy[a].double(), ltrb, locations.stride[a].double()))
                scores.append(dense.cls[image, a].double().sigmoid())
            total += ((1 - box_giou(*boxes)) * (scores[0] - scores[1]).abs().max()).item()
        assert scene.loss(term, "synced").item() == pytest.approx(4 * total / num_positive, rel=1e-4)


def test_box_distillation_between_different_bins() -> None:
    """A teacher of finer bins that says the same boxes with the same scores teaches nothing, one of others does."""
    scene = Scene.random()
    student = scene.pair.student
    wide = torch.nn.functional.pad(student.edge.detach(), (0, 8), value=-torch.inf)
    for term in TERMS[6:]:
        teacher = replace(student, cls=scene.pair.teacher.cls, edge=wide)
        loss = term(Pair(student, teacher), scene.regions[term.region], scene.norm("synced"))
        assert loss.item() == pytest.approx(0.0, abs=1e-5)
        teacher = replace(teacher, edge=wide.roll(1, dims=-1))
        assert term(Pair(student, teacher), scene.regions[term.region], scene.norm("synced")) > 0.1


@pytest.mark.parametrize(("term", "size"), [(LD(), 17), (LD(region="vlr"), 17), (KD(), CLASSES), (KD(region="vlr"), 5)])
@pytest.mark.parametrize("kind", ["synced", "reference"])
def test_sum_over_bins_or_classes(term: LD | KD, size: int, kind: str) -> None:
    scene = Scene.random()
    assert term.class_reduction == "mean"
    summed = scene.loss(term.model_copy(update={"class_reduction": "sum"}), kind)
    assert_close(summed, size * scene.loss(term, kind), rtol=1e-6, atol=0)


def test_one_class() -> None:
    scene = Scene.random(num_classes=1)
    for term in (KD(), KD(region="vlr")):
        loss = scene.loss(term, "synced")
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, scene.pair.student.cls)[0].any()
    assert scene.loss(BinaryKD(), "synced") > 0.1


def test_terms_written_out() -> None:
    """Every term of the reference normaliser as a loop over rows, with the pure functions above."""
    scene = Scene.random(num_images=3, seed=1)
    student, teacher = scene.pair.student, scene.pair.teacher

    def rows(region: str) -> list[tuple[int, int, float, int]]:
        where = scene.regions[region]
        count = student.cls.shape[1]
        row = torch.arange(student.cls.shape[0] * count)[where.row]
        columns = (where.image, row % count, where.weight, where.level)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    for region, weight in (("main", 0.25), ("vlr", 0.0625)):
        total = 0.0
        for image, a, share, _ in rows(region):
            total += share * localization_distillation(student.edge[image, a, None], teacher.edge[image, a, None], 10.0)
        assert scene.loss(LD(region=region, weight=weight), "reference").item() == pytest.approx(
            weight * total.item(), rel=1e-5
        )
        means = 0.0
        for level in range(5):
            values = [
                class_distillation(student.cls[image, a, None], teacher.cls[image, a, None], 2.0).item()
                for image, a, _, at in rows(region)
                if at == level
            ]
            means += sum(values) / max(len(values), 1)
        assert scene.loss(KD(region=region), "reference").item() == pytest.approx(10 * means, rel=1e-5)
    num_positive = scene.assigned.is_positive.sum(dim=1).clamp(min=1).sum().item()
    for region in ("all", "main"):
        total = sum(
            binary_distillation(student.cls[image, a, None], teacher.cls[image, a, None], torch.ones(1), 1.0).item()
            for image, a, _, _ in rows(region)
        )
        assert scene.loss(BinaryKD(region=region), "synced").item() == pytest.approx(total / num_positive, rel=1e-4)


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_synced_equals_reference_at_one_rank_of_two_images(term: Term, seed: int) -> None:
    scene = Scene.random(num_images=2, seed=seed)
    synced, reference = scene.loss(term, "synced"), scene.loss(term, "reference")
    assert synced > 0
    # the class terms divide each row, the reference their sum: the same but for the order of rounding
    assert synced.item() == (pytest.approx(reference.item(), rel=1e-6) if isinstance(term, KD) else reference.item())


@pytest.mark.parametrize("term", [LD(), LD(region="vlr", weight=0.0625)], ids=NAMES[:2])
def test_synced_localization_distillation_is_the_mean_of_reference_ranks_of_two_images(term: LD) -> None:
    scene = Scene.random(num_images=16)
    synced = scene.loss(term, "synced")
    ranks = [scene.part([k, k + 1]).loss(term, "reference") for k in range(0, 16, 2)]
    assert min(ranks) != max(ranks)
    assert_close(synced, torch.stack(ranks).mean(), rtol=1e-6, atol=0)
    # as published, one rank of 16 images gives eight times as much
    assert_close(scene.loss(term, "reference"), 8 * synced, rtol=1e-6, atol=0)


@pytest.mark.parametrize("region", ["main", "vlr"])
@pytest.mark.parametrize("seed", range(3))
def test_synced_class_distillation_is_the_mean_of_reference_pairs(seed: int, region: str) -> None:
    """Over all pairs of the batch's images, with whatever counts and losses the scene has."""
    term = KD(region=region)
    scene = Scene.random(num_images=8, seed=seed)
    pairs = [scene.part(list(pair)) for pair in itertools.combinations(range(8), 2)]
    expected = torch.stack([part.loss(term, "reference") for part in pairs]).double().mean()
    synced = scene.loss(term, "synced")
    assert synced.item() == pytest.approx(expected.item(), rel=1e-6)
    assert scene.loss(term, "reference").item() != pytest.approx(expected.item(), rel=1e-3)
    leaf = scene.pair.student.cls
    found = torch.autograd.grad(synced, leaf)[0]
    assert_close(found, torch.autograd.grad(expected, leaf)[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("num_images", [1, 2, 3, 8])
@pytest.mark.parametrize("trend", [1.0, -1.0])
def test_synced_level_means_are_exact_where_counts_and_losses_go_together(num_images: int, trend: float) -> None:
    """Crowded images of high (or low) losses: what means over all images, instead of over pairs, get wrong."""
    counts = [[3, 1, 0, 7, 0, 0, 2, 40], [0, 0, 5, 0, 0, 0, 0, 0], [0] * 8, [9, 2, 2, 2, 2, 2, 1, 1]]
    rows = [(k, level) for k in range(num_images) for level in range(4) for _ in range(counts[level][k])]
    image, level = torch.tensor(rows).T
    size = torch.tensor([float(counts[level][k]) for k, level in rows], dtype=torch.float64)
    value = (normal(len(rows), seed=0).abs() + 1) * size.pow(trend)

    def loss(images: tuple[int, ...], kind: str) -> float:
        mask = torch.isin(image, torch.tensor(images))
        at = torch.tensor([images.index(k) for k in image[mask].tolist()], dtype=torch.int64)
        where = Where(torch.arange(len(at)), torch.ones(len(at)), level[mask], at, len(images), 4)
        return sum_of_level_means(value[mask], where, Normalizer(kind, torch.ones(()), torch.ones(()))).item()

    pairs = list(itertools.combinations(range(num_images), min(2, num_images)))
    expected = sum(loss(pair, "reference") for pair in pairs) / len(pairs)
    assert loss(tuple(range(num_images)), "synced") == pytest.approx(expected, rel=1e-12)


def test_union_of_terms() -> None:
    union = TypeAdapter(Term)
    assert union.validate_python({"kind": "ld", "region": "vlr", "weight": 0.0625}) == TERMS[1]
    assert [union.validate_python(term.model_dump()) for term in TERMS] == list(TERMS)
    assert NAMES == [
        "ld/main", "ld/vlr", "kd/main", "kd/vlr", "binary_kd/all", "binary_kd/main",
        "bckd_box/all", "bckd_box/main", "bckd_box/vlr",
    ]  # fmt: skip
    for faulty in (
        {"kind": "ld", "weight": 0.0},
        {"kind": "ld", "temperature": 0.5},
        {"kind": "mse"},
        {"kind": "kd", "T": 2.0},
        {"kind": "kd", "class_reduction": "none"},
        {"kind": "bckd_box", "region": "vrl"},
    ):
        with pytest.raises(ValidationError):
            union.validate_python(faulty)
