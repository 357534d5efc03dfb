"""The detection losses: GFL's and GFLv2's, those of heads that tell centerness, and RetinaNet's."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ldctl.boxes import box_giou, box_iou, decode_ltrb, encode_ltrb, expected_distance
from ldctl.distributed import reduce_mean, world_size
from ldctl.fused import focal_cross_entropy
from ldctl.schema import Spec
from ldctl.types import Assigned, Dense, Locations, Normalizer, Where

QFL_BETA = 2.0  # Source: GFL, table 1
MAX_TARGET_SLACK = 0.1  # targets stop this short of reg_max, so that both neighbouring bins exist. Source: GFL's code
FOCAL_GAMMA, FOCAL_ALPHA = 2.0, 0.25  # Source: RetinaNet (ICCV 2017, arXiv:1708.02002), table 1


class LossSpec(Spec):
    """Weights of the detection losses; a head takes those that it has.

    Attributes:
        qfl: Classes, of GFL and GFLv2.
        focal: Classes, of ATSS, FCOS and RetinaNet.
        giou: Boxes; FCOS itself has 1.
        dfl: Edge distributions, of GFL and GFLv2; 0 leaves it out.
        centerness: Of ATSS and FCOS.

    Source: the configurations of GFL and ATSS.
    """

    qfl: float = Field(default=1.0, gt=0)
    focal: float = Field(default=1.0, gt=0)
    giou: float = Field(default=2.0, gt=0)
    dfl: float = Field(default=0.25, ge=0)
    centerness: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Positives:
    """Predictions and targets of the positives, in stride units: there the reference's floors mean the same everywhere.

    Attributes:
        edge: Logits of the edge distributions.
        xy: Locations.
        pred_xyxy: Predicted boxes.
        gt_xyxy: The locations' objects.
    """

    edge: Float[Tensor, "N 4 R"]
    xy: Float[Tensor, "N 2"]
    pred_xyxy: Float[Tensor, "N 4"]
    gt_xyxy: Float[Tensor, "N 4"]


def quality_focal_loss(
    logit: Float[Tensor, "N C"], target: Float[Tensor, "N C"], weight: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the cross entropy with soft targets, scaled by how far each score is from its target, summed.

    `sum of weight * |target - sigmoid(logit)|^2 * BCE(logit, target)`.

    Args:
        logit: Class logits.
        target: In [0, 1]: the IoU of the predicted box for an object's class, else 0.
        weight: Of each row.

    Normalized by: nothing.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388), eq. 3.
    """
    return focal_cross_entropy(logit, target, weight, beta=QFL_BETA)


