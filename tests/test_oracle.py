"""Assignment, regions, losses and their gradients against the numbers of mmdet 3.3 and the released LD code."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from conftest import Deviations
from oracle import levels, read
from scenes import NO_MAPS, vlr_region
from torch import Tensor
from torch.testing import assert_close

from ldctl.assign import assign
from ldctl.boxes import location_grid, prior_boxes
from ldctl.distill import KD, LD, Imitation
from ldctl.losses import LossSpec, detection_losses, normalizer
from ldctl.regions import RegionSpec, main_region, region
from ldctl.types import Assigned, Dense, Locations, Normalizer, Pair, Targets, Where

TESTS = Path(__file__).parent
ORACLE = TESTS.parents[1] / "shared" / "oracle"
GFL = sorted(ORACLE.glob("gfl_loss_cases_*.safetensors"))
GFLV2 = sorted(ORACLE.glob("gflv2_loss_*.safetensors"))
LDS = sorted(ORACLE.glob("ld_loss_cases_*.safetensors"))
STRIDES = (8, 16, 32, 64, 128)

# Every kind of file, how many there are, and who compares with it: this file ("here"), another test that names the kind
# ("elsewhere"), or nobody yet ("later").
KINDS = {
    "gfl_loss_cases_": (17, "here"),
    "ld_loss_cases_": (15, "here"),
    "gfl_forward_": (5, "elsewhere"),
    "decode_cases_": (7, "elsewhere"),
    "mmdet_keys_": (4, "elsewhere"),
    "preproc_cases_": (1, "elsewhere"),
    "preproc_resize_sizes": (1, "elsewhere"),
    "ld_train_step_": (1, "elsewhere"),
    "lr_schedule": (1, "elsewhere"),
    "mmdet_hyperparameters": (1, "later: values to look up, not to compute"),
    "gflv2_loss_": (1, "here"),
    "gflv2_head_forward_": (1, "elsewhere"),
    "fork_keys_gflv2_head": (1, "elsewhere"),
}
# Arrays of the loss files that nothing here computes: CIoU, crowds (mmdet takes no notice of them).
NOT_COVERED = ("loss_bbox_ciou", "gt_bboxes_ignore", "img_shapes")


@dataclass
class Case:
    """A loss file: its arrays in this package's types. Every array that is looked at is noted."""

    path: Path
    deviations: Deviations
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.arrays, self.notes = read(self.path)
        self.zeros: list[str] = json.loads(self.notes.get("zero_arrays", "[]"))

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self.arrays[key]

    def inputs(self, name: str) -> list[Tensor]:
        self.used |= {key for key in self.arrays if key.startswith(f"in/{name}.")}
        return levels(self.arrays, f"in/{name}")

    def unused(self) -> list[str]:
        """Return the arrays that no assertion has looked at, without those that `NOT_COVERED` declares."""
        return [
            key
            for key in sorted({*self.arrays, *self.zeros} - self.used)
            if not any(name in key for name in NOT_COVERED)
        ]

    @cached_property
    def locations(self) -> Locations:
        sizes = tuple((x.shape[-2], x.shape[-1]) for x in self.inputs("cls_score"))
        return location_grid(sizes, STRIDES, torch.device("cpu"))

    @cached_property
    def leaves(self) -> dict[str, list[Tensor]]:
        return {name: [x.requires_grad_() for x in self.inputs(name)] for name in ("cls_score", "bbox_pred")}

    @cached_property
    def student(self) -> Dense:
        return self.dense(self.leaves["cls_score"], self.leaves["bbox_pred"], self.inputs("feat"))

    @cached_property
    def teacher(self) -> Dense:
        return self.dense(self.inputs("t_cls_score"), self.inputs("t_bbox_pred"), self.inputs("t_feat"))

    def dense(self, cls: list[Tensor], edge: list[Tensor], features: list[Tensor]) -> Dense:
        flat_cls, flat_edge = (
            torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1) for maps in (cls, edge)
        )
        return Dense(
            cls=flat_cls,
            edge=flat_edge.unflatten(-1, (4, -1)),
            features=tuple(features),
            towers=NO_MAPS,
            locations=self.locations,
        )

    @cached_property
    def targets(self) -> Targets:
        boxes, labels = self.inputs("gt_bboxes"), self.inputs("gt_labels")
        shape = len(boxes), max(map(len, labels))
        targets = Targets(torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape).bool())
        for image, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            targets.gt_xyxy[image, : len(label)] = box
            targets.gt_label[image, : len(label)] = label
            targets.is_object[image, : len(label)] = True
        return targets

    @cached_property
    def assigned(self) -> Assigned:
        return assign(self.locations, self.targets, self["in/pad_shapes"], int(self.notes["num_classes"]))

    @cached_property
    def main(self) -> Where:
        return main_region(self.student, self.assigned)

    def by_level(self, where: Where) -> Iterator[Where]:
        """Yield the part of a region on each level."""
        for level in range(where.num_levels):
            on = where.level == level
            yield replace(
                where, row=where.row[on], weight=where.weight[on], level=where.level[on], image=where.image[on]
            )

    def detection(self, norm: Normalizer) -> dict[str, Tensor]:
        """Return the detection losses of each level."""
        found: dict[str, list[Tensor]] = {"qfl": [], "giou": [], "dfl": []}
        for level, main in enumerate(self.by_level(self.main)):
            on_level = replace(self.assigned, is_valid=self.assigned.is_valid & (self.locations.level == level))
            (at_main,) = self.student.at([main.picked])
            for name, loss in detection_losses(LossSpec(), self.student, at_main, on_level, main, norm).items():
                found[name].append(loss)
        return {name: torch.stack(losses) for name, losses in found.items()}

    def distillation(self, term: LD | KD, where: Where, norm: Normalizer) -> Tensor:
        """Return a term of each level."""
        pair = Pair(self.student, self.teacher)
        return torch.stack([term(pair, part, norm) for part in self.by_level(where)])


