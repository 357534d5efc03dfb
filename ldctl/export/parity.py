"""How far two lists of boxes of one image are apart, and whether rounding explains it."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from ldctl.boxes import box_iou
from ldctl.schema import Spec
from ldctl.types import Detections

# Share of all boxes of an image that may come and go with NMS; a shifted or doubled output would move nearly all.
NMS_SHARE = 0.1


@runtime_checkable
class Postprocess(Protocol):
    """From predictions to final boxes; the meaning of each is that of the evaluation."""

    @property
    def score_threshold(self) -> float:
        """A class of a location counts above this score only."""

    @property
    def nms_iou(self) -> float:
        """Of two boxes of one class that overlap more than this, the better stays."""

    @property
    def candidates_per_level(self) -> int:
        """Best pairs of location and class that a pyramid level may bring."""

    @property
    def max_detections(self) -> int:
        """Most boxes of an image."""


class Tolerance(Spec):
    """How far an exported file may be from the detector.

    Attributes:
        box_px: Largest difference of an edge, pixels of the given image.
        score: Largest difference of a score.
        iou: A box whose overlap with a better one is this close to the NMS threshold may stay or go.
    """

    box_px: float = Field(default=0.5, gt=0)
    score: float = Field(default=0.005, gt=0, lt=1)
    iou: float = Field(default=0.01, gt=0, lt=1)


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with the detector.

    Attributes:
        num_images: Images compared.
        num_detections: Detections of the detector on them; with 0 the comparison says little.
        num_borderline: Boxes of one side only that NMS explains, see `compare`.
        num_unmatched: Boxes of one side only that nothing explains.
        max_box_difference_px: Largest difference of an edge among pairs of boxes; 0 without any.
        max_score_difference: Largest difference of a score among pairs of boxes; 0 without any.
    """

    num_images: int
    num_detections: int
    num_borderline: int
    num_unmatched: int
    max_box_difference_px: float
    max_score_difference: float

    def is_within(self, tolerance: Tolerance) -> bool:
        """Return whether every detection has its counterpart within the tolerance."""
        is_near = self.max_box_difference_px <= tolerance.box_px and self.max_score_difference <= tolerance.score
        return is_near and self.num_unmatched == 0

    def __add__(self, other: "Parity") -> "Parity":
        return Parity(
            num_images=self.num_images + other.num_images,
            num_detections=self.num_detections + other.num_detections,
            num_borderline=self.num_borderline + other.num_borderline,
            num_unmatched=self.num_unmatched + other.num_unmatched,
            max_box_difference_px=max(self.max_box_difference_px, other.max_box_difference_px),
            max_score_difference=max(self.max_score_difference, other.max_score_difference),
        )


def compare(found: Detections, wanted: Detections, postprocess: Postprocess, tolerance: Tolerance) -> Parity:
    """Match two lists of detections of one image one to one, whatever their order.

    Boxes of one class match, nearest first, when every edge and the score agree within the tolerance. Rounding may also
    put a box on one side only. It is let pass when

    - its score is at the threshold, or not above the last one of the other side, which is cut off at its full length;
    - it is thinner than the tolerance, so that it may have no extent at all;
    - NMS explains it, and no more than `NMS_SHARE` of all boxes: a better box of the other side overlaps it just as
      much as the threshold, or an equally good one by more, or one that is explained so itself.

    What is left is a real difference: pairs that overlap by more than half give the figures, the rest is unmatched.
    """
    found, wanted = _on_cpu(found), _on_cpu(wanted)
    edge = (found.xyxy.unsqueeze(1) - wanted.xyxy.unsqueeze(0)).abs().amax(dim=-1)
    score = (found.score.unsqueeze(1) - wanted.score.unsqueeze(0)).abs()
    is_same = found.label.unsqueeze(1) == wanted.label.unsqueeze(0)
    overlap = box_iou(found.xyxy.unsqueeze(1), wanted.xyxy.unsqueeze(0)).where(is_same, 0.0)
    is_near = is_same & (edge <= tolerance.box_px) & (score <= tolerance.score)
    pairs = _match(edge.where(is_near, torch.inf))
    alone = (
        _without(pairs[:, 0], ~_at_limit(found, wanted, postprocess, tolerance)),
        _without(pairs[:, 1], ~_at_limit(wanted, found, postprocess, tolerance)),
    )
    by_nms = _explained_by_nms(found, wanted, overlap, alone, postprocess, tolerance)
    num_borderline = sum(int(side.sum()) for side in by_nms)
    if num_borderline <= NMS_SHARE * (len(found.score) + len(wanted.score)):
        alone = alone[0] & ~by_nms[0], alone[1] & ~by_nms[1]
    else:
        num_borderline = 0
    is_left = alone[0].unsqueeze(1) & alone[1].unsqueeze(0)
    off = _match(edge.where(is_left & (overlap > 0.5), torch.inf))
    rows, columns = torch.cat((pairs, off)).unbind(dim=1)
    return Parity(
        num_images=1,
        num_detections=len(wanted.score),
        num_borderline=num_borderline,
        num_unmatched=sum(int(side.sum()) for side in alone) - 2 * len(off),
        max_box_difference_px=float(edge[rows, columns].max()) if len(rows) else 0.0,
        max_score_difference=float(score[rows, columns].max()) if len(rows) else 0.0,
    )


