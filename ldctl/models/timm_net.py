"""Networks of timm, an optional package, which brings out the maps itself."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ldctl.errors import MissingError
from ldctl.models.base import (
    MAP_STRIDES,
    MEAN,
    STD,
    TRACED_HW,
    Backbone,
    Color,
    Entry,
    Norm,
    channels_first,
    check_known,
    map_layout,
    resolve,
    to_color,
)
from ldctl.schema import Spec


class TimmSpec(Spec):
    """A network of timm as a backbone.

    Attributes:
        name: Timm's name, such as `tf_efficientnet_lite0`, with or without the tag of its weights (`.in1k`).
        init: `imagenet` (timm's pretrained weights), `none` (random), or a path: a `.pth` or `.safetensors` of the
            network, or an ldctl checkpoint, whose backbone is taken.
        norm: As for ResNet; concerns batch norm only.
        mean: Of the images that the weights expect: RGB, 0 .. 255. Unless given, as timm says of its own.
        std: As `mean`.
    """

    kind: Literal["timm"] = "timm"
    name: str
    init: str = Field(default="imagenet", min_length=1)
    norm: Norm = "frozen"
    mean: Color = MEAN
    std: Color = STD

    @property
    def short(self) -> str:
        """Return what a run's folder is called."""
        return self.name

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever the user wrote)
        """Fill in `norm`, which depends on `init`, and what the weights expect."""
        expected: dict[str, object] = {}
        if isinstance(data, Mapping) and data.get("name") in names():
            config = _timm().models.get_pretrained_cfg(data["name"])
            expected = {"mean": to_color(config.mean), "std": to_color(config.std)} if config else {}
        return resolve(data, {"norm": "frozen", **expected}, {"norm": "trainable", **expected})

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        check_known(name, names(), "timm")
        layout_of(name)
        return name


_REFUSED = "timm's '{}' has no maps of strides 8, 16 and 32 of images of any size: take another network"


@dataclass(frozen=True)
class Layout:
    """How a network makes maps.

    Attributes:
        out_indices: Of the maps of strides 8, 16 and 32, among those that timm can bring out.
        channels: Of the maps.
        has_channels_last: Which maps have to be turned.
        published: Name and shape of every entry of the network's weights files.
    """

    out_indices: tuple[int, ...]
    channels: tuple[int, ...]
    has_channels_last: tuple[bool, ...]
    published: dict[str, tuple[int, ...]]


class TimmNet(Backbone):
    """The maps of a timm network; keys are those of `timm.create_model(name, features_only=True)`, below `network`."""

    def __init__(self, spec: TimmSpec) -> None:
        super().__init__()
        self.spec: TimmSpec = spec
        self.mean, self.std = spec.mean, spec.std
        self.title = f"timm's {spec.name}"
        self.layout = layout_of(spec.name)
        self.out_channels = self.layout.channels
        self.network = self._create(pretrained=False)
        # Timm joins the names of nested modules where it takes a network apart: `stages.0.` becomes `stages_0.`.
        own = {_plain(key): key for key in self.state_dict()}
        self.published = {key: Entry(own.get(_plain(key)), shape) for key, shape in self.layout.published.items()}

    def _create(self, *, pretrained: bool) -> nn.Module:
        network = _timm().create_model(
            self.spec.name, pretrained=pretrained, features_only=True, out_indices=self.layout.out_indices
        )
        assert isinstance(network, nn.Module)
        return network

    def imagenet(self) -> Mapping[str, Tensor]:
        """Return timm's pretrained weights.

        Raises:
            MissingError: There are none, or they cannot be downloaded.
        """
        try:
            network = self._create(pretrained=True)
        except Exception as error:  # the hub's client raises whatever its parts do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MissingError(
                f"cannot get the ImageNet weights of {self.title} ({reason}): "
                "pass --init PATH, or --init none to start from random weights"
            ) from error
        return {f"network.{key}": value for key, value in network.state_dict().items()}

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Return the maps of strides 8, 16 and 32 of normalized images."""
        return channels_first(self.network(images), self.layout.has_channels_last)


def _timm() -> ModuleType:
    """Import timm.

    Raises:
        MissingError: It is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise MissingError("timm is not installed: pip install ldctl[timm]")
    import timm

    module: ModuleType = timm
    return module


@cache
def names() -> tuple[str, ...]:
    """Return the names of timm's networks, also those with the tag of their weights."""
    timm = _timm()
    return (*timm.list_models(), *timm.list_pretrained())


@cache
def layout_of(name: str) -> Layout:
    """Find the maps of a network, by running it once without data.

    Raises:
        ValueError: It has no maps of strides 8, 16 and 32 at any size.
    """
    create = _timm().create_model
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        try:
            published = {key: tuple(value.shape) for key, value in create(name).state_dict().items()}
            network = create(name, features_only=True).eval()
            index = {stride: index for index, stride in enumerate(network.feature_info.reduction())}
            maps = [network(torch.empty(1, 3, *TRACED_HW))[index[stride]] for stride in MAP_STRIDES]
        except (RuntimeError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(_REFUSED.format(name)) from error
    layouts = [layout for layout in map(map_layout, maps) if layout]
    if tuple(layout.stride for layout in layouts) != MAP_STRIDES:
        raise ValueError(_REFUSED.format(name))
    return Layout(
        out_indices=tuple(network.feature_info.out_indices[index[stride]] for stride in MAP_STRIDES),
        channels=tuple(layout.channels for layout in layouts),
        has_channels_last=tuple(layout.has_channels_last for layout in layouts),
        published=published,
    )


def _plain(key: str) -> str:
    """Return a name that is the same whether or not timm took the network apart."""
    return key.removeprefix("network.").removeprefix("model.").replace(".", "_")