def check_assignment(case: Case) -> None:
    found, locations = case.assigned, case.locations
    expected = {key.removeprefix("assign/"): case[key] for key in case.arrays if key.startswith("assign/")}
    assert torch.equal(prior_boxes(locations), expected["anchors"])
    kind = f"{case.notes['kind']}: assignment, wrong locations"
    case.deviations.record(kind, case.path.name, (found.label != expected["labels"]).sum().item())
    assert torch.equal(found.label, expected["labels"])
    assert torch.equal(found.is_valid, expected["valid"].bool())
    assert torch.equal(found.is_valid, expected["gt_inds"] >= 0)
    assert torch.equal(found.is_positive, expected["gt_inds"] > 0)
    assert torch.equal(found.is_valid.float(), expected["label_weights"])
    assert torch.equal(found.is_positive.float(), expected["bbox_weights"])
    assert torch.equal(found.gt_xyxy, expected["bbox_targets"])
    for image, boxes in enumerate(case.targets.gt_xyxy):
        positive = found.is_positive[image]
        owner = expected["gt_inds"][image, positive] - 1
        assert torch.equal(found.gt_xyxy[image, positive], boxes[owner])
    assert_close(case.main.weight.sum(), expected["weight_targets_sum"], rtol=1e-6, atol=0)


