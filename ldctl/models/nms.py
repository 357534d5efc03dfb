"""Score-voting Cluster-DIoU-NMS: which of overlapping boxes stay, and where those come to lie.

Sources: Cluster-NMS (IEEE Trans. Cybernetics 2021, arXiv:2005.03572), score voting as in PAA (ECCV 2020,
arXiv:2007.08103), put together in the released LD code.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ldctl.boxes import box_iou, center_penalty

PENALTY_POWER = 0.8  # of the DIoU's centre penalty. Source: LD's released code, as the two below
VOTER_OVERLAP = 0.7  # boxes that overlap less than this do not move another
VOTE_WIDTH = 0.025  # of the bell over `1 - overlap`: the smaller, the less a box moves


def voting_cluster_diou_nms(
    xyxy: Float[Tensor, "N 4"], score: Float[Tensor, " N"], label: Int[Tensor, " N"], *, threshold: float, limit: int
) -> tuple[Float[Tensor, "M 4"], Float[Tensor, " M"], Int[Tensor, " M"]]:
    """Suppress boxes beside a better one of their class, and let those that stay be moved by the ones they cover.

    Args:
        xyxy: Boxes in any unit, each with an extent.
        score: Positive.
        label: Class index.
        threshold: Of two boxes of one class whose overlap exceeds this, the better stays.
        limit: Most boxes to return.

    Returns:
        Boxes, scores and labels, best first.

    Differs from the released LD code: boxes below the overlap of a voter have no vote, instead of `e^-40` of one, which
    float32 cannot tell from none.
    """
    score, order = score.sort(descending=True, stable=True)
    xyxy, label = xyxy[order], label[order]
    overlap = diou_overlap(xyxy).where(label[:, None] == label, 0.0)
    keep = cluster_nms(overlap, threshold).nonzero().squeeze(1)[:limit]  # synchronises
    # only a box itself and worse ones vote on where it lies
    return vote(xyxy, score, overlap.triu()[keep]), score[keep], label[keep]


def diou_overlap(xyxy: Float[Tensor, "N 4"]) -> Float[Tensor, "N N"]:
    """Return `IoU - D^0.8` of every two boxes, in (-1, 1]; `D` is the centre penalty of DIoU."""
    overlap = box_iou(xyxy[:, None], xyxy) - center_penalty(xyxy[:, None], xyxy).pow(PENALTY_POWER)
    # a box is itself, even one whose area falls below the floor of the IoU's denominator
    return overlap.fill_diagonal_(1.0)


def cluster_nms(overlap: Float[Tensor, "N N"], threshold: float) -> Bool[Tensor, " N"]:
    """Return which boxes stay when, best first, each that stays removes the worse ones that overlap it more.

    Decides about all boxes at once, again and again: after `n` rounds the best `n` are settled, and what no round
    changes is the result. Synchronises with the host once a round; the longest chain of boxes that remove each other
    bounds the rounds.

    Args:
        overlap: Of every two boxes, best first; boxes of different classes do not overlap.
        threshold: Overlaps above it remove.
    """
    removes = (overlap > threshold).triu(diagonal=1)
    keep = removes.new_ones(len(removes))
    while True:
        settled = ~(removes & keep[:, None]).any(dim=0)
        if torch.equal(settled, keep):
            return keep
        keep = settled


def vote(xyxy: Float[Tensor, "N 4"], score: Float[Tensor, " N"], overlap: Float[Tensor, "M N"]) -> Float[Tensor, "M 4"]:
    """Return the means of the boxes, weighted by `score * exp(-(1 - overlap)^2 / 0.025)` where the overlap is large.

    Args:
        xyxy: The boxes that vote.
        score: How much each counts.
        overlap: Of each box to move with each that votes; at least one in a row exceeds 0.7.
    """
    closeness = (-((1 - overlap).square()) / VOTE_WIDTH).exp()
    weight = closeness.where(overlap > VOTER_OVERLAP, 0.0) * score
    return weight @ xyxy / weight.sum(dim=1, keepdim=True)
