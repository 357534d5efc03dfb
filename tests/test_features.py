"""Feature imitation, PKD and CWD against their formulas written out, and what each of them must not depend on."""

import math
from dataclasses import replace

import pytest
import torch
from scenes import grid, images_of, on_ranks, random_dense, random_targets
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import assign
from ldctl.distill import CWD, PKD, Imitation
from ldctl.distill.features import cell_features, feature_distance, pearson_distance, standardized
from ldctl.fused import softened_kl
from ldctl.losses import normalizer
from ldctl.regions import RegionSpec, all_region, main_region, region
from ldctl.types import Assigned, Dense, Normalizer, Pair, Targets, Where

SIZE, CLASSES, CHANNELS = 128, 3, 4
REGIONS = ("all", "inside_gt", "outside_gt", "main", "finegrained", "gi")
TERMS = (*(Imitation(region=name) for name in REGIONS), PKD(), CWD(), CWD(on="cls"))
NAMES = [term.name for term in TERMS]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(num_images: int, seed: int) -> Dense:
    locations = grid(SIZE, SIZE)
    features = tuple(
        normal(num_images, CHANNELS, *size, seed=seed + level).float().requires_grad_()
        for level, size in enumerate(locations.level_hw)
    )
    return replace(random_dense(locations, num_images, CLASSES, seed), features=features)


def scene(num_images: int = 2, seed: int = 0) -> tuple[Pair, Assigned, Targets, Normalizer]:
    pair = Pair(dense(num_images, seed), dense(num_images, seed + 100))
    targets = random_targets(num_images, SIZE, CLASSES, seed + 1)
    pad_hw = torch.full((num_images, 2), SIZE)
    pad_hw[-1, 1] = SIZE // 2  # the right half of the last image is padding
    assigned = assign(pair.student.locations, targets, pad_hw, CLASSES)
    main = main_region(pair.student, assigned)
    return pair, assigned, targets, normalizer("synced", assigned, main)


def where_of(name: str, pair: Pair, assigned: Assigned, targets: Targets) -> Where:
    return region(name, RegionSpec(), pair, assigned, targets)


def test_rows_of_features_are_locations() -> None:
    student = dense(2, 0)
    rows = cell_features(student).unflatten(0, (2, -1))
    start = 0
    for (height, width), maps in zip(student.locations.level_hw, student.features, strict=True):
        for y, x in ((0, 0), (height - 1, 0), (height // 2, width - 1)):
            assert torch.equal(rows[:, start + y * width + x], maps[:, :, y, x])
        start += height * width


@pytest.mark.parametrize("kind", ["synced", "reference"])
@pytest.mark.parametrize("name", REGIONS)
def test_imitation_written_out(name: str, kind: str) -> None:
    pair, assigned, targets, norm = scene()
    where = where_of(name, pair, assigned, targets)
    found = Imitation(region=name, weight=3.0)(pair, where, replace(norm, kind=kind))
    num_locations = len(pair.student.locations.level)
    rows = range(2 * num_locations) if isinstance(where.row, slice) else where.row.tolist()
    is_in = [row for row, weight in zip(rows, where.weight.tolist(), strict=True) if weight > 0]
    squares: dict[int, list[float]] = {}
    for row in is_in:
        image, location = divmod(row, num_locations)
        level = int(pair.student.locations.level[location])
        width = pair.student.locations.level_hw[level][1]
        inside = location - sum(pair.student.locations.level_sizes[:level])
        one, other = (
            d.features[level][image, :, inside // width, inside % width] for d in (pair.student, pair.teacher)
        )
        squares.setdefault(level, []).append((one - other).square().mean().item())
    expected = 3 * sum(math.fsum(values) / len(values) for values in squares.values())
    assert expected > 0
    assert_close(found.item(), expected, rtol=1e-5, atol=0)  # two images are the pair at which both kinds agree


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_zero_where_student_equals_teacher_and_no_gradient_to_the_teacher(term: Imitation | PKD | CWD) -> None:
    pair, assigned, targets, norm = scene()
    same = Pair(pair.student, pair.student)
    where = where_of(term.region, pair, assigned, targets)
    assert_close(term(same, where, norm).item(), 0.0, rtol=0, atol=1e-6)
    loss = term(pair, where, norm)
    assert loss > 0
    leaves = [*pair.student.features, pair.student.cls], [*pair.teacher.features, pair.teacher.cls]
    student, teacher = (torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True) for x in leaves)
    assert any(gradient is not None and gradient.any() for gradient in student)
    assert all(gradient is None for gradient in teacher)


@pytest.mark.parametrize("name", REGIONS)
def test_no_objects(name: str) -> None:
    pair, _, _, norm = scene()
    targets = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0).bool())
    assigned = assign(pair.student.locations, targets, torch.full((2, 2), SIZE), CLASSES)
    where = where_of(name, pair, assigned, targets)
    loss = Imitation(region=name)(pair, where, norm)
    assert (loss > 0) == (name in ("all", "outside_gt", "gi"))
    torch.autograd.grad(loss, pair.student.features)