def _on_cpu(detections: Detections) -> Detections:
    """Return the same detections on the CPU, in double precision."""
    xyxy, score = detections.xyxy.detach().cpu().double(), detections.score.detach().cpu().double()
    return replace(detections, xyxy=xyxy, score=score, label=detections.label.cpu())


def _match(distance: Float[Tensor, "N M"]) -> Int[Tensor, "K 2"]:
    """Return pairs of row and column, nearest first, each used once, infinite distances never."""
    distance, matches = distance.clone(), []
    while distance.numel() and distance.min() < torch.inf:
        row, column = divmod(int(distance.argmin()), distance.shape[1])
        matches.append((row, column))
        distance[row], distance[:, column] = torch.inf, torch.inf
    return torch.tensor(matches, dtype=torch.int64).reshape(-1, 2)


def _without(rows: Int[Tensor, " K"], mask: Bool[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Return the mask, false at the rows."""
    return mask.index_fill(0, rows, False)


def _at_limit(own: Detections, other: Detections, postprocess: Postprocess, tolerance: Tolerance) -> Bool[Tensor, " N"]:
    """Return which boxes may be missing on the other side for their own score or extent."""
    limit = postprocess.score_threshold
    if len(other.score) >= postprocess.max_detections:
        limit = max(limit, float(other.score.min()))
    is_thin = (own.xyxy[:, 2:] - own.xyxy[:, :2]).amin(dim=1) <= tolerance.box_px
    return is_thin | (own.score <= limit + tolerance.score)


def _explained_by_nms(
    found: Detections,
    wanted: Detections,
    overlap: Float[Tensor, "N M"],
    alone: tuple[Bool[Tensor, " N"], Bool[Tensor, " M"]],
    postprocess: Postprocess,
    tolerance: Tolerance,
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " M"]]:
    """Return which of the boxes `alone` NMS may have dropped on the other side; `overlap` is 0 between classes."""
    ahead = wanted.score.unsqueeze(0) - found.score.unsqueeze(1)
    is_tie = (ahead.abs() <= tolerance.score) & (overlap > postprocess.nms_iou) & alone[0].unsqueeze(1) & alone[1]
    is_close = (overlap - postprocess.nms_iou).abs() <= tolerance.iou
    suppresses = overlap > postprocess.nms_iou - tolerance.iou
    by_wanted, by_found = ahead >= -tolerance.score, ahead <= tolerance.score
    explained = (
        alone[0] & (by_wanted & is_close | is_tie).any(dim=1),
        alone[1] & (by_found & is_close | is_tie).any(dim=0),
    )
    while True:  # a box that may be missing suppresses nothing, so that others may be there
        grown = (
            explained[0] | alone[0] & (by_wanted & suppresses & explained[1]).any(dim=1),
            explained[1] | alone[1] & (by_found & suppresses & explained[0].unsqueeze(1)).any(dim=0),
        )
        if torch.equal(torch.cat(grown), torch.cat(explained)):
            return explained
        explained = grown
