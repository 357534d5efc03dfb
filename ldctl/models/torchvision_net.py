"""Classification networks of torchvision: a chain of modules, some of whose outputs are the maps."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torchvision
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

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
from ldctl.models.weights import download
from ldctl.schema import Spec


class TorchvisionSpec(Spec):
    """A classification network of torchvision as a backbone.

    Attributes:
        name: Torchvision's name, such as `mobilenet_v3_large`.
        init: `imagenet` (torchvision's default weights), `none` (random), or a path: a `.pth` or `.safetensors` of the
            network, or an ldctl checkpoint, whose backbone is taken.
        norm: As for ResNet; concerns batch norm only.
        frozen_stages: As for ResNet: 1 freezes all that comes before the map of stride 8 has its size, 4 everything.
        mean: Of the images that the weights expect: RGB, 0 .. 255. Unless given, as torchvision says.
        std: As `mean`.
    """

    kind: Literal["torchvision"] = "torchvision"
    name: str
    init: str = Field(default="imagenet", min_length=1)
    norm: Norm = "frozen"
    frozen_stages: int = Field(default=1, ge=0, le=4)
    mean: Color = MEAN
    std: Color = STD

    @property
    def short(self) -> str:
        """Return what a run's folder is called."""
        return self.name

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever the user wrote)
        """Fill in `norm` and `frozen_stages`, which depend on `init`, and what the weights expect."""
        expected: dict[str, object] = {}
        if isinstance(data, Mapping) and data.get("name") in names():
            preset = torchvision.models.get_model_weights(data["name"]).DEFAULT.transforms()
            expected = {"mean": to_color(preset.mean), "std": to_color(preset.std)}
        return resolve(
            data,
            {"norm": "frozen", "frozen_stages": 1, **expected},
            {"norm": "trainable", "frozen_stages": 0, **expected},
        )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        check_known(name, names(), "torchvision")
        layout_of(name)
        return name


@dataclass(frozen=True)
class Layout:
    """How a network makes maps.

    Attributes:
        chain: Names of modules, each of which reads what the one before it returns, the first the image.
        stage: Of each of these: 1 up to stride 4, then 2, 3, 4 for strides 8, 16, 32.
        maps: Which of them return the maps of strides 8, 16 and 32: the last of each stride.
        channels: Of the maps.
        has_channels_last: Which maps have to be turned.
    """

    chain: tuple[str, ...]
    stage: tuple[int, ...]
    maps: tuple[str, ...]
    channels: tuple[int, ...]
    has_channels_last: tuple[bool, ...]


class TorchvisionNet(Backbone):
    """The maps of a torchvision network; keys are torchvision's, without what comes after the last map."""

    def __init__(self, spec: TorchvisionSpec) -> None:
        super().__init__()
        self.spec: TorchvisionSpec = spec
        self.mean, self.std = spec.mean, spec.std
        self.title = f"torchvision's {spec.name}"
        self.layout = layout_of(spec.name)
        self.out_channels = self.layout.channels
        network = torchvision.models.get_model(spec.name, weights=None)
        entries = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        for name, module in _prune(network, self.layout.chain).named_children():
            self.add_module(name, module)
        for module in self.modules():
            if isinstance(module, StochasticDepth):
                # Meant for hundreds of epochs; and a step must not depend on chance, which a resumed run cannot repeat.
                module.p = 0.0
        if any(isinstance(module, ShiftedWindowAttention) for module in self.modules()):
            self.export_fault = "its windows are shifted at some image sizes only, which one graph cannot do"
        own = self.state_dict().keys()
        self.published = {key: Entry(key if key in own else None, shape) for key, shape in entries.items()}
        self.freeze()

    def frozen(self) -> list[nn.Module]:
        """Return the modules of the first `frozen_stages` stages."""
        pairs = zip(self.layout.chain, self.layout.stage, strict=True)
        return [self.get_submodule(name) for name, stage in pairs if stage <= self.spec.frozen_stages]

    def imagenet(self) -> Mapping[str, Tensor]:
        """Return torchvision's default weights.

        Raises:
            MissingError: They cannot be downloaded.
        """
        return download(torchvision.models.get_model_weights(self.spec.name).DEFAULT)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Return the maps of strides 8, 16 and 32 of normalized images."""
        value, maps = images, []
        for name in self.layout.chain:
            value = self.get_submodule(name)(value)
            if name in self.layout.maps:
                maps.append(value)
        return channels_first(maps, self.layout.has_channels_last)


@cache
def names() -> tuple[str, ...]:
    """Return the names of torchvision's classification networks."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


