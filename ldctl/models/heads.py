"""Dense heads: pyramid maps to class logits and edge distributions at every location."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldctl.boxes import SQUARE, location_grid, octave_priors
from ldctl.schema import Spec
from ldctl.types import Dense, Locations, Rule, TowerMaps

NORM_GROUPS = 32  # Source: GFL and ATSS configurations
CONV_STD = 0.01  # Source: RetinaNet (ICCV 2017, arXiv:1708.02002), 4.1
PRIOR = 0.01  # class probability at the start. Source: as above
NUM_TOP = 4  # bins of each edge that tell the quality of a box. Source: GFLv2 (CVPR 2021, arXiv:2011.12885), 3.2
QUALITY_CHANNELS = 64  # Source: as above


@dataclass(frozen=True)
class Traits:
    """What tells a kind of head from the others; as in GFL, unless given.

    Attributes:
        assignment: By whose rule objects are assigned to locations.
        quality: What tells how good a location's box is, whatever its class: how central it is in its object, or the
            shape of its edge distributions; none where nothing does.
        location_offset: How far locations lie from the corners of their cells, in strides.
        prior_wh: Width and height of each of a cell's prior boxes, in strides.
        has_scales: Whether the edges have a learned scale per level.
        has_pyramid_relu: See `FPN`.
        is_pyramid_on_input: See `FPN`.
    """

    assignment: Rule
    quality: Literal["shape", "centerness"] | None
    location_offset: float = 0.0
    prior_wh: tuple[tuple[float, float], ...] = SQUARE
    has_scales: bool = True
    has_pyramid_relu: bool = False
    is_pyramid_on_input: bool = False


TRAITS = {
    "gfl": Traits("atss", quality=None),
    "gflv2": Traits("atss", quality="shape"),
    "atss": Traits("atss", quality="centerness"),
    "fcos": Traits("fcos", quality="centerness", location_offset=0.5, has_pyramid_relu=True),
    "retina": Traits("retina", quality=None, prior_wh=octave_priors(), has_scales=False, is_pyramid_on_input=True),
}


class HeadSpec(Spec):
    """A dense head with edge distributions.

    Attributes:
        kind: `"gfl"`: the class logits tell the quality of the box too. `"gflv2"`: the shape of the edge distributions
            tells the quality, which multiplies the scores. `"atss"`: so does a branch that tells how central the
            location is in its object. `"fcos"`: likewise, with locations at the centres of their cells, another rule
            which of them answer for an object, and one activation more in the pyramid. `"retina"`: no quality; nine
            prior boxes at each cell of a map, each with classes and edges of its own, a rule by their IoU which of them
            answer for an object, and a pyramid whose map of stride 64 is made from the backbone's. The originals of
            these three have no edge distributions.
        reg_max: Largest bin of an edge distribution, strides; longer edges cannot be told.
        num_convs: Layers of each tower.
        norm: Of these layers: `"group"`, or `"none"`, in whose place they have a bias; so has RetinaNet's configuration
            in the released LD code.
    """

    kind: Literal["gfl", "gflv2", "atss", "fcos", "retina"] = "gfl"
    reg_max: int = Field(default=16, ge=1, le=64)
    num_convs: int = Field(default=4, ge=1, le=8)
    norm: Literal["group", "none"] = "group"

    @property
    def traits(self) -> Traits:
        """Return what tells the head's kind from the others."""
        return TRAITS[self.kind]

    @property
    def has_centerness(self) -> bool:
        """Return whether the quality of a location is how central it is in its object."""
        return self.traits.quality == "centerness"

    @property
    def location_offset(self) -> float:
        """Return how far locations lie from the corners of their cells, in strides."""
        return self.traits.location_offset

    @property
    def prior_wh(self) -> tuple[tuple[float, float], ...]:
        """Return width and height of each of a cell's prior boxes, in strides."""
        return self.traits.prior_wh

    @property
    def has_quality(self) -> bool:
        """Return whether the head tells how good a location's box is, whatever its class."""
        return self.traits.quality is not None

    @model_validator(mode="after")
    def _check_bins(self) -> "HeadSpec":
        if self.kind == "gflv2" and self.reg_max + 1 < NUM_TOP:
            raise ValueError(f'"gflv2" reads the {NUM_TOP} highest bins of each edge: reg_max {NUM_TOP - 1} or more')
        return self


