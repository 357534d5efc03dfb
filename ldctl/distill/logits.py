"""Distillation terms on a head's outputs: LD on edge distributions, KD on classes, BCKD on classes and boxes.

Each term is one frozen object: its schema is what a run spec says, calling it gives its loss. Below each stands the
pure function that it wraps.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ldctl.boxes import box_giou, decode_ltrb, expected_distance
from ldctl.distributed import gather_rows, rank, world_size
from ldctl.fused import focal_cross_entropy, softened_kl
from ldctl.schema import Spec
from ldctl.types import Normalizer, Pair, Where

REFERENCE_IMAGES = 2  # images per rank at which the published numbers were tuned
ClassReduction = Literal["sum", "mean"]  # of a divergence over bins or classes; the word is that of CrossKD's code


class LD(Spec):
    """Localization distillation: the student's edge distributions imitate the teacher's.

    Attributes:
        region: `"main"`: positives, weighted by the student's best score. `"vlr"`: the valuable localization region,
            weighted by IoU.
        weight: Factor. The released code's main LD is 0.25; its VLR-LD divides by 16 instead of 4, hence 0.0625.
        temperature: Softens both distributions.
        class_reduction: `"mean"` of the divergence over bins, which the released code's weights go with, or `"sum"`, as
            the paper writes it: stronger by the number of bins.
    """

    kind: Literal["ld"] = "ld"
    region: Literal["main", "vlr"] = "main"
    weight: float = Field(default=0.25, gt=0)
    temperature: float = Field(default=10.0, ge=1)
    class_reduction: ClassReduction = "mean"

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
        per_row = localization_distillation(student, teacher, self.temperature, self.class_reduction)
        total = (per_row * where.weight).sum()
        return self.weight * total / (1 if norm.kind == "reference" else where.num_images / REFERENCE_IMAGES)


def localization_distillation(
    student_edge: Float[Tensor, "N 4 R"],
    teacher_edge: Float[Tensor, "N 4 R"],
    temperature: float,
    class_reduction: ClassReduction = "mean",
) -> Float[Tensor, " N"]:
    """Return `T^2 / R * KL(teacher, student)` of softened edge distributions, mean over four edges.

    Args:
        student_edge: Logits.
        teacher_edge: Logits over the same bins.
        temperature: At least 1.
        class_reduction: `"sum"` leaves out the `/ R`.

    Returns:
        Values >= 0; zero where both distributions are equal.

    Normalized by: the bins `R` (unless summed) and the four edges.

    Source: LD (CVPR 2022, arXiv:2102.12252), eq. 3.

    Differs from the paper: it sums over bins and does not speak of `T^2`; the released code, whose weights are used
    here, averages over bins and multiplies by `T^2`.
    """
    divergence = softened_kl(student_edge, teacher_edge, temperature)
    return divergence.mean(dim=-1) * divergence_factor(temperature, student_edge.shape[-1], class_reduction)


class KD(Spec):
    """Class distillation with a softmax over classes, as in the released LD code.

    Blind to a single class, where a softmax is constant: use `binary_kd` there.

    Attributes:
        region: `"main"` (positives) or `"vlr"`; its weights are not used.
        weight: Factor.
        temperature: Softens both distributions.
        class_reduction: `"mean"` of the divergence over classes, as in the released code, or `"sum"`: stronger by the
            number of classes.
    """

    kind: Literal["kd"] = "kd"
    region: Literal["main", "vlr"] = "main"
    weight: float = Field(default=10.0, gt=0)
    temperature: float = Field(default=2.0, ge=1)
    class_reduction: ClassReduction = "mean"

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
        per_row = class_distillation(student, teacher, self.temperature, self.class_reduction)
        return self.weight * sum_of_level_means(per_row, where, norm)


def class_distillation(
    student_cls: Float[Tensor, "N C"],
    teacher_cls: Float[Tensor, "N C"],
    temperature: float,
    class_reduction: ClassReduction = "mean",
) -> Float[Tensor, " N"]:
    """Return `T^2 / C * KL(teacher, student)` of softened class distributions.

    Args:
        student_cls: Logits.
        teacher_cls: Logits.
        temperature: At least 1.
        class_reduction: `"sum"` leaves out the `/ C`.

    Normalized by: the classes `C` (unless summed), so the same weight is four times as strong on VOC's 20 classes as on
    COCO's 80.

    Source: LD (CVPR 2022, arXiv:2102.12252), released code.
    """
    factor = divergence_factor(temperature, student_cls.shape[-1], class_reduction)
    return softened_kl(student_cls, teacher_cls, temperature) * factor


def sum_of_level_means(per_row: Float[Tensor, " N"], where: Where, norm: Normalizer) -> Float[Tensor, ""]:
    """Average over the rows of each pyramid level that have a weight, whatever it is, then sum over levels.

    `"reference"`: the released code's, each rank on its own; a level without rows counts 0. `"synced"`: the mean of
    what the reference gives over all pairs of images, whichever ranks hold them. It does not depend on the split; on
    ranks of two images each it is what the reference gives on average over the ways to pair the images.
    """
    index = where.image * where.num_levels + where.level
    is_in = (where.weight > 0).to(per_row.dtype)
    per_row = per_row * is_in
    count = per_row.new_zeros(where.num_images * where.num_levels).index_add(0, index, is_in)
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
    """Class distillation of each class's score, which is what detections are ranked by; works with a single class.

    A head's quality is part of the score, so it is taught, too, and heads with and without one can teach each other.

    Differs from the released code of BCKD: levels without positives count too, which the code leaves out.

    Attributes:
        region: `"all"` valid locations or `"main"` (positives); each counts alike, whatever its weight above 0.
        weight: Factor. Source: BCKD and CrossKD use 1.
        beta: How strongly locations are discounted where student and teacher agree; below 1 the gradient would have no
            bound there.
    """

    kind: Literal["binary_kd"] = "binary_kd"
    region: Literal["all", "main"] = "all"
    weight: float = Field(default=1.0, gt=0)
    beta: float = Field(default=1.0, ge=1)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"binary_kd/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the sum over the region's rows.

        Normalized by: the number of positives, averaged over ranks.
        """
        student = pair.student.score_logit.flatten(0, 1)[where.row]
        teacher = pair.teacher.score_logit.flatten(0, 1)[where.row]
        total = binary_distillation(student, teacher, (where.weight > 0).float(), self.beta)
        return self.weight * total / norm.num_positive