def check_losses(case: Case, kind: str, found: Tensor, *keys: str) -> None:
    """Compare a loss of each level with every named array; what is recorded is the deviation of the sum over levels."""
    found = found.detach()
    for key in keys:
        expected = case[key]
        assert_close(found, expected, rtol=1e-5, atol=1e-8, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")
        if not expected.isnan().any():
            relative = (found.double().sum() / expected.double().sum() - 1).abs() if expected.any() else found.sum()
            case.deviations.record(f"{case.notes['kind']}: {kind}, relative", case.path.name, relative.item())


def check_gradients(case: Case, loss: Tensor, name: str, leaf: str) -> None:
    """Compare the gradient at every level's map; arrays named in `zero_arrays` are zero throughout."""
    found = torch.autograd.grad(loss, case.leaves[leaf], retain_graph=True, materialize_grads=True)
    for level, gradient in enumerate(found):
        key = f"{name}.{level}"
        case.used.add(key)
        expected = torch.zeros_like(gradient) if key in case.zeros else case[key]
        kind = f"{case.notes['kind']}: gradients, absolute"
        case.deviations.record(kind, case.path.name, (gradient - expected).abs().max().item())
        assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def check_vlr(case: Case, where: Where, expected: Tensor, kind: str) -> None:
    """Compare the region's members exactly, their weights closely."""
    found = torch.zeros(expected.numel())
    found[where.row] = where.weight
    wrong = ((found > 0) != (expected.flatten() > 0)).sum().item()
    case.deviations.record(f"ld: VLR {kind}, wrong locations", case.path.name, wrong)
    case.deviations.record("ld: VLR weights, absolute", case.path.name, (found - expected.flatten()).abs().max().item())
    assert wrong == 0
    assert (where.weight > 0).all()
    assert_close(found, expected.flatten(), rtol=0, atol=1e-6)


def check_imitation(case: Case, fork: str) -> None:
    """Compare feature imitation on the finest level.

    That level alone has positives, without which the reference gives 0. General instances are taken per level there, so
    they are taken of this level alone here.
    """
    pair = Pair(finest(case.student), finest(case.teacher))
    count = len(pair.student.locations.level)
    fields = ("label", "gt_xyxy", "is_positive", "is_valid", "is_ignored")
    assigned = replace(case.assigned, **{name: getattr(case.assigned, name)[:, :count] for name in fields})
    norm = normalizer("reference", assigned, main_region(pair.student, assigned))
    for name, key in (("finegrained", "finegrained"), ("inside_gt", "fitnet"), ("gi", "gibox")):
        found = Imitation(region=name)(pair, region(name, RegionSpec(), pair, assigned, case.targets), norm).detach()
        expected = case[f"{fork}/loss_im_{key}"]
        case.deviations.record("ld: imitation losses, relative", case.path.name, (found / expected[0] - 1).abs().item())
        assert_close(found, expected[0], rtol=1e-5, atol=0)
        assert not expected[1:].any()


def check_imitation_regions(case: Case, fork: str) -> None:
    """Compare the members of the regions that a file holds; the released code calls the inside of objects FitNet."""
    for name, key in (("finegrained", "finegrained"), ("inside_gt", "fitnet")):
        if f"{fork}/im_region_{key}" in case.arrays:
            expected = case[f"{fork}/im_region_{key}"].flatten()
            where = region(name, RegionSpec(), Pair(case.student, case.teacher), case.assigned, case.targets)
            wrong = torch.zeros_like(expected).index_fill(0, where.row, 1.0) != expected
            case.deviations.record("ld: imitation regions, wrong locations", case.path.name, wrong.sum().item())
            assert not wrong.any()


def finest(dense: Dense) -> Dense:
    """Return what a detector says on its finest level."""
    level_hw, stride = dense.locations.level_hw[:1], dense.locations.level_stride[:1]
    count = dense.locations.level_sizes[0]
    return replace(
        dense,
        cls=dense.cls[:, :count],
        edge=dense.edge[:, :count],
        features=dense.features[:1],
        locations=location_grid(level_hw, stride, torch.device("cpu")),
    )


@pytest.mark.parametrize("path", GFL, ids=lambda path: path.stem)
def test_gfl_losses(path: Path, deviations: Deviations) -> None:
    case = Case(path, deviations)
    check_assignment(case)
    norm = normalizer("synced", case.assigned, case.main)
    found = case.detection(norm)
    # the fork's GFL head divides by the bare sum of weights: NaN without positives
    fork = case.detection(replace(norm, weight_sum=case.main.weight.sum()))
    assert_close(norm.num_positive, case["mmdet3/avg_factor_cls"], rtol=0, atol=0)
    for name, key in (("qfl", "loss_cls"), ("giou", "loss_bbox"), ("dfl", "loss_dfl")):
        check_losses(case, "detection losses", found[name], f"mmdet3/{key}")
        check_losses(case, "detection losses", fork[name], f"fork/{key}")
    if case.notes["grads"] == "1":
        total = torch.cat(list(found.values())).sum()
        check_gradients(case, total, "mmdet3/grad_cls_score", "cls_score")
        check_gradients(case, total, "mmdet3/grad_bbox_pred", "bbox_pred")
    assert case.unused() == []


@pytest.mark.parametrize("quality", [3.0, 60.0])
@pytest.mark.parametrize("path", GFLV2, ids=lambda path: path.stem)
def test_gflv2_losses(path: Path, quality: float, deviations: Deviations) -> None:
    """The reference's probabilities as products with a quality; its channel for the background is a class as any."""
    case = Case(path, deviations)
    edge, product = case.inputs("bbox_pred"), case.inputs("cls_prob")
    case.locations = location_grid(tuple((x.shape[2], x.shape[3]) for x in edge), STRIDES, edge[0].device)
    share = torch.tensor(quality, dtype=torch.float64).sigmoid()
    cls = [(x / share).logit().float() for x in product]
    case.student = replace(case.dense(cls, edge, []), quality=torch.full((2, len(case.locations.level)), quality))
    assert_close(case.student.score, case.dense(product, edge, []).cls, rtol=1e-5, atol=1e-7)
    case.assigned = assign(case.locations, case.targets, case["in/pad_shapes"], cls[0].shape[1])
    found = case.detection(normalizer("synced", case.assigned, case.main))
    for name, key in (("qfl", "loss_cls"), ("giou", "loss_bbox"), ("dfl", "loss_dfl")):
        check_losses(case, "GFLv2 losses", found[name], f"fork/{key}")
    assert case.unused() == []


@pytest.mark.parametrize("path", LDS, ids=lambda path: path.stem)
def test_ld_losses(path: Path, deviations: Deviations) -> None:
    case = Case(path, deviations)
    check_assignment(case)
    # as published the released code raises where an image has no objects; there the numbers are of its patched copy
    fork = "fork_patched" if "fork_patched/loss_ld" in case.arrays else "fork"
    norm = normalizer("reference", case.assigned, case.main)
    detection = case.detection(norm)
    assert_close(norm.num_positive, case["mmdet3/avg_factor_cls"], rtol=0, atol=0)
    for name, key in (("qfl", "loss_cls"), ("giou", "loss_bbox"), ("dfl", "loss_dfl")):
        check_losses(case, "detection losses", detection[name], f"mmdet3/{key}", f"{fork}/{key}")

    ld = case.distillation(LD(), case.main, norm)
    kd = case.distillation(KD(), case.main, norm)
    check_losses(case, "distillation losses", ld, "mmdet3/loss_ld", f"{fork}/loss_ld")
    check_losses(case, "distillation losses", kd, f"{fork}/loss_kd")
    vlr = {}
    for kind, name in (("diou", f"{fork}_true_diou"), ("reference", fork)):
        where = vlr_region(RegionSpec(vlr=kind), case.assigned, case.targets, case.locations)
        check_vlr(case, where, case[f"{name}/vlr_region"], kind)
        vlr[kind] = case.distillation(LD(region="vlr", weight=0.25 / 4), where, norm)
        check_losses(case, "distillation losses", vlr[kind], f"{name}/loss_ld_vlr")
        kd_vlr = case.distillation(KD(region="vlr"), where, norm)
        check_losses(case, "distillation losses", kd_vlr, f"{name}/loss_kd_neg_unscaled")
    assert not case[f"{fork}/loss_kd_neg"].any()  # multiplied by a literal 0 in the released code

    check_imitation_regions(case, fork)
    if case.notes.get("feats") == "1":
        check_imitation(case, fork)
    if case.notes["grads"] == "1":
        plain = torch.cat(list(detection.values())).sum()
        check_gradients(case, ld.sum(), "mmdet3/grad_ld_only_bbox_pred", "bbox_pred")
        check_gradients(case, vlr["reference"].sum(), f"{fork}/grad_loss_ld_vlr_bbox_pred", "bbox_pred")
        check_gradients(case, kd.sum(), f"{fork}/grad_loss_kd_cls_score", "cls_score")
        # the eighth loss, feature imitation, reaches neither map
        total = plain + ld.sum() + vlr["reference"].sum() + kd.sum()
        for leaf in ("cls_score", "bbox_pred"):
            check_gradients(case, plain + ld.sum(), f"mmdet3/grad_{leaf}", leaf)
            check_gradients(case, total, f"{fork}/grad_total_{leaf}", leaf)
    assert case.unused() == []


def test_every_file_of_a_covered_kind_is_compared(shared: Path) -> None:
    files = sorted(path.name for path in (shared / "oracle").iterdir() if path.name != "README.md")
    kinds = {name: [kind for kind in sorted(KINDS, key=len) if name.startswith(kind)][-1:] for name in files}
    assert [name for name, kind in kinds.items() if not kind] == [], "a kind of file that no test knows of"
    counts = {kind: list(kinds.values()).count([kind]) for kind in KINDS}
    assert counts == {kind: count for kind, (count, _) in KINDS.items()}
    others = "".join(path.read_text() for path in TESTS.glob("test_*.py") if path.name != Path(__file__).name)
    for kind, (_, where) in KINDS.items():
        if where == "here":
            assert {name for name in files if name.startswith(kind)} <= {path.name for path in GFL + GFLV2 + LDS}, kind
        elif where == "elsewhere":
            assert kind in others, f"no test compares with {kind}*"