class TowerLayer(nn.Module):
    """Convolution, group norm (or a bias in its place), ReLU."""

    def __init__(self, channels: int, *, has_norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=not has_norm)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels) if has_norm else None

    def before_activation(self, feature: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """Return what the ReLU reads."""
        inner: Tensor = self.conv(feature)
        norm = self.norm
        if norm is None:
            return inner
        # Not norm(inner): that refuses one value per group, as 32 channels have on a map of one location.
        return torch.group_norm(inner, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def forward(self, feature: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """Return a map of the same shape, not negative."""
        return torch.relu(self.before_activation(feature))


class Tower(nn.ModuleList):
    """Layers shared by all pyramid levels, which can be run in two parts.

    A cut `k` lies behind the norm (or bias) of the `k`-th layer, counted from 1, and before its activation; at 0 it
    lies before the first layer.
    """

    def __init__(self, spec: HeadSpec, channels: int) -> None:
        super().__init__(TowerLayer(channels, has_norm=spec.norm == "group") for _ in range(spec.num_convs))

    def until(self, feature: Float[Tensor, "B D H W"], cut: int) -> Float[Tensor, "B D H W"]:
        """Return the map at the cut."""
        for index, layer in enumerate(islice(self, cut), start=1):
            assert isinstance(layer, TowerLayer)
            feature = layer(feature) if index < cut else layer.before_activation(feature)
        return feature

    def after(self, inner: Float[Tensor, "B D H W"], cut: int) -> Float[Tensor, "B D H W"]:
        """Return the tower's output from the map at the cut."""
        feature = torch.relu(inner) if cut else inner
        for layer in islice(self, cut, None):
            feature = layer(feature)
        return feature


def quality_branch(spec: HeadSpec, channels: int) -> nn.Module | None:
    """Return what makes the quality of a location out of its `distribution_shape`, or of the tower of the edges.

    Source: GFLv2 (CVPR 2021, arXiv:2011.12885), DGQP; FCOS (ICCV 2019, arXiv:1904.01355), centerness, which its later
    code and ATSS's read from the tower of the edges.
    """
    if spec.has_centerness:
        return nn.Conv2d(channels, 1, kernel_size=3, padding=1)
    if not spec.has_quality:
        return None
    return nn.Sequential(
        nn.Conv2d(4 * (NUM_TOP + 1), QUALITY_CHANNELS, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(QUALITY_CHANNELS, 1, kernel_size=1),
    )


def distribution_shape(edge: Float[Tensor, "B _ H W"], num_bins: int) -> Float[Tensor, "B _ H W"]:
    """Return the highest probabilities of each edge's distribution, descending, and their mean, edge by edge.

    A sharp distribution is a sure one, wherever it lies.

    Args:
        edge: Logits, edges in the order left, top, right, bottom.
        num_bins: Of each edge.
    """
    top = edge.reshape(edge.shape[0], 4, num_bins, *edge.shape[2:]).softmax(dim=2).topk(NUM_TOP, dim=2).values
    return torch.cat((top, top.mean(dim=2, keepdim=True)), dim=2).flatten(1, 2)


class DenseHead(nn.Module):
    """Two towers shared by all levels, and a learned scale per level: an inverse temperature of the edges.

    Where a cell has several prior boxes, its channels are those of one after another.

    Source: GFL (NeurIPS 2020, arXiv:2006.04388). The other kinds differ in what tells the quality of a location and in
    where locations lie; RetinaNet's also has nine prior boxes at each, and no scales. Without norms, which any kind can
    be, the layers of the towers have biases.
    """

    def __init__(self, spec: HeadSpec, channels: int, num_classes: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.location_offset = spec.location_offset
        self.prior_wh = spec.prior_wh
        self.num_classes = num_classes
        self.num_bins = spec.reg_max + 1
        num_priors = len(self.prior_wh)
        self.cls_tower = Tower(spec, channels)
        self.edge_tower = Tower(spec, channels)
        self.cls = nn.Conv2d(channels, num_priors * num_classes, kernel_size=3, padding=1)
        self.edge = nn.Conv2d(channels, num_priors * 4 * self.num_bins, kernel_size=3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides if spec.traits.has_scales)
        self.has_centerness = spec.has_centerness
        self.quality = quality_branch(spec, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=CONV_STD)
                if module.bias is not None:
                    nn.init.constant_(module.bias, math.log(PRIOR / (1 - PRIOR)) if module is self.cls else 0.0)

    def forward(self, features: tuple[Float[Tensor, "B _ _ _"], ...], cut: int = 0) -> Dense:
        """Return the logits of every location of the pyramid maps, finest first, and the tower maps at a cut."""
        towers = TowerMaps(
            cls=tuple(self.cls_tower.until(feature, cut) for feature in features),
            edge=tuple(self.edge_tower.until(feature, cut) for feature in features),
        )
        return self.resume(towers, cut, features)

    def locations(self, sizes_hw: tuple[tuple[int, int], ...], device: torch.device) -> Locations:
        """Return where the predictions on maps of these heights and widths sit, finest first."""
        return location_grid(sizes_hw, self.strides, device, self.location_offset, self.prior_wh)

    def resume(self, towers: TowerMaps, cut: int, features: tuple[Float[Tensor, "B _ _ _"], ...]) -> Dense:
        """Return what the rest of the head makes of tower maps at a cut, its own or another head's.

        Args:
            towers: The maps.
            cut: Where they come from; see `Tower`.
            features: What the result says that the head read.
        """
        cls, edge, quality = [], [], []
        num_priors = len(self.prior_wh)
        for level, (inner_cls, inner_edge) in enumerate(zip(towers.cls, towers.edge, strict=True)):
            cls_map = self.cls(self.cls_tower.after(inner_cls, cut))
            edge_feature = self.edge_tower.after(inner_edge, cut)
            # distributions need float32, also under AMP
            edge_map = self.edge(edge_feature).float()
            if self.scales:
                edge_map = edge_map * self.scales[level]
            cls.append(cls_map.permute(0, 2, 3, 1).unflatten(-1, (num_priors, self.num_classes)).flatten(1, 3))
            edge.append(edge_map.permute(0, 2, 3, 1).unflatten(-1, (num_priors, 4, self.num_bins)).flatten(1, 3))
            if self.quality is not None:
                read = edge_feature if self.has_centerness else distribution_shape(edge_map, self.num_bins)
                quality.append(self.quality(read).flatten(1))
        sizes_hw = tuple((inner.shape[-2], inner.shape[-1]) for inner in towers.cls)
        return Dense(
            cls=torch.cat(cls, dim=1),
            edge=torch.cat(edge, dim=1),
            features=features,
            towers=towers,
            locations=self.locations(sizes_hw, towers.cls[0].device),
            quality=torch.cat(quality, dim=1) if quality else None,
        )
