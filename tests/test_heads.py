"""What every kind of dense head has in common: scores, cuts, learning, distillation; and GFLv2's quality."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from scenes import grid, random_dense, random_targets
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import RULES
from ldctl.distill import LD, BCKDBox, BinaryKD, CrossKDBox, CrossKDClass
from ldctl.distillation import DistillationSpec
from ldctl.losses import LossSpec
from ldctl.models import Detector, HeadSpec, ModelSpec, ResNetSpec
from ldctl.models.heads import TRAITS, distribution_shape
from ldctl.step import OWN_LOSSES, Learner, Teaching, count_positive, training_losses
from ldctl.types import Batch, Dense, Rule

KINDS = get_args(HeadSpec.model_fields["kind"].annotation)
CLASSES, SIZE = 3, 64


def detector(kind: str, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    head = HeadSpec.model_validate({"kind": kind, "num_convs": 2})
    backbone = ResNetSpec(depth=18, width=0.125, init="none", norm="frozen")
    return Detector(ModelSpec(backbone=backbone, head=head, channels=32), CLASSES)


def test_each_kind_says_whose_rule_and_losses_it_has() -> None:
    """A kind that does not say so is none, rather than one like GFL."""
    assert set(KINDS) == set(TRAITS) == set(OWN_LOSSES)
    assert {traits.assignment for traits in TRAITS.values()} == set(RULES) == set(get_args(Rule))
    new = HeadSpec.model_construct(kind="new")
    for asked in ("traits", "has_quality", "has_centerness", "location_offset", "prior_wh"):
        with pytest.raises(KeyError, match="new"):
            getattr(new, asked)


def batch(num_images: int = 4) -> Batch:
    """Images of noise with objects, which a detector can but learn by heart."""
    generator = torch.Generator().manual_seed(0)
    size_hw = torch.full((num_images, 2), SIZE)
    return Batch(
        images=torch.randint(0, 256, (num_images, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        size_hw=size_hw,
        original_hw=size_hw,
        image_id=tuple(range(num_images)),
        targets=random_targets(num_images, SIZE, CLASSES, 3),
    )


def losses_of(student: Detector, teaching: Teaching | None = None) -> dict[str, Tensor]:
    return training_losses(Learner(student, teaching), student, teaching, batch(), LossSpec())


def test_score_is_the_product() -> None:
    dense = random_dense(grid(64, 64), 2, CLASSES, 0)
    assert torch.equal(dense.score, dense.cls.sigmoid())
    quality = torch.linspace(-3, 3, dense.cls.shape[1]).repeat(2, 1)
    told = replace(dense, quality=quality)
    for image, location, label in [(0, 0, 0), (1, 40, 2), (0, 84, 1)]:
        expected = dense.cls[image, location, label].sigmoid() * quality[image, location].sigmoid()
        assert_close(told.score[image, location, label], expected)
    for one in (dense, told):
        assert_close(one.best_score, one.score.amax(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_head_goes_on_where_it_was_cut(kind: str, cut: int) -> None:
    model = detector(kind)
    features = tuple(torch.randn(2, 32, side, side) for side in (8, 4, 2, 1, 1))
    whole, parted = model.head(features), model.head(features, cut)
    again = model.head.resume(parted.towers, cut, features)
    for name in ("cls", "edge", "score"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
        assert torch.equal(getattr(parted, name), getattr(whole, name))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_head_learns_and_losses_fall(kind: str) -> None:
    model = detector(kind).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    traced = []
    for _ in range(25):
        losses = losses_of(model)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        traced.append({name: loss.item() for name, loss in losses.items()})
    still = [name for name, parameter in model.head.named_parameters() if not parameter.grad.any()]
    # a level without positives has no use for its scale
    assert [name for name in still if not name.startswith("scales.")] == []
    for name, first in traced[0].items():
        if name != "qfl":  # whose targets, the boxes' IoU, grow as the boxes get better
            assert traced[-1][name] < 0.95 * first, name
    assert sum(traced[-1].values()) < 0.9 * sum(traced[0].values())


@pytest.mark.parametrize("kind", KINDS)
def test_positives_are_counted_without_predictions(kind: str) -> None:
    """As many as the losses are divided by: a step of several micro-batches counts before it predicts."""
    model = detector(kind)
    losses, counted = (
        training_losses(Learner(model, None), model, None, batch(), LossSpec(), num_positive=number)
        for number in (None, count_positive(model, batch()))
    )
    assert losses == counted


@pytest.mark.parametrize("kind", KINDS)
def test_quality_is_told_under_autocast(kind: str) -> None:
    model = detector(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(torch.randn(1, 3, SIZE, SIZE))
    assert dense.edge.dtype == dense.score.dtype == dense.best_score.dtype == torch.float32
    assert (dense.quality is None) == (kind in ("gfl", "retina"))
    assert dense.score.isfinite().all()


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_one_kind_teaches_another(teacher: str, student: str) -> None:
    model = detector(student).train()
    spec = DistillationSpec()
    if (teacher == "retina") != (student == "retina"):
        spec = DistillationSpec(terms=(CrossKDBox(), CrossKDClass()), cut=2)
    elif (teacher == "fcos") != (student == "fcos"):
        spec = DistillationSpec(terms=(BCKDBox(), BinaryKD(), CrossKDBox(), CrossKDClass()), cut=1)
    losses = losses_of(model, Teaching(detector(teacher, 1).eval().requires_grad_(False), spec, "0"))
    for term in spec.terms:
        assert losses[term.name] > 0
        losses[term.name].backward(retain_graph=True)
    assert model.head.edge_tower[0].conv.weight.grad.any()
    assert model.head.cls_tower[0].conv.weight.grad.any()


def test_ld_is_weighted_by_the_joint_score() -> None:
    model = detector("gflv2").train()
    only = Teaching(detector("gfl", 1).eval().requires_grad_(False), DistillationSpec(terms=(LD(),)), "0")
    before = losses_of(model, only)["ld/main"]
    with torch.no_grad():
        model.head.quality[2].bias += 1.0  # of 0: a quality of 0.73 instead of 0.5, but for the small weights
    assert_close(losses_of(model, only)["ld/main"], before * 0.7310586 / 0.5, rtol=1e-3, atol=0)


def test_shape_of_a_distribution() -> None:
    logit = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    left, top = logit.softmax(dim=0)[:4], torch.tensor([0.5, 0.5, 0.0, 0.0])
    edge = torch.stack((logit, torch.tensor([-50.0, 20.0, -50.0, -50.0, 20.0, -50.0]), logit.flip(0), logit.roll(2)))
    found = distribution_shape(edge.view(1, 24, 1, 1), 6).view(4, 5)
    for side, expected in enumerate((left, top, left, left)):
        assert_close(found[side], torch.cat((expected, expected.mean(dim=0, keepdim=True))))


@torch.no_grad()
def test_a_sharper_distribution_has_a_higher_quality_once_the_net_says_so() -> None:
    """The quality reads the shape of the edges alone, behind the level's scale: not where their weight lies."""
    head = detector("gflv2").head
    features = (torch.randn(1, 32, 4, 4),) * 5
    for part in (head.quality[0], head.quality[2]):
        part.weight.abs_()  # grows with every probability of the top
    before = head(features)
    assert before.quality.shape == (1, 80)
    for scale in head.scales:
        scale.mul_(50)
    assert (head(features).quality > before.quality).all()
    head.edge.weight.copy_(head.edge.weight.unflatten(0, (4, 17)).flip(1).flatten(0, 1))
    for scale in head.scales:
        scale.div_(50)
    assert_close(head(features).quality, before.quality)


