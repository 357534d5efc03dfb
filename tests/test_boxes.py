"""Boxes against torchvision, closed forms and numbers worked out by hand."""

import pytest
import torch
import torchvision
from torch.testing import assert_close

from ldctl.boxes import (
    box_area,
    box_giou,
    box_iou,
    center_penalty,
    decode_ltrb,
    encode_ltrb,
    expected_distance,
    group_nms,
    intersection,
    location_grid,
    prior_boxes,
    rank_in_group,
)

A = torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=torch.float64)
B = torch.tensor([5.0, 5.0, 20.0, 15.0], dtype=torch.float64)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 0.5
    return torch.cat((corner, corner + size), dim=1)


def test_golden_values() -> None:
    assert intersection(A, B).item() == 25
    assert box_iou(A, B).item() == pytest.approx(0.1111111111, abs=1e-10)
    assert box_giou(A, B).item() == pytest.approx(-0.1388888889, abs=1e-10)
    assert (box_iou(A, B) - center_penalty(A, B)).item() == pytest.approx(-0.0188888889, abs=1e-10)
    # the released code's DIoU with the first box as prior: 25 / 100 - 0.13
    assert (intersection(A, B) / box_area(A) - center_penalty(A, B)).item() == pytest.approx(0.12, abs=1e-12)


def test_equal_torchvision() -> None:
    a, b = random_boxes(60, 0), random_boxes(50, 1)
    pairs = a[:, None], b[None]
    assert (box_iou(*pairs) == 0).any()
    assert (box_iou(*pairs) > 0.3).any()
    assert_close(box_iou(*pairs), torchvision.ops.box_iou(a, b), rtol=1e-6, atol=1e-12)
    assert_close(box_giou(*pairs), torchvision.ops.generalized_box_iou(a, b), rtol=1e-6, atol=1e-7)
    distance_iou = torchvision.ops.distance_box_iou(a, b)
    assert_close(box_iou(*pairs) - center_penalty(*pairs), distance_iou, rtol=1e-6, atol=1e-7)


def test_ranges_and_symmetry() -> None:
    a, b = random_boxes(500, 2), random_boxes(500, 3)
    for overlap in (box_iou, box_giou, center_penalty):
        assert_close(overlap(a, b), overlap(b, a), rtol=0, atol=1e-14)
    assert (box_giou(a, b) <= box_iou(a, b)).all()
    assert (box_giou(a, b) > -1).all()
    assert ((center_penalty(a, b) >= 0) & (center_penalty(a, b) < 1)).all()
    assert_close(box_iou(a, a), torch.ones(500, dtype=torch.float64))
    assert_close(box_giou(a, a), torch.ones(500, dtype=torch.float64))
    assert not center_penalty(a, a).any()


def test_boxes_without_area_stay_finite() -> None:
    point = torch.tensor([3.0, 3.0, 3.0, 3.0], requires_grad=True)
    for overlap in (box_iou, box_giou, center_penalty):
        value = overlap(point, point.detach())
        assert value.item() == 0
        assert torch.autograd.grad(value, point)[0].isfinite().all()


def test_gradients_of_giou() -> None:
    a, b = random_boxes(20, 4).requires_grad_(), random_boxes(20, 5)
    assert torch.autograd.gradcheck(lambda x: box_giou(x, b), (a,))


def test_encode_and_decode_are_inverse() -> None:
    boxes = random_boxes(200, 6)
    generator = torch.Generator().manual_seed(7)
    xy = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 100
    stride = torch.tensor([8.0, 16, 32, 64, 128], dtype=torch.float64).repeat(40)
    ltrb = encode_ltrb(xy, boxes, stride)
    assert (ltrb < 0).any()  # some locations lie outside
    assert_close(decode_ltrb(xy, ltrb, stride), boxes, rtol=0, atol=1e-12)


def test_encode_by_hand() -> None:
    ltrb = encode_ltrb(torch.tensor([16.0, 24.0]), torch.tensor([8.0, 20.0, 40.0, 64.0]), torch.tensor(8.0))
    assert ltrb.tolist() == [1.0, 0.5, 3.0, 5.0]


def test_expected_distance() -> None:
    bins = torch.arange(17, dtype=torch.float64)
    edge = torch.stack((0.1 * bins, -((bins - 5) ** 2) / 8))
    expected = torch.tensor([10.291444519167015, 5.01701161562169], dtype=torch.float64)
    assert_close(expected_distance(edge), expected, rtol=1e-12, atol=0)
    assert expected_distance(torch.zeros(17)).item() == pytest.approx(8)  # uniform: the middle
    assert expected_distance(torch.nn.functional.one_hot(torch.tensor(13), 17) * 1000.0).item() == 13


def test_location_grid() -> None:
    locations = location_grid(((2, 3), (1, 2)), (8, 16), torch.device("cpu"))
    assert locations.xy.tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0], [16, 0]]
    assert locations.stride.tolist() == [8.0] * 6 + [16.0] * 2
    assert locations.level.tolist() == [0] * 6 + [1] * 2
    assert locations.level_sizes == (6, 2)
    middle = location_grid(((2, 3), (1, 2)), (8, 16), torch.device("cpu"), 0.5)
    assert middle.xy.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    boxes = prior_boxes(locations)
    assert boxes[4].tolist() == [8 - 32, 8 - 32, 8 + 32, 8 + 32]
    assert boxes[7].tolist() == [16 - 64, -64, 16 + 64, 64]


@pytest.mark.parametrize(("count", "num_groups"), [(300, 7), (1500, 40)])  # torchvision suppresses many in another way
def test_suppression_knows_groups_apart(count: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 90 - 45
    xyxy = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 40), dim=1)
    score = torch.randint(50, (count,), generator=generator) / 50  # ties: the first is the better
    group = torch.randint(num_groups, (count,), generator=generator)
    covers, groups = (box_iou(xyxy[:, None].double(), xyxy.double()) > 0.5).tolist(), group.tolist()
    kept: list[int] = []
    for row in sorted(range(count), key=lambda row: -score[row].item()):
        if not any(groups[other] == groups[row] and covers[other][row] for other in kept):
            kept.append(row)
    assert group_nms(xyxy, score, group, 0.5).tolist() == sorted(kept)
    assert num_groups < len(kept) < count


def test_suppression_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert group_nms(torch.zeros(0, 4), torch.zeros(0), none, 0.5).tolist() == []
    assert rank_in_group(none).tolist() == []


def test_ranks_count_within_a_group() -> None:
    assert rank_in_group(torch.tensor([0, 0, 0, 2, 3, 3])).tolist() == [0, 1, 2, 0, 0, 1]