@dataclass(frozen=True)
class _Call:
    """One call of a module: its dotted name, its first argument, its result."""

    name: str
    given: object
    returned: object


@cache
def layout_of(name: str) -> Layout:
    """Find the chain of a network and its maps, by running it once without data.

    Raises:
        ValueError: It has no maps of strides 8, 16 and 32 at any size, or changes the colours of its input itself.
    """
    network = _without_data(name)
    if hasattr(network, "transform_input"):  # GoogLeNet and Inception
        raise ValueError(f"torchvision's '{name}' normalizes its input once more by itself: take another network")
    calls: list[_Call] = []
    for path, module in network.named_modules():
        module.register_forward_hook(lambda _m, args, out, path=path: calls.append(_Call(path, args[0], out)))
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, 3, *TRACED_HW, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"torchvision's '{name}' takes images of one size only: take another network") from error
    links = _children(calls, calls[-1])
    while gap := _gap(links):
        opened = _children(calls, links[gap - 1])
        if not opened or opened[-1].returned is not links[gap - 1].returned:
            break
        links = [*links[: gap - 1], *opened, *links[gap:]]
    layouts = [map_layout(call.returned) for call in links]
    last = {layout.stride: index for index, layout in enumerate(layouts) if layout}
    if not set(MAP_STRIDES) <= set(last):
        raise ValueError(f"torchvision's '{name}' has no maps of strides 8, 16 and 32: take another network")
    kept = [layout for layout in layouts[: last[MAP_STRIDES[-1]] + 1] if layout]
    assert len(kept) == last[MAP_STRIDES[-1]] + 1, "what lies between maps is a map"
    maps = [(links[last[stride]].name, kept[last[stride]]) for stride in MAP_STRIDES]
    return Layout(
        chain=tuple(call.name for call in links[: len(kept)]),
        stage=tuple(1 + sum(layout.stride >= stride for stride in MAP_STRIDES) for layout in kept),
        maps=tuple(path for path, _ in maps),
        channels=tuple(layout.channels for _, layout in maps),
        has_channels_last=tuple(layout.has_channels_last for _, layout in maps),
    )


def _without_data(name: str) -> nn.Module:
    """Build a network on the meta device; leave the random numbers alone."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of networks that are refused
        try:
            with torch.device("meta"):
                network = torchvision.models.get_model(name, weights=None)
        except NotImplementedError:  # RegNet computes its widths with tensors
            network = torchvision.models.get_model(name, weights=None).to("meta")
    assert isinstance(network, nn.Module)
    return network


def _children(calls: list[_Call], parent: _Call) -> list[_Call]:
    """Return the calls of a module's children from the first on, as long as each reads what the one before returned."""
    links: list[_Call] = []
    value = parent.given
    for call in calls:
        if call.name and call.name.rpartition(".")[0] == parent.name:
            if call.given is not value:
                break
            links.append(call)
            value = call.returned
    return links


def _gap(links: list[_Call]) -> int:
    """Return the number, from 1, of the first link inside which a stride of the maps is passed over; 0 if none is."""
    before = 1
    for number, link in enumerate(links, start=1):
        layout = map_layout(link.returned)
        if layout and any(before < wanted < layout.stride for wanted in MAP_STRIDES):
            return number
        before = layout.stride if layout else before
    return 0


def _prune(network: nn.Module, chain: tuple[str, ...]) -> nn.Module:
    """Take out, in place, every module that is neither in the chain, nor inside one of it, nor around one."""
    around = {name.rsplit(".", depth)[0] for name in chain for depth in range(1, name.count(".") + 1)}
    for path in [path for path, _ in network.named_modules() if path]:
        parent, _, child = path.rpartition(".")
        if (not parent or parent in around) and path not in around and path not in chain:
            delattr(network.get_submodule(parent), child)
    return network