def test_fcos_stands_in_the_middle_of_its_cells() -> None:
    features = tuple(torch.zeros(1, 32, side, side) for side in (4, 2, 1, 1, 1))
    xy, fcos = (detector(kind).head(features).locations.xy for kind in ("atss", "fcos"))
    assert fcos[:6].tolist() == [[4, 4], [12, 4], [20, 4], [28, 4], [4, 12], [12, 12]]
    assert fcos[-1].tolist() == [64, 64]
    assert torch.equal(fcos - xy, detector("fcos").head(features).locations.stride[:, None].expand(-1, 2) / 2)


def test_fcos_pyramid_has_an_activation_before_its_last_map() -> None:
    plain, fcos = detector("gfl").fpn, detector("fcos").fpn
    fcos.load_state_dict(plain.state_dict())
    maps = tuple(torch.randn(1, channels, side, side) for channels, side in ((16, 8), (32, 4), (64, 2)))
    found, expected = fcos(maps), plain(maps)
    assert all(torch.equal(one, other) for one, other in zip(found[:4], expected[:4], strict=True))
    assert expected[3].min() < 0
    assert torch.equal(found[4], plain.output[4](expected[3].relu()))
    assert (found[4] - expected[4]).abs().max() > 1e-3


def test_gflv2_needs_four_bins() -> None:
    HeadSpec(kind="gflv2", reg_max=3)
    HeadSpec(reg_max=2)
    with pytest.raises(ValidationError, match='"gflv2" reads the 4 highest bins of each edge: reg_max 3 or more'):
        HeadSpec(kind="gflv2", reg_max=2)


def test_a_head_without_a_kind_is_gfl() -> None:
    assert HeadSpec.model_validate_json('{"reg_max": 16}').kind == "gfl"
    assert isinstance(detector("gfl").head(tuple(torch.zeros(1, 32, 1, 1) for _ in range(5))), Dense)
    assert detector("gfl").head.quality is None