def focal_loss(
    logit: Float[Tensor, "N C"], target: Float[Tensor, "N C"], weight: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the cross entropy, scaled by how far each score is from its target, and objects by less than background.

    Args:
        logit: Class logits.
        target: 1 for an object's class, else 0.
        weight: Of each row.

    Normalized by: nothing; the sum over rows and classes.

    Source: RetinaNet (ICCV 2017, arXiv:1708.02002), eq. 5.
    """
    return focal_cross_entropy(logit, target, weight, beta=FOCAL_GAMMA, alpha=FOCAL_ALPHA)


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
    spec: LossSpec, dense: Dense, at_main: Dense, assigned: Assigned, main: Where, norm: Normalizer
) -> dict[str, Float[Tensor, ""]]:
    """Return `qfl`, `giou` and `dfl`, weighted and normalised; their sum trains a plain GFL or GFLv2 detector.

    Where the head tells a quality, QFL is that of the product: its gradients reach the quality, and the edge
    distributions through it.

    Args:
        spec: Weights.
        dense: The detector's outputs.
        at_main: Those at the positives.
        assigned: Targets of every location.
        main: The positives with their weights.
        norm: Divisors.

    Returns:
        Scalars >= 0. Without positives `giou` and `dfl` are 0 and still reach every box parameter with a zero gradient.

    Normalized by: `qfl` by the number of positives, `giou` and `dfl` by the sum of the positives' weights.
    """
    found = positives(at_main, assigned, main)
    quality = box_iou(found.pred_xyxy.detach(), found.gt_xyxy)
    logit = dense.score_logit.flatten(0, 1)
    target = class_targets(logit, assigned, main, quality)
    losses = {
        "qfl": spec.qfl * quality_focal_loss(logit, target, validity(assigned)) / norm.num_positive,
        "giou": spec.giou * (giou_loss(found) * main.weight).sum() / norm.weight_sum,
    }
    if spec.dfl:
        target_ltrb = encode_ltrb(found.xy, found.gt_xyxy, found.xy.new_ones(len(found.xy)))
        per_row = distribution_focal_loss(found.edge, target_ltrb)
        losses["dfl"] = spec.dfl * (per_row * main.weight).sum() / norm.weight_sum
    return losses


def centerness_losses(
    spec: LossSpec, dense: Dense, at_main: Dense, assigned: Assigned, central: Where, norm: Normalizer
) -> dict[str, Float[Tensor, ""]]:
    """Return `focal`, `giou` and `centerness`, weighted and normalised; their sum trains a plain ATSS or FCOS detector.

    Args:
        spec: Weights.
        dense: The detector's outputs.
        at_main: Those at the positives.
        assigned: Targets of every location.
        central: The positives, weighted by centerness; see `by_centerness`.
        norm: Divisors.

    Returns:
        Scalars >= 0. Without positives `giou` and `centerness` are 0 and still reach their parameters with a zero
        gradient.

    Normalized by: `giou` by the sum of the positives' centerness, the others by the number of positives.

    Source: ATSS (CVPR 2020, arXiv:1912.02424), released code. Differs from FCOS's: an image without positives counts
    as one positive.
    """
    assert at_main.quality is not None, "the head tells centerness"
    told = at_main.quality.float().squeeze(0)
    per_row = binary_cross_entropy_with_logits(told, central.weight, reduction="none")
    giou = giou_loss(positives(at_main, assigned, central))
    return {
        "focal": spec.focal * focal_sum(dense, assigned, central) / norm.num_positive,
        "giou": spec.giou * (giou * central.weight).sum() / norm.weight_sum,
        "centerness": spec.centerness * per_row.sum() / norm.num_positive,
    }


def overlap_losses(
    spec: LossSpec, dense: Dense, at_main: Dense, assigned: Assigned, main: Where, norm: Normalizer
) -> dict[str, Float[Tensor, ""]]:
    """Return `focal` and `giou`, weighted and normalised; their sum trains a plain RetinaNet detector.

    Args:
        spec: Weights.
        dense: The detector's outputs.
        at_main: Those at the positives.
        assigned: Targets of every location.
        main: The positives, which count alike whatever their weights.
        norm: Divisors.

    Returns:
        Scalars >= 0. Without positives `giou` is 0 and still reaches every box parameter with a zero gradient.

    Normalized by: the number of positives.

    Source: RetinaNet (ICCV 2017, arXiv:1708.02002), with GIoU of the decoded boxes, as in LD's released code. Differs
    from that: the number of positives is averaged over ranks, where it takes each rank's own.
    """
    return {
        "focal": spec.focal * focal_sum(dense, assigned, main) / norm.num_positive,
        "giou": spec.giou * giou_loss(positives(at_main, assigned, main)).sum() / norm.num_positive,
    }


def focal_sum(dense: Dense, assigned: Assigned, main: Where) -> Float[Tensor, ""]:
    """Return the focal loss of all classes, summed over the locations that are positive or background.

    Normalized by: nothing.
    """
    logit = dense.cls.float().flatten(0, 1)
    target = class_targets(logit, assigned, main, torch.ones_like(main.weight))
    return focal_loss(logit, target, validity(assigned))


def validity(assigned: Assigned) -> Float[Tensor, " N"]:
    """Return 1 for each location of each image that is positive or background, 0 for invalid and ignored ones."""
    return (assigned.is_valid & ~assigned.is_ignored).flatten().float()


def by_centerness(main: Where, assigned: Assigned, locations: Locations) -> Where:
    """Weight the positives by how central they are: `sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`.

    Returns:
        The same rows with weights in (0, 1], 1 at the centre: what the box losses are weighted by, and what the head is
        to tell.

    Source: FCOS (ICCV 2019, arXiv:1904.01355), eq. 3.
    """
    xy = locations.xy[main.picked % len(locations.level)]
    ltrb = encode_ltrb(xy, assigned.gt_xyxy.flatten(0, 1)[main.row], xy.new_ones(len(xy)))
    near, far = torch.minimum(ltrb[:, :2], ltrb[:, 2:]), torch.maximum(ltrb[:, :2], ltrb[:, 2:])
    return replace(main, weight=(near / far).prod(dim=-1).sqrt())


def positives(at_main: Dense, assigned: Assigned, main: Where) -> Positives:
    """Pick what the box losses compare."""
    edge, stride = at_main.edge.squeeze(0), at_main.locations.stride
    xy = at_main.locations.xy / stride[:, None]
    gt_xyxy = assigned.gt_xyxy.flatten(0, 1)[main.row] / stride[:, None]
    pred_xyxy = decode_ltrb(xy, expected_distance(edge), torch.ones_like(stride))
    return Positives(edge, xy, pred_xyxy, gt_xyxy)


def giou_loss(boxes: Positives) -> Float[Tensor, " N"]:
    """Return `1 - GIoU` of each predicted box and its object, in [0, 2]."""
    return 1 - box_giou(boxes.pred_xyxy, boxes.gt_xyxy)


def class_targets(
    logit: Float[Tensor, "M C"], assigned: Assigned, main: Where, value: Float[Tensor, " N"]
) -> Float[Tensor, "M C"]:
    """Return the given value at the class of each positive's object, 0 elsewhere.

    Args:
        logit: Whose targets these are, a row for each location of each image.
        assigned: Targets of every location.
        main: The positives.
        value: Of each positive.
    """
    target = torch.zeros_like(logit)
    target[main.row, assigned.label.flatten()[main.row]] = value
    return target
