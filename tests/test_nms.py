"""Score-voting Cluster-DIoU-NMS against a plain loop in double precision, and by hand."""

import math

import pytest
import torch
from scenes import grid, random_dense
from torch import Tensor
from torchvision.ops import box_iou, nms

from ldctl import spec
from ldctl.errors import SpecError
from ldctl.models import PostprocessSpec, detect
from ldctl.models.nms import cluster_nms, diou_overlap, voting_cluster_diou_nms
from ldctl.spec import ExportSpec
from ldctl.types import Detections

Box = tuple[float, float, float, float]
VOTING = PostprocessSpec(nms="voting_cluster_diou")


def diou(a: Box, b: Box) -> float:
    """Return IoU minus the 0.8th power of squared centre distance over squared enclosing diagonal."""
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    distance = math.dist(((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2))
    diagonal = math.dist((min(a[0], b[0]), min(a[1], b[1])), (max(a[2], b[2]), max(a[3], b[3])))
    return shared / union - (distance / diagonal) ** 1.6


def brute_force(xyxy: Tensor, score: Tensor, label: Tensor, threshold: float) -> list[tuple[float, ...]]:
    """Go through the boxes of each class best first; each that no kept one covers stays, moved by the worse ones."""
    boxes = [tuple(box) for box in xyxy.double().tolist()]
    scores, labels = score.double().tolist(), label.tolist()
    order = sorted(range(len(boxes)), key=lambda k: -scores[k])
    kept: list[int] = []
    for k in order:
        if all(labels[k] != labels[other] or diou(boxes[k], boxes[other]) <= threshold for other in kept):
            kept.append(k)
    results = []
    for k in kept:
        voters = [
            (other, value)
            for other in order[order.index(k) :]
            if labels[other] == labels[k] and (value := diou(boxes[k], boxes[other])) > 0.7
        ]
        weights = [scores[other] * math.exp(-((1 - value) ** 2) / 0.025) for other, value in voters]
        edges = [
            sum(weight * boxes[other][side] for weight, (other, _) in zip(weights, voters, strict=True))
            for side in range(4)
        ]
        results.append((*(edge / sum(weights) for edge in edges), scores[k], labels[k]))
    return results


def crowd(count: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes in clusters around a few places, with different scores."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(max(count // 10, 1), 4, generator=generator) * 60 + torch.tensor([0.0, 0.0, 80.0, 80.0])
    which = torch.randint(len(places), (count,), generator=generator)
    xyxy = places[which] + torch.randn(count, 4, generator=generator) * 8
    score = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return xyxy, score, torch.randint(num_classes, (count,), generator=generator)


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8])
@pytest.mark.parametrize(("count", "num_classes"), [(1, 1), (7, 1), (60, 1), (60, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(count: int, num_classes: int, seed: int, threshold: float) -> None:
    xyxy, score, label = crowd(count, num_classes, seed)
    expected = brute_force(xyxy, score, label, threshold)
    found = voting_cluster_diou_nms(xyxy, score, label, threshold=threshold, limit=count)
    table = torch.cat((found[0], found[1][:, None], found[2][:, None]), dim=1)
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-4)
    if count == 60:
        assert len(expected) < count
        of = {round(value, 6): box for value, box in zip(score.tolist(), xyxy, strict=True)}
        moved = [
            (box - of[round(value, 6)]).abs().max() for box, value in zip(found[0], found[1].tolist(), strict=True)
        ]
        assert max(moved) > 0.5
    assert [
        part[:2].tolist() for part in voting_cluster_diou_nms(xyxy, score, label, threshold=threshold, limit=2)
    ] == [part[:2].tolist() for part in found]


def test_two_boxes_by_hand() -> None:
    # 90 of 110 shared, centres 1 apart, enclosing box 11 by 10
    xyxy = torch.tensor([[1.0, 0.0, 11.0, 10.0], [0.0, 0.0, 10.0, 10.0]])
    overlap = 90 / 110 - (1 / 221) ** 0.8
    assert diou_overlap(xyxy)[0, 1].item() == pytest.approx(overlap, rel=1e-6)
    vote = 0.4 * math.exp(-((1 - overlap) ** 2) / 0.025)
    shift = vote / (0.8 + vote)  # of the better box, to the right
    found = voting_cluster_diou_nms(
        xyxy, torch.tensor([0.4, 0.8]), torch.zeros(2, dtype=torch.int64), threshold=0.6, limit=9
    )
    assert found[0].tolist() == [pytest.approx([shift, 0.0, 10 + shift, 10.0], rel=1e-5)]
    assert (found[1].tolist(), found[2].tolist()) == ([pytest.approx(0.8)], [0])
    # of different classes they leave each other alone; below a higher threshold both stay, and the worse still votes
    apart = voting_cluster_diou_nms(xyxy, torch.tensor([0.4, 0.8]), torch.tensor([0, 1]), threshold=0.6, limit=9)
    assert apart[0].tolist() == xyxy.flip(0).tolist()
    both = voting_cluster_diou_nms(
        xyxy, torch.tensor([0.4, 0.8]), torch.zeros(2, dtype=torch.int64), threshold=0.9, limit=9
    )
    assert both[0][1].tolist() == xyxy[0].tolist()
    assert both[0][0].tolist() == pytest.approx([shift, 0.0, 10 + shift, 10.0], rel=1e-5)


def test_clusters_of_iou_are_greedy_suppression() -> None:
    """Chains too: a box that a removed one overlaps stays, however long the chain."""
    chain = torch.tensor([[0.0, 0.0, 10.0, 10.0]]) + 2.0 * torch.arange(40)[:, None] * torch.tensor([1.0, 0, 1.0, 0])
    for xyxy in (chain, crowd(200, 1, 0)[0]):
        score = torch.arange(len(xyxy), 0, -1).float()
        keep = cluster_nms(box_iou(xyxy, xyxy), 0.6)
        assert torch.equal(keep.nonzero()[:, 0], nms(xyxy, score, 0.6))
    assert cluster_nms(box_iou(chain, chain), 0.6).tolist() == [True, False] * 20


def test_no_boxes_and_tiny_ones() -> None:
    none = voting_cluster_diou_nms(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), threshold=0.6, limit=5
    )
    assert [tuple(part.shape) for part in none] == [(0, 4), (0,), (0,)]
    tiny = torch.tensor([[1.0, 1.0, 1.0 + 2**-20, 1.0 + 2**-20]])  # an area below the floor of the denominators
    found = voting_cluster_diou_nms(
        tiny, torch.tensor([0.5]), torch.zeros(1, dtype=torch.int64), threshold=0.6, limit=5
    )
    assert torch.equal(found[0], tiny)


def test_detector_uses_it() -> None:
    """The boxes of the brute force in a random scene; those of the other NMS where a single box is left."""
    dense, size_hw = random_dense(grid(128, 128), 1, 3, seed=0), torch.tensor([[128, 128]])

    def found(spec: PostprocessSpec) -> Detections:
        return detect(dense, size_hw, size_hw, (0,), spec)[0]

    voted = found(VOTING)
    assert len(voted.xyxy) == 100
    everything = found(PostprocessSpec(nms_iou=1.0, max_detections=10_000))
    brute = brute_force(everything.xyxy, everything.score, everything.label, 0.6)
    expected = torch.tensor(brute[:100], dtype=torch.float32)
    torch.testing.assert_close(voted.xyxy, expected[:, :4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(voted.score, expected[:, 4])
    assert torch.equal(voted.label, expected[:, 5].long())
    best = VOTING.model_copy(update={"max_detections": 1, "score_threshold": voted.score[0].item() - 1e-6})
    assert torch.equal(found(best).xyxy, found(best.model_copy(update={"nms": "class"})).xyxy)


def test_export_is_refused() -> None:
    flags = {"checkpoint": "x.safetensors", "postprocess": {"nms": "voting_cluster_diou"}}
    with pytest.raises(SpecError) as fault:
        spec.load(ExportSpec, None, flags, [])
    assert str(fault.value) == (
        'postprocess.nms "voting_cluster_diou" cannot be exported: ONNX has no operator for it: '
        "export with --set postprocess.nms=class"
    )
    assert spec.load(ExportSpec, None, flags, ["postprocess.nms=class"]).postprocess == PostprocessSpec()
