"""Comparing detectors that differ in classes."""

from dataclasses import replace

import torch
from scenes import grid, random_dense
from torch.testing import assert_close

from ldctl.pairing import SharedClasses, share_classes
from ldctl.types import Pair

HERE = grid(64, 96)


def index(*classes: int) -> torch.Tensor:
    return torch.tensor(classes, dtype=torch.int64)


# --- classes --------------------------------------------------------------------------------------------------------


def test_shared_classes_stand_in_the_same_order() -> None:
    student, teacher, crossed = (random_dense(HERE, 2, num_classes, seed) for seed, num_classes in enumerate((3, 4, 4)))
    pair = share_classes(Pair(student, teacher, crossed), SharedClasses(index(0, 2), index(3, 1)))
    assert torch.equal(pair.student.cls, student.cls[..., [0, 2]])
    assert torch.equal(pair.teacher.cls, teacher.cls[..., [3, 1]])
    assert pair.crossed is not None
    assert torch.equal(pair.crossed.cls, crossed.cls[..., [3, 1]])
    assert pair.student.edge is student.edge
    assert pair.teacher.edge is teacher.edge


def test_only_shared_classes_get_a_gradient() -> None:
    student, teacher = (random_dense(HERE, 1, 3, seed) for seed in (0, 1))
    share_classes(Pair(student, teacher), SharedClasses(index(2), index(0))).student.cls.sum().backward()
    assert student.cls.grad is not None
    assert student.cls.grad[..., :2].abs().sum() == 0
    assert (student.cls.grad[..., 2] == 1).all()


def test_equal_classes_are_left_as_they_are() -> None:
    pair = Pair(*(random_dense(HERE, 1, 3, seed) for seed in (0, 1)))
    assert share_classes(pair, None) is pair
    picked = share_classes(pair, SharedClasses(index(0, 1, 2), index(0, 1, 2)))
    assert_close(picked.student.cls, pair.student.cls, rtol=0, atol=0)


def test_the_order_of_the_teachers_classes_does_not_matter() -> None:
    student, teacher = (random_dense(HERE, 1, num_classes, seed) for seed, num_classes in enumerate((3, 5)))
    order = [4, 2, 0, 1, 3]
    turned = replace(teacher, cls=teacher.cls[..., order])
    place = {old: new for new, old in enumerate(order)}
    first = share_classes(Pair(student, teacher), SharedClasses(index(0, 1), index(2, 3)))
    second = share_classes(Pair(student, turned), SharedClasses(index(0, 1), index(place[2], place[3])))
    assert torch.equal(first.teacher.cls, second.teacher.cls)
