"""What all backbones share: input statistics, norms that stand still, and what a weights file of theirs holds."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

Color = Annotated[tuple[float, float, float], Field(strict=False)]  # a list, too, of which the numbers stay strict
Norm = Literal["frozen", "trainable"]

# RGB, 0 .. 255. Source: torchvision's ImageNet statistics times 255
MEAN: Color = (123.675, 116.28, 103.53)
STD: Color = (58.395, 57.12, 57.375)

MAP_STRIDES = (8, 16, 32)  # of the maps that the pyramid reads
TRACED_HW = (256, 384)  # image that networks are tried with; multiples of 32, not equal: height tells from width


class Entry(NamedTuple):
    """An entry of the weights file that is published for a network.

    Attributes:
        name: What the backbone calls it; None where the backbone has no such part, as a classifier.
        shape: Its shape.
    """

    name: str | None
    shape: tuple[int, ...]


class Start(Protocol):
    """What the specs of all backbones say."""

    @property
    def init(self) -> str:
        """Return where the weights come from: `imagenet`, `none` or a path."""

    @property
    def norm(self) -> Norm:
        """Return whether the running statistics of batch norm move."""


class Backbone(nn.Module):
    """Normalized images to maps of strides 8, 16 and 32.

    Attributes:
        spec: What it was built from.
        title: What messages call the network, such as `a ResNet-18 of width 1`.
        mean: Of the images that it expects: RGB, 0 .. 255.
        std: As `mean`.
        out_channels: Of the three maps.
        export_fault: Why it cannot be exported to ONNX; empty where it can.
        published: What its weights files hold, by name and in their order.
    """

    spec: Start
    title: str
    mean: Color = MEAN
    std: Color = STD
    out_channels: tuple[int, ...]
    export_fault: str = ""
    published: dict[str, Entry]

    def frozen(self) -> list[nn.Module]:
        """Return the modules that never train."""
        return []

    def imagenet(self) -> Mapping[str, Tensor]:
        """Return the ImageNet weights, downloaded unless they are here already.

        Raises:
            MissingError: They cannot be downloaded.
        """
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Return the maps of strides 8, 16 and 32 of normalized images."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Take the gradients from what never trains; to be called at the end of the construction."""
        for module in self.frozen():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch modes; what is frozen keeps using, and never moves, its running statistics."""
        super().train(mode)
        modules = self.modules() if self.spec.norm == "frozen" else (m for top in self.frozen() for m in top.modules())
        for module in modules:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def resolve(data: Any, pretrained: Mapping[str, object], random: Mapping[str, object]) -> Any:  # noqa: ANN401
    """Fill in what a backbone's spec leaves out, or says to be none, and what depends on `init`.

    Args:
        data: Whatever the user wrote.
        pretrained: Values with pretrained weights.
        random: Values with random ones.
    """
    if not isinstance(data, Mapping):
        return data
    filled = random if data.get("init") == "none" else pretrained
    return {**filled, **{key: value for key, value in data.items() if key not in filled or value is not None}}


def to_color(shares: Sequence[float]) -> Color:
    """Return a colour in 0 .. 255 from one in 0 .. 1."""
    red, green, blue = (round(255 * share, 6) for share in shares)  # rounded: 255 * 0.485 is 123.675
    return red, green, blue


@dataclass(frozen=True)
class MapLayout:
    """What the shape of a map says.

    Attributes:
        stride: Pixels of the image between neighbours.
        channels: Of the map.
        has_channels_last: Whether they are the last dimension, as in Swin.
    """

    stride: int
    channels: int
    has_channels_last: bool


def map_layout(value: object) -> MapLayout | None:
    """Return what a network makes of an image of `TRACED_HW`; None if it is no map of stride 1 to 32."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return None
    for stride in (1, 2, 4, *MAP_STRIDES):
        size = tuple(pixels // stride for pixels in TRACED_HW)
        if value.shape[2:] == size:
            return MapLayout(stride, value.shape[1], has_channels_last=False)
        if value.shape[1:3] == size:
            return MapLayout(stride, value.shape[3], has_channels_last=True)
    return None


def channels_first(
    maps: Sequence[Float[Tensor, "B _ _ _"]], has_channels_last: Sequence[bool]
) -> tuple[Float[Tensor, "B _ _ _"], ...]:
    """Return the maps, turned where they have to be."""
    pairs = zip(maps, has_channels_last, strict=True)
    return tuple(value.permute(0, 3, 1, 2) if is_turned else value for value, is_turned in pairs)


def check_known(name: str, names: Collection[str], package: str) -> None:
    """Refuse a name that a package does not know.

    Raises:
        ValueError: With the nearest one that it does know.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"see {package}'s list_models()"
        raise ValueError(f"{package} has no classification network '{name}': {hint}")