def test_pearson_distance_is_one_minus_the_correlation_of_channels() -> None:
    student, teacher = normal(3, 5, 40, seed=0), normal(3, 5, 40, seed=1)
    count = 3 * 40
    correlations = [
        torch.corrcoef(torch.stack((s.flatten(), t.flatten())))[0, 1]
        for s, t in zip(student.transpose(0, 1), teacher.transpose(0, 1), strict=True)
    ]
    expected = (1 - torch.stack(correlations).mean()) * (count - 1) / count  # the deviation is the unbiased one
    assert_close(pearson_distance(student, teacher), expected, rtol=1e-5, atol=0)
    assert_close(pearson_distance(3 * teacher + 7, teacher).item(), 0.0, rtol=0, atol=1e-10)
    assert_close(pearson_distance(-teacher, teacher).item(), 2 * (count - 1) / count, rtol=1e-5, atol=0)


def test_standardized_maps_of_a_single_location() -> None:
    assert torch.equal(standardized(normal(1, 5, 1, seed=0)), torch.zeros(1, 5, 1, dtype=torch.float64))
    assert standardized(normal(2, 5, 1, seed=0)).isfinite().all()


@pytest.mark.parametrize("on", ["features", "cls"])
def test_channel_wise_distillation_written_out(on: str) -> None:
    pair, assigned, _, norm = scene()
    found = CWD(on=on, weight=2.0, temperature=3.0)(pair, all_region(assigned, pair.student.locations), norm)
    total, start = 0.0, 0
    for level, (height, width) in enumerate(pair.student.locations.level_hw):
        count = height * width
        maps = [
            d.features[level].flatten(2)
            if on == "features"
            else d.cls[:, start : start + count].reshape(2, count, CLASSES).permute(0, 2, 1)
            for d in (pair.student, pair.teacher)
        ]
        start += count
        for image in range(2):
            for q, p in zip(*(each[image].double() / 3 for each in maps), strict=True):
                p, q = p.softmax(0), q.softmax(0)
                total += (p * (p / q).log()).sum().item() * 2 * 3**2 / (2 * maps[0].shape[1])
    assert_close(found.item(), total, rtol=1e-4, atol=0)


def test_gradients() -> None:
    student, teacher = normal(2, 3, 6, seed=0).requires_grad_(), normal(2, 3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: pearson_distance(x, teacher), student)
    assert torch.autograd.gradcheck(lambda x: softened_kl(x, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda x: feature_distance(x, teacher[0]), student[0])


@pytest.mark.parametrize("maps", [torch.ones(1, 5, 1), torch.ones(2, 5, 4)], ids=["single location", "constant"])
def test_gradients_of_maps_without_deviation_are_finite(maps: Tensor) -> None:
    student = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pearson_distance(student, normal(*maps.shape, seed=0).float()), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", REGIONS)
def test_imitation_sees_every_location_of_its_region_and_no_other(name: str) -> None:
    pair, assigned, targets, norm = scene()
    where = where_of(name, pair, assigned, targets)
    gradients = torch.autograd.grad(Imitation(region=name)(pair, where, norm), pair.student.features)
    touched = cell_features(replace(pair.student, features=gradients)).all(dim=1)
    expected = torch.zeros_like(touched)
    expected[torch.arange(len(touched))[where.row][where.weight > 0]] = True
    assert torch.equal(touched, expected)
    assert 0 < touched.sum() < len(touched)


def test_background_and_inside_of_objects_are_all_valid_locations() -> None:
    pair, assigned, targets, _ = scene()
    inside, outside = (where_of(name, pair, assigned, targets).row for name in ("inside_gt", "outside_gt"))
    valid = assigned.is_valid.flatten().nonzero()[:, 0]
    assert torch.equal(torch.cat((inside, outside)).sort().values, valid)


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_synced_over_ranks_is_the_loss_of_all_images(
    term: Imitation | PKD | CWD, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, assigned, targets, norm = scene(num_images=4)
    leaves = [*pair.student.features, pair.student.cls]

    def on(images: slice) -> Tensor:
        part = Pair(*(images_of(each, images) for each in (pair.student, pair.teacher)))
        chosen = Assigned(**{name: value[images] for name, value in vars(assigned).items()})
        return term(part, where_of(term.region, part, chosen, images_of(targets, images)), norm)

    whole = on(slice(None))
    ranks = on_ranks(monkeypatch, 2, lambda rank: on(slice(2 * rank, 2 * rank + 2)))
    mean = torch.stack(ranks).mean()
    if isinstance(term, PKD):  # a rank standardises its own images
        assert mean.item() != pytest.approx(whole.item(), rel=1e-3)
        return
    assert_close(mean, whole, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(x, leaves, materialize_grads=True) for x in (mean, whole))
    assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", REGIONS)
def test_synced_imitation_is_the_mean_of_reference_pairs(name: str) -> None:
    """What one rank makes of four images is what ranks of two make of them, averaged over the ways to pair them."""
    pair, assigned, targets, norm = scene(num_images=4)

    def loss(images: list[int], kind: str) -> Tensor:
        part = Pair(*(images_of(each, images) for each in (pair.student, pair.teacher)))
        fields = {name: value[images] for name, value in vars(assigned).items()}
        some = Targets(*(value[images] for value in vars(targets).values()))
        chosen = Assigned(**fields)
        return Imitation(region=name)(part, where_of(name, part, chosen, some), replace(norm, kind=kind))

    pairs = [loss([i, j], "reference") for i in range(4) for j in range(i)]
    assert_close(loss([0, 1, 2, 3], "synced"), torch.stack(pairs).mean(), rtol=1e-5, atol=0)
