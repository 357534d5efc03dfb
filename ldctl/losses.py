"""The detection losses of GFL and GFLv2: QFL for classes, GIoU and DFL for boxes."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ldctl.boxes import box_giou, box_iou, decode_ltrb, encode_ltrb, expected_distance
from ldctl.distributed import reduce_mean, world_size
from ldctl.schema import Spec
from ldctl.types import Assigned, Dense, Normalizer, Where

QFL_BETA = 2.0  # Source: GFL, table 1
MAX_TARGET_SLACK = 0.1  # targets stop this short of reg_max, so that both neighbouring bins exist. Source: GFL's code


class LossSpec(Spec):
    """Weights of the detection losses; only `dfl` may be 0, which leaves it out. Source: GFL's configuration."""

    qfl: float = Field(default=1.0, gt=0)
    giou: float = Field(default=2.0, gt=0)
    dfl: float = Field(default=0.25, ge=0)


def quality_focal_loss(
    logit: Float[Tensor, "*S"], target: Float[Tensor, "*S"], beta: float = QFL_BETA
) -> Float[Tensor, "*S"]:
    """Return the cross entropy with a soft target, scaled by how far the score is from it.

    `|target - sigmoid(logit)|^beta * BCE(logit, target)`, with gradient through both factors.

    Args:
        logit: Class logits.
        target: In [0, 1]: the IoU of the predicted box for an object's class, else 0.
        beta: How strongly good predictions are discounted.

    Normalized by: nothing; one value per element.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388), eq. 3.
    """
    distance = (target - logit.sigmoid()).abs()
    return binary_cross_entropy_with_logits(logit, target, reduction="none") * distance.pow(beta)


def joint_logit(cls: Float[Tensor, "*#S"], quality: Float[Tensor, "*#S"]) -> Float[Tensor, "*S"]:
    """Return the logit of `sigmoid(cls) * sigmoid(quality)`; shapes broadcast.

    With it the losses of single logits serve for products too: no probability is rounded to 0 or 1 on the way.
    """
    # odds against the product: (1 + e^-c) (1 + e^-q) - 1
    return -torch.logaddexp(torch.logaddexp(-cls, -quality), -cls - quality)


def distribution_focal_loss(edge: Float[Tensor, "N 4 R"], target_ltrb: Float[Tensor, "N 4"]) -> Float[Tensor, " N"]:
    """Return the cross entropy of the edge distributions with the two bins around each target, mean over four edges.

    Args:
        edge: Logits of the edge distributions.
        target_ltrb: Stride units; clamped to `[0, reg_max - 0.1]`.

    Normalized by: 4, the number of edges.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388), eq. 6.
    """
    target = target_ltrb.clamp(min=0, max=edge.shape[-1] - 1 - MAX_TARGET_SLACK)
    lower = target.long()
    upper_share = target - lower
    log_p = edge.log_softmax(dim=-1)
    log_lower = log_p.gather(-1, lower[..., None]).squeeze(-1)
    log_upper = log_p.gather(-1, lower[..., None] + 1).squeeze(-1)
    return -(log_lower * (1 - upper_share) + log_upper * upper_share).mean(dim=-1)


def normalizer(kind: Literal["synced", "reference"], assigned: Assigned, main: Where, *, parts: int = 1) -> Normalizer:
    """Count what the losses are divided by, over all ranks.

    Both kinds count positives (at least one per image) and sum the weights of the positives, averaged over ranks. They
    differ where few positives have weight: the reference adds 1e-6 to the sum, so early in training a few weak
    positives get the whole gradient; synced keeps the sum over *all* images of a step off zero by 1, however they are
    split over ranks and micro-batches.

    Args:
        kind: See `Normalizer`.
        assigned: Targets of the images at hand.
        main: Their positives.
        parts: Micro-batches of the step, of which these images are one.
    """
    num_positive = positive_count(assigned).to(main.weight.dtype)
    counts = reduce_mean(torch.stack((num_positive, main.weight.sum())))
    floor = 1 / (world_size() * parts)
    weight_sum = counts[1] + 1e-6 if kind == "reference" else counts[1].clamp(min=floor)
    # without an image that takes part, a loss is 0 and has to stay so
    return Normalizer(kind=kind, num_positive=counts[0].clamp(min=floor), weight_sum=weight_sum)


def positive_count(assigned: Assigned) -> Int64[Tensor, ""]:
    """Count the positives, at least one for each image that takes part."""
    at_least_one = assigned.is_positive.sum(dim=1).clamp(min=1)
    return (at_least_one * assigned.is_valid.any(dim=1)).sum()


def detection_losses(
    spec: LossSpec, dense: Dense, assigned: Assigned, main: Where, norm: Normalizer
) -> dict[str, Float[Tensor, ""]]:
    """Return `qfl`, `giou` and `dfl`, weighted and normalised; their sum trains a plain GFL or GFLv2 detector.

    Args:
        spec: Weights.
        dense: The detector's outputs.
        assigned: Targets of every location.
        main: The positives with their weights.
        norm: Divisors.

    Returns:
        Scalars >= 0. Without positives `giou` and `dfl` are 0 and still reach every box parameter with a zero gradient.

    Normalized by: `qfl` by the number of positives, `giou` and `dfl` by the sum of the positives' weights.
    """
    assert isinstance(main.row, Tensor), "positives are picked"
    edge = dense.edge.flatten(0, 1)[main.row]
    location = main.row % assigned.label.shape[1]
    stride = dense.locations.stride[location]
    # boxes in stride units: there the reference's floors of 1e-6 mean the same on every level
    xy = dense.locations.xy[location] / stride[:, None]
    gt_xyxy = assigned.gt_xyxy.flatten(0, 1)[main.row] / stride[:, None]
    one = torch.ones_like(stride)
    pred_xyxy = decode_ltrb(xy, expected_distance(edge), one)
    quality = box_iou(pred_xyxy.detach(), gt_xyxy)
    losses = {
        "qfl": spec.qfl * classification_loss(dense, assigned, main, quality) / norm.num_positive,
        "giou": spec.giou * ((1 - box_giou(pred_xyxy, gt_xyxy)) * main.weight).sum() / norm.weight_sum,
    }
    if spec.dfl:
        per_row = distribution_focal_loss(edge, encode_ltrb(xy, gt_xyxy, one))
        losses["dfl"] = spec.dfl * (per_row * main.weight).sum() / norm.weight_sum
    return losses


def classification_loss(
    dense: Dense, assigned: Assigned, main: Where, quality: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return QFL of the joint score, summed over all valid locations and classes, not normalised.

    Where the head tells a quality, gradients reach it, and through it the edge distributions.

    Args:
        dense: The detector's outputs.
        assigned: Targets of every location.
        main: The positives.
        quality: IoU of each positive's predicted box with its object: the target of the object's class.
    """
    logit = dense.cls.float()
    if dense.quality is not None:
        logit = joint_logit(logit, dense.quality.float()[..., None])
    target = torch.zeros_like(logit)
    target.flatten(0, 1)[main.row, assigned.label.flatten()[main.row]] = quality
    return (quality_focal_loss(logit, target).sum(dim=-1) * assigned.is_valid).sum()
