"""Batch norm as part of the convolution before it: the same maps with less work, for networks that do not train."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ldctl.models.base import TRACED_HW, Backbone
from ldctl.models.resnet import DeformableConv2d

FOLDING_TOLERANCE = 1e-4  # of the largest activation; rounding stays below a tenth of it, a wrong fold far above


def fold_batch_norm(backbone: Backbone) -> Backbone:
    """Return a copy in evaluation mode whose batch norms are folded into the convolutions that they follow.

    With `y = (conv(x) - mean) / sqrt(var + eps) * weight + bias` each output channel of the convolution is scaled and
    shifted once and for all. Which norm follows which convolution is seen in a run on noise; the copy's maps are then
    held against the backbone's. What cannot be folded stays as it is: a norm that follows something else, any other
    kind of norm, a network without batch norm, and one whose maps would come out differently, as where a convolution's
    output is also read by something else than its norm.

    Args:
        backbone: Not changed. The copy has other parameters, so that it can neither be trained as before nor be saved
            in its place.
    """
    plain = copy.deepcopy(backbone).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    weight = next(folded.parameters())
    noise = torch.randn(1, 3, *TRACED_HW, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        for norm, convolution in _pairs(folded, noise).items():
            _fold(folded, norm, convolution)
        is_same = all(
            (found - wanted).abs().amax() <= FOLDING_TOLERANCE * wanted.abs().amax()
            for found, wanted in zip(folded(noise), plain(noise), strict=True)
        )
    return folded if is_same else plain


def _pairs(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Return the names of batch norms, each with that of the convolution whose output it reads.

    Modules that run more than once are left out: they may stand in several places.
    """
    # The tensors are kept, so that none gets the number of another; versions tell whether something wrote into them.
    made_by: dict[int, tuple[str, Tensor, int]] = {}
    pairs: dict[str, str] = {}
    calls: list[str] = []

    def see(name: str, module: nn.Module, given: tuple[Tensor, ...], returned: Tensor) -> None:
        calls.append(name)
        if isinstance(module, nn.BatchNorm2d):
            convolution, _, version = made_by.get(id(given[0]), ("", None, -1))
            if given[0]._version == version:
                pairs[name] = convolution
        else:
            made_by[id(returned)] = name, returned, returned._version

    kinds = (nn.BatchNorm2d, nn.Conv2d, DeformableConv2d)
    parts = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(partial(see, name)) for name, module in parts]
    network(images)
    for handle in handles:
        handle.remove()
    return {norm: conv for norm, conv in pairs.items() if calls.count(norm) == calls.count(conv) == 1}


def _fold(network: nn.Module, norm_name: str, convolution_name: str) -> None:
    """Scale and shift a convolution's outputs as its norm does; what is left of the norm takes its place."""
    norm, convolution = network.get_submodule(norm_name), network.get_submodule(convolution_name)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(convolution, nn.Conv2d | DeformableConv2d)
    if norm.running_mean is None or norm.running_var is None:
        return
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    weight = convolution.weight
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    scaled = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(memory_format=layout)
    convolution.weight = nn.Parameter(scaled, requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    # timm's kind of batch norm holds the activation that comes next
    rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
    network.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
