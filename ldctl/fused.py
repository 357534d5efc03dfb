"""Losses over whole maps, whose gradient is written down instead of recorded.

Autograd would keep some ten tensors as large as the logits. The closed form needs one, the gradient itself, and on a
CPU it is made piece by piece, while a piece is in the cache.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 18  # elements of a core's cache, together with what is made of them


def focal_cross_entropy(
    logit: Float[Tensor, "N C"],
    target: Float[Tensor, "N C"],
    weight: Float[Tensor, " N"],
    *,
    beta: float,
    alpha: float | None = None,
) -> Float[Tensor, ""]:
    """Return the cross entropy with soft targets, scaled by how far each score is from its target, summed.

    `sum of weight * |target - sigmoid(logit)|^beta * BCE(logit, target)`, with gradient through both factors.

    Args:
        logit: Class logits.
        target: In [0, 1]; gets no gradient.
        weight: Of each row; gets no gradient.
        beta: How strongly good predictions are discounted; at least 1, for the gradient to be bounded.
        alpha: Weight of elements whose target is above 0, and `1 - alpha` of the others; all weigh 1 if left out.

    Returns:
        At least 0; 0 where every score equals its target.

    Normalized by: nothing.
    """
    assert beta >= 1, "the gradient is bounded"
    return cast("Tensor", _FocalCrossEntropy.apply(logit, target, weight, beta, alpha))


class _FocalCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch puts attributes on it)
        logit: Tensor,
        target: Tensor,
        weight: Tensor,
        beta: float,
        alpha: float | None,
    ) -> Tensor:
        gradient = torch.empty_like(logit, memory_format=torch.contiguous_format)
        rows = max(PIECE // logit.shape[1], 1)
        if logit.device.type != "cpu":  # there each piece costs launches
            rows = max(len(logit), 1)
        pieces = zip(*(torch.split(whole, rows) for whole in (logit, target, weight, gradient)), strict=True)
        total = torch.stack([_focal_piece(x, t, w, out, beta, alpha) for x, t, w, out in pieces]).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _focal_piece(
    logit: Tensor, target: Tensor, weight: Tensor, gradient: Tensor, beta: float, alpha: float | None
) -> Tensor:
    """Return the sum over some rows and write their gradient: `factor * (beta * slope * entropy + gap^2)`."""
    score = logit.sigmoid()
    rest = torch.sub(1, score, out=gradient)
    # BCE(x, t) = max(x, 0) - x t - log sigmoid(|x|), where sigmoid(|x|) is the larger of sigmoid(x) and its rest
    entropy = torch.maximum(score, rest).log_().neg_().add_(logit.clamp(min=0)).addcmul_(logit, target, value=-1)
    slope = rest.mul_(score)  # of the sigmoid
    gap = score.sub_(target)  # and the slope of the entropy
    size = gap.abs()
    factor = size.pow(beta - 1).mul_(weight[:, None])
    if alpha is not None:
        factor.mul_(torch.where(target > 0, alpha, 1 - alpha))
    slope.mul_(entropy).mul_(beta).addcmul_(gap, gap).mul_(factor).mul_(gap.sign())
    return size.mul_(factor).mul_(entropy).sum()


def softened_kl(
    student: Float[Tensor, "*S K"], teacher: Float[Tensor, "*S K"], temperature: float
) -> Float[Tensor, "*S"]:
    """Return `KL(softmax(teacher / T), softmax(student / T))` over the last axis; the teacher gets no gradient."""
    return cast("Tensor", _SoftenedKL.apply(student, teacher, temperature))


class _SoftenedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:  # noqa: ANN401
        log_q = (student / temperature).log_softmax(dim=-1)
        log_p = (teacher / temperature).log_softmax(dim=-1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        ctx.save_for_backward(log_q.exp_().sub_(p).div_(temperature))
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[..., None], None, None
