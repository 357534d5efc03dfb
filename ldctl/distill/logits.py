"""Distillation terms on a head's outputs: LD on edge distributions, KD on classes.

Each term is one frozen object: its schema is what a run spec says, calling it gives its loss. Below each stands the
pure function that it wraps.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ldctl.distributed import gather_rows, rank, world_size
from ldctl.schema import Spec
from ldctl.types import Normalizer, Pair, Where

REFERENCE_IMAGES = 2  # images per rank at which the published numbers were tuned


class LD(Spec):
    """Localization distillation: the student's edge distributions imitate the teacher's.

    Attributes:
        region: `"main"`: positives, weighted by the student's best score. `"vlr"`: the valuable localization region,
            weighted by IoU.
        weight: Factor. The released code's main LD is 0.25; its VLR-LD divides by 16 instead of 4, hence 0.0625.
        temperature: Softens both distributions.
    """

    kind: Literal["ld"] = "ld"
    region: Literal["main", "vlr"] = "main"
    weight: float = Field(default=0.25, gt=0)
    temperature: float = Field(default=10.0, ge=1)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"ld/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the weighted sum over the region's rows.

        Normalized by: nothing (`"reference"`: the sum over the rank's images), or (`"synced"`) half the rank's images,
        which is the same at two images per rank and does not grow with them.
        """
        student = pair.student.edge.flatten(0, 1)[where.row]
        teacher = pair.teacher.edge.flatten(0, 1)[where.row]
        total = (localization_distillation(student, teacher, self.temperature) * where.weight).sum()
        return self.weight * total / (1 if norm.kind == "reference" else where.num_images / REFERENCE_IMAGES)


def localization_distillation(
    student_edge: Float[Tensor, "N 4 R"], teacher_edge: Float[Tensor, "N 4 R"], temperature: float
) -> Float[Tensor, " N"]:
    """Return `T^2 / R * KL(teacher, student)` of softened edge distributions, mean over four edges.

    Returns:
        Values >= 0; zero where both distributions are equal.

    Normalized by: the bins `R` and the four edges.

    Source: LD (CVPR 2022, arXiv:2102.12252), eq. 3.

    Differs from the paper: it sums over bins and does not speak of `T^2`; the released code, whose weights are used
    here, averages over bins and multiplies by `T^2`.
    """
    num_bins = student_edge.shape[-1]
    divergence = softened_kl(student_edge, teacher_edge, temperature)
    return divergence.mean(dim=-1) * (temperature**2 / num_bins)