def binary_distillation(
    student_cls: Float[Tensor, "N C"], teacher_cls: Float[Tensor, "N C"], weight: Float[Tensor, " N"], beta: float
) -> Float[Tensor, ""]:
    """Return `weight * |sigmoid(t) - sigmoid(s)|^beta * BCE(s, sigmoid(t))`, summed over classes and rows.

    Returns:
        At least 0; 0 where all scores are equal.

    Normalized by: nothing.

    Source: BCKD (ICCV 2023, arXiv:2308.14286), classification term.
    """
    return focal_cross_entropy(student_cls, teacher_cls.detach().sigmoid(), weight, beta=beta)


class BCKDBox(Spec):
    """Box distillation of BCKD: the student's boxes imitate the teacher's where their scores differ.

    Compares decoded boxes, so student and teacher may have different bins and different locations.

    Attributes:
        region: `"all"` valid locations, `"main"` (positives) or `"vlr"`; a location counts by how much its scores
            differ, whatever its weight above 0.
        weight: Factor. Source: BCKD's configuration.
    """

    kind: Literal["bckd_box"] = "bckd_box"
    region: Literal["all", "main", "vlr"] = "all"
    weight: float = Field(default=4.0, gt=0)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"bckd_box/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the weighted sum over the region's rows.

        Normalized by: the number of positives, averaged over ranks.

        Source: BCKD (ICCV 2023, arXiv:2308.14286), localization term.

        Differs from the paper: GIoU instead of IoU, as in the released code. Differs from that code: levels without
        positives count too, and a location's weight is the scores' difference alone, to which the code adds 1e-4 twice.
        """
        student, teacher = (
            expected_distance(dense.edge.flatten(0, 1)[where.row]) for dense in (pair.student, pair.teacher)
        )
        scores = (dense.score.flatten(0, 1)[where.row] for dense in (pair.student, pair.teacher))
        difference = score_difference(*scores)
        shift = pair.teacher.locations.offset - pair.student.locations.offset
        per_row = box_distillation(student, teacher, shift) * difference * (where.weight > 0)
        return self.weight * per_row.sum() / norm.num_positive


def box_distillation(
    student_ltrb: Float[Tensor, "N 4"], teacher_ltrb: Float[Tensor, "N 4"], shift: float = 0.0
) -> Float[Tensor, " N"]:
    """Return `1 - GIoU` of the two boxes at each location, in [0, 2]; the teacher gets no gradient.

    Args:
        student_ltrb: Stride units.
        teacher_ltrb: Stride units.
        shift: From the student's location to the teacher's, right and down, in strides.
    """
    # the location itself cancels out
    origin, one = student_ltrb.new_zeros(len(student_ltrb), 2), student_ltrb.new_ones(len(student_ltrb))
    teacher_xyxy = decode_ltrb(origin + shift, teacher_ltrb.detach(), one)
    return 1 - box_giou(decode_ltrb(origin, student_ltrb, one), teacher_xyxy)


@torch.no_grad()
def score_difference(student_score: Float[Tensor, "N C"], teacher_score: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Return the largest difference of a class's scores, in [0, 1]."""
    return (teacher_score - student_score).abs().amax(dim=-1)


def divergence_factor(temperature: float, size: int, class_reduction: ClassReduction) -> float:
    """Return what turns a summed divergence of softened distributions over `size` bins or classes into a loss.

    `T^2` keeps the gradient's size whatever the temperature.
    """
    return temperature**2 / (size if class_reduction == "mean" else 1)
