"""Dense heads: pyramid maps to class logits and edge distributions at every location."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ldctl.boxes import location_grid
from ldctl.schema import Spec
from ldctl.types import Dense

NORM_GROUPS = 32  # Source: GFL and ATSS configurations
CONV_STD = 0.01  # Source: RetinaNet (ICCV 2017, arXiv:1708.02002), 4.1
PRIOR = 0.01  # class probability at the start. Source: as above


class GFLHeadSpec(Spec):
    """The head of Generalized Focal Loss.

    Attributes:
        reg_max: Largest bin of an edge distribution, strides; longer edges cannot be told.
        num_convs: Layers of each tower.
    """

    kind: Literal["gfl"] = "gfl"
    reg_max: int = Field(default=16, ge=1, le=64)
    num_convs: int = Field(default=4, ge=1, le=8)


class TowerLayer(nn.Module):
    """Convolution, group norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, feature: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """Return a map of the same shape, not negative."""
        inner, norm = self.conv(feature), self.norm
        # Not norm(inner): that refuses one value per group, as 32 channels have on a map of one location.
        return torch.relu(torch.group_norm(inner, norm.num_groups, norm.weight, norm.bias, norm.eps))


class GFLHead(nn.Module):
    """Two towers shared by all levels, and a learned scale per level: an inverse temperature of the edges.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388).
    """

    def __init__(self, spec: GFLHeadSpec, channels: int, num_classes: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.num_bins = spec.reg_max + 1
        self.cls_tower = nn.Sequential(*(TowerLayer(channels) for _ in range(spec.num_convs)))
        self.edge_tower = nn.Sequential(*(TowerLayer(channels) for _ in range(spec.num_convs)))
        self.cls = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.edge = nn.Conv2d(channels, 4 * self.num_bins, kernel_size=3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=CONV_STD)
                if module.bias is not None:
                    nn.init.constant_(module.bias, math.log(PRIOR / (1 - PRIOR)) if module is self.cls else 0.0)

    def forward(self, features: tuple[Float[Tensor, "B _ _ _"], ...]) -> Dense:
        """Return the logits of every location of the pyramid maps, finest first."""
        cls, edge = [], []
        for feature, scale in zip(features, self.scales, strict=True):
            cls_map = self.cls(self.cls_tower(feature))
            edge_map = self.edge(self.edge_tower(feature)).float() * scale  # distributions need float32, also under AMP
            cls.append(cls_map.permute(0, 2, 3, 1).flatten(1, 2))
            edge.append(edge_map.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (4, self.num_bins)))
        sizes_hw = tuple((feature.shape[-2], feature.shape[-1]) for feature in features)
        return Dense(
            cls=torch.cat(cls, dim=1),
            edge=torch.cat(edge, dim=1),
            features=features,
            locations=location_grid(sizes_hw, self.strides, features[0].device),
        )