class KD(Spec):
    """Class distillation with a softmax over classes, as in the released LD code.

    Blind to a single class, where a softmax is constant: use `binary_kd` there.

    Attributes:
        region: `"main"` (positives) or `"vlr"`; its weights are not used.
        weight: Factor.
        temperature: Softens both distributions.
    """

    kind: Literal["kd"] = "kd"
    region: Literal["main", "vlr"] = "main"
    weight: float = Field(default=10.0, gt=0)
    temperature: float = Field(default=2.0, ge=1)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"kd/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the mean over each level's rows, summed over levels.

        Normalized by: see `sum_of_level_means`.
        """
        student = pair.student.cls.flatten(0, 1)[where.row].float()
        teacher = pair.teacher.cls.flatten(0, 1)[where.row].float()
        per_row = class_distillation(student, teacher, self.temperature)
        return self.weight * sum_of_level_means(per_row, where, norm)


def class_distillation(
    student_cls: Float[Tensor, "N C"], teacher_cls: Float[Tensor, "N C"], temperature: float
) -> Float[Tensor, " N"]:
    """Return `T^2 / C * KL(teacher, student)` of softened class distributions.

    Normalized by: the classes `C`, so the same weight is four times as strong on VOC's 20 classes as on COCO's 80.

    Source: LD (CVPR 2022, arXiv:2102.12252), released code.
    """
    num_classes = student_cls.shape[-1]
    return softened_kl(student_cls, teacher_cls, temperature) * (temperature**2 / num_classes)


def sum_of_level_means(per_row: Float[Tensor, " N"], where: Where, norm: Normalizer) -> Float[Tensor, ""]:
    """Average over the rows of each pyramid level, then sum over levels.

    `"reference"`: the released code's, each rank on its own; a level without rows counts 0. `"synced"`: the mean of
    what the reference gives over all pairs of images, whichever ranks hold them. It does not depend on the split; on
    ranks of two images each it is what the reference gives on average over the ways to pair the images.
    """
    index = where.image * where.num_levels + where.level
    count = per_row.new_zeros(where.num_images * where.num_levels).index_add(0, index, torch.ones_like(per_row))
    count = count.view(where.num_images, where.num_levels)
    if norm.kind == "reference":
        total = per_row.new_zeros(where.num_levels).index_add(0, where.level, per_row)
        return (total / count.sum(dim=0).clamp(min=1)).sum()
    # gradients are averaged over ranks, shares are meant to be summed
    return (per_row * pair_shares(count).flatten()[index]).sum() * world_size()


def pair_shares(count: Float[Tensor, "B P"]) -> Float[Tensor, "B P"]:
    """Return what one row counts in the mean, over all pairs of images of all ranks, of the pair's mean over rows.

    With `n` rows in its own image, a row counts `1 / (n + m)` in the pair with an image of `m` rows, and nothing in
    pairs without its image. A single image makes no pair: its rows count `1 / n`.

    Args:
        count: Rows of each of this rank's images on each level; every rank has as many images.

    Returns:
        Values in (0, 1]; of no meaning where there are no rows.
    """
    counts = gather_rows(count)
    num_own, num_all = len(count), len(counts)
    if num_all == 1:
        return 1 / count.clamp(min=1)
    image = torch.arange(num_all, device=count.device)
    is_other = image != image[rank() * num_own : (rank() + 1) * num_own, None]
    in_pair = is_other[..., None] / (count[:, None] + counts).clamp(min=1)
    return in_pair.sum(dim=1) * (2 / (num_all * (num_all - 1)))


class BinaryKD(Spec):
    """Class distillation of each class's sigmoid, which is what the head predicts; works with a single class.

    Attributes:
        region: `"all"` valid locations or `"main"` (positives); each counts alike, whatever its weight above 0.
        weight: Factor. Source: BCKD and CrossKD use 1.
        beta: How strongly locations are discounted where student and teacher agree.
    """

    kind: Literal["binary_kd"] = "binary_kd"
    region: Literal["all", "main"] = "all"
    weight: float = Field(default=1.0, gt=0)
    beta: float = Field(default=1.0, gt=0)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"binary_kd/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the sum over the region's rows.

        Normalized by: the number of positives, averaged over ranks.
        """
        student = pair.student.cls.flatten(0, 1)[where.row].float()
        teacher = pair.teacher.cls.flatten(0, 1)[where.row].float()
        per_row = binary_distillation(student, teacher, self.beta)
        return self.weight * (per_row * (where.weight > 0)).sum() / norm.num_positive


def binary_distillation(
    student_cls: Float[Tensor, "N C"], teacher_cls: Float[Tensor, "N C"], beta: float
) -> Float[Tensor, " N"]:
    """Return `|sigmoid(t) - sigmoid(s)|^beta * BCE(s, sigmoid(t))`, summed over classes.

    Returns:
        Values >= 0; zero where both scores are equal.

    Source: BCKD (ICCV 2023, arXiv:2308.14286), classification term.
    """
    target = teacher_cls.detach().sigmoid()
    distance = (target - student_cls.sigmoid()).abs()
    cross_entropy = binary_cross_entropy_with_logits(student_cls, target, reduction="none")
    return (distance.pow(beta) * cross_entropy).sum(dim=-1)


def softened_kl(
    student: Float[Tensor, "*S K"], teacher: Float[Tensor, "*S K"], temperature: float
) -> Float[Tensor, "*S"]:
    """Return `KL(softmax(teacher / T), softmax(student / T))` over the last axis; the teacher gets no gradient."""
    log_p = (teacher.detach() / temperature).log_softmax(dim=-1)
    log_q = (student / temperature).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
