"""CrossKD: the teacher's own head judges what is inside the student's head.

The student's tower maps, aligned to the teacher's, go on through the rest of the teacher's frozen head; these
cross-head predictions imitate the teacher's. The student's own predictions are left to the detection losses, so the two
do not pull them in different directions.

Source: CrossKD (CVPR 2024, arXiv:2306.11369).
"""

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ldctl.boxes import EPS
from ldctl.distill.logits import ClassReduction, binary_distillation, localization_distillation
from ldctl.distributed import reduce_mean
from ldctl.schema import Spec
from ldctl.types import Normalizer, Pair, TowerMaps, Where

CROSS_TEMPERATURE = 1.0  # Source: CrossKD's configuration


class CrossKDClass(Spec):
    """Class distillation of the cross-head predictions.

    Zero also where the student's maps differ from the teacher's by a scale and a shift of each channel alone, which the
    alignment takes out; and it says nothing of the student's layers behind the cut.

    Attributes:
        region: All valid locations of the teacher.
        weight: Factor. Source: CrossKD's configuration, as that of `beta`.
        beta: How strongly locations are discounted where cross-head and teacher agree; see `BinaryKD`.
    """

    kind: Literal["crosskd_cls"] = "crosskd_cls"
    region: Literal["all"] = "all"
    weight: float = Field(default=1.0, gt=0)
    beta: float = Field(default=1.0, ge=1)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"crosskd_cls/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the sum over all valid locations.

        Normalized by: the number of positives, averaged over ranks, as in the released code; `norm.kind` changes
        nothing.
        """
        assert pair.crossed is not None, "the step makes cross-head predictions where a term asks for them"
        crossed = pair.crossed.cls.flatten(0, 1)[where.row].float()
        teacher = pair.teacher.cls.flatten(0, 1)[where.row].float()
        weight = at_teachers(where.weight, pair)
        return self.weight * binary_distillation(crossed, teacher, weight, self.beta) / norm.num_positive


class CrossKDBox(Spec):
    """Box distillation of the cross-head predictions: KL of edge distributions, weighted by the teacher's best score.

    Student and teacher may have different bins and prior boxes, for it is the teacher's head that speaks on both sides.
    Blind to the same as `CrossKDClass`.

    Attributes:
        region: All valid locations of the teacher.
        weight: Factor. Source: CrossKD's configuration.
        class_reduction: `"sum"` of the divergence over bins, as in the released code, or `"mean"`.
    """

    kind: Literal["crosskd_box"] = "crosskd_box"
    region: Literal["all"] = "all"
    weight: float = Field(default=4.0, gt=0)
    class_reduction: ClassReduction = "sum"

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"crosskd_box/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the mean over all valid locations, weighted by the teacher's best score.

        Normalized by: the sum of those scores, of the rank's own images (`"reference"`, as in the released code), or
        averaged over ranks (`"synced"`), which makes it one mean over the images of all ranks.
        """
        assert pair.crossed is not None, "the step makes cross-head predictions where a term asks for them"
        crossed = pair.crossed.edge.flatten(0, 1)[where.row]
        teacher = pair.teacher.edge.flatten(0, 1)[where.row]
        score = pair.teacher.best_score.detach().flatten()[where.row] * at_teachers(where.weight, pair)
        total_score = score.sum() if norm.kind == "reference" else reduce_mean(score.sum())
        per_row = localization_distillation(crossed, teacher, CROSS_TEMPERATURE, self.class_reduction)
        return self.weight * (per_row * score).sum() / total_score.clamp(min=EPS)


def at_teachers(weight: Float[Tensor, " N"], pair: Pair) -> Float[Tensor, " M"]:
    """Return the weights of the teacher's locations, of which a cell may have another number than of the student's.

    Args:
        weight: Of all of the student's locations; those of a cell have the same.
        pair: Student and teacher.
    """
    own, other = pair.student.locations.num_priors, pair.teacher.locations.num_priors
    return weight if own == other else weight[::own].repeat_interleave(other)


def aligned_towers(student: TowerMaps, teacher: TowerMaps, towers: Collection[str]) -> TowerMaps:
    """Return the student's maps, aligned level by level, for the rest of the teacher's head to read.

    Args:
        student: As wide as the teacher's, of the same cut.
        teacher: Without gradient.
        towers: Which of `cls` and `edge` a term asks about; of the other the teacher's own maps are returned.
    """
    return TowerMaps(
        cls=_aligned(student.cls, teacher.cls) if "cls" in towers else teacher.cls,
        edge=_aligned(student.edge, teacher.edge) if "edge" in towers else teacher.edge,
    )


def _aligned(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(align(own, other) for own, other in zip(student, teacher, strict=True))


def align(student: Float[Tensor, "B D H W"], teacher: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """Give each channel of the student's map the mean and standard deviation of the teacher's.

    Statistics are taken over the images at hand, of one rank and one micro-batch, and all of their pixels, padding
    included; nothing is learned.

    Returns:
        float32 at least. A channel without spread, such as that of a single image on a map of one location, becomes the
        teacher's mean and passes no gradient.

    Source: CrossKD's released code, which gives NaN where there is a single value.
    """
    # bfloat16 has too few digits for statistics over a map
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    num_values = student.shape[0] * student.shape[2] * student.shape[3]
    (own_std, own_mean), (std, mean) = (
        torch.std_mean(maps, dim=(0, 2, 3), correction=min(1, num_values - 1), keepdim=True)
        for maps in (student, teacher)
    )
    return (student - own_mean) / (own_std + EPS) * std + mean
