"""Tests of batch norm folded into convolutions: the same maps, and hands off what cannot be folded."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldctl.models import ResNetSpec, TimmSpec, TorchvisionSpec, build_backbone
from ldctl.models.base import Backbone
from ldctl.models.fold import fold_batch_norm


def shaken(backbone: nn.Module) -> nn.Module:
    """Give every batch norm statistics and parameters that do something, of either sign."""
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.2, generator=generator)
                    module.weight[::5] *= -1
                    module.bias.normal_(0, 0.2, generator=generator)
    return backbone


def num_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


FAMILIES = {
    "resnet18": (lambda: ResNetSpec(depth=18, width=0.25, init="none"), 0),
    "resnet50": (lambda: ResNetSpec(depth=50, width=0.25, init="none"), 0),
    "deformable": (lambda: ResNetSpec(depth=50, width=0.25, init="none", dcn=True), 0),
    "mobilenet": (lambda: TorchvisionSpec(name="mobilenet_v3_small", init="none"), 0),
    "regnet": (lambda: TorchvisionSpec(name="regnet_y_400mf", init="none"), 0),
    "shufflenet": (lambda: TorchvisionSpec(name="shufflenet_v2_x0_5", init="none"), 0),
    # 58 layers, three transitions and the end have a norm that reads the maps of several layers
    "densenet": (lambda: TorchvisionSpec(name="densenet121", init="none"), 62),
    "convnext": (lambda: TorchvisionSpec(name="convnext_tiny", init="none"), 0),
    "timm": (lambda: TimmSpec(name="tf_efficientnet_lite0", init="none"), 0),  # whose norms hold the activations
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_maps_are_the_same(family: str) -> None:
    spec, left = FAMILIES[family]
    torch.manual_seed(0)
    backbone = shaken(build_backbone(spec())).train()
    before = copy.deepcopy(backbone.state_dict())
    folded = fold_batch_norm(backbone)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert num_norms(folded) == left, "or the copy was given up"
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        for found, wanted in zip(folded(images), backbone.eval()(images), strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class Small(Backbone):
    """Three convolutions and a norm that reads the first one's output, which something else may read or write too."""

    def __init__(self, between: Callable[[Tensor], Tensor], beside: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.spec = ResNetSpec(depth=18, init="none")
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, 8, 3, stride=stride, padding=1) for channels, stride in ((3, 8), (8, 2), (8, 2))
        )
        self.norm = nn.BatchNorm2d(8)
        self.between, self.beside = between, beside

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        first, second, third = self.convolutions
        inner = first(images)
        fine = self.norm(self.between(inner)) + self.beside(inner)
        return fine, second(fine), third(second(fine))


@pytest.mark.parametrize(
    ("between", "beside", "is_folded"),
    [
        (lambda inner: inner, lambda inner: 0.0, True),
        (lambda inner: inner.relu_(), lambda inner: 0.0, False),
        (lambda inner: inner * 2, lambda inner: 0.0, False),
        (lambda inner: inner, lambda inner: inner.sigmoid(), False),
    ],
    ids=["plain", "written in place", "something between", "read elsewhere"],
)
def test_what_cannot_be_folded_is_left(
    between: Callable[[Tensor], Tensor], beside: Callable[[Tensor], Tensor | float], is_folded: bool
) -> None:
    torch.manual_seed(0)
    backbone = shaken(Small(between, beside)).eval()
    folded = fold_batch_norm(backbone)
    assert num_norms(folded) == (0 if is_folded else 1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for found, wanted in zip(folded(images), backbone(images), strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_convolution_that_runs_twice_is_left() -> None:
    torch.manual_seed(0)
    backbone = Small(lambda inner: inner, lambda inner: 0.0)
    backbone.convolutions[2] = backbone.convolutions[1]
    backbone.between = lambda inner: backbone.convolutions[1](inner)
    folded = fold_batch_norm(shaken(backbone))
    assert num_norms(folded) == 1


def test_memory_format_stays() -> None:
    backbone = build_backbone(ResNetSpec(depth=18, width=0.25, init="none")).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(backbone)
    assert folded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
