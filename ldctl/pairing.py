"""Make what student and teacher say comparable, where they differ in classes."""

from dataclasses import dataclass, replace

from jaxtyping import Int64
from torch import Tensor

from ldctl.types import Dense, Pair


@dataclass(frozen=True)
class SharedClasses:
    """The classes that student and teacher share, on their device.

    Attributes:
        student: Indices among the student's classes.
        teacher: Indices of the same classes among the teacher's.
    """

    student: Int64[Tensor, " C"]
    teacher: Int64[Tensor, " C"]


def share_classes(pair: Pair, shared: SharedClasses | None) -> Pair:
    """Return the pair with the logits of shared classes only, in the same order on both sides.

    What the teacher's head makes of the student's maps speaks of the teacher's classes.

    Args:
        pair: Any.
        shared: Which; none where both have the same classes in the same order.
    """
    if shared is None:
        return pair
    return Pair(
        student=_picked(pair.student, shared.student),
        teacher=_picked(pair.teacher, shared.teacher),
        crossed=_picked(pair.crossed, shared.teacher) if pair.crossed else None,
    )


def _picked(dense: Dense, classes: Int64[Tensor, " C"]) -> Dense:
    return replace(dense, cls=dense.cls.index_select(-1, classes))
