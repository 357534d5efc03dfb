"""ResNet as torchvision lays it out, at any width, with frozen or trainable batch norm, plain or deformable."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import deform_conv2d

from ldctl.errors import CheckpointError, MissingError
from ldctl.keys import key_faults
from ldctl.schema import Spec

Depth = Literal[18, 34, 50, 101]

LAYOUT: dict[int, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}  # block and blocks per stage. Source: ResNet (CVPR 2016, arXiv:1512.03385), table 1

# The weights that the papers start from; V2 of torchvision is another training recipe.
IMAGENET = {
    18: resnet.ResNet18_Weights.IMAGENET1K_V1,
    34: resnet.ResNet34_Weights.IMAGENET1K_V1,
    50: resnet.ResNet50_Weights.IMAGENET1K_V1,
    101: resnet.ResNet101_Weights.IMAGENET1K_V1,
}

STEM_CHANNELS = 64  # at width 1


class ResNetSpec(Spec):
    """A ResNet backbone.

    Attributes:
        depth: Number of layers.
        width: Channel multiplier; `64 * width` is a whole number. Only 1 can load ImageNet weights.
        init: `imagenet` (torchvision's V1 weights), `none` (random), or a path: a `.pth` or `.safetensors` of a
            torchvision ResNet, or an ldctl checkpoint, whose backbone is taken.
        norm: `frozen`: the running statistics of batch norm never move. `trainable`: they do. Unless given, `frozen`
            with pretrained weights and `trainable` without.
        frozen_stages: 0 trains everything, 1 freezes the stem and the first stage, 4 everything. Unless given, 1 with
            pretrained weights and 0 without.
        dcn: Deformable 3x3 convolutions in the last three stages, as mmdet's `dcn=dict(type="DCN")`; with bottlenecks
            (depth 50 or 101) only.
    """

    kind: Literal["resnet"] = "resnet"
    depth: Depth = 50
    width: float = Field(default=1.0, gt=0, le=4)
    init: str = Field(default="imagenet", min_length=1)
    norm: Literal["frozen", "trainable"] = "frozen"
    frozen_stages: int = Field(default=1, ge=0, le=4)
    dcn: bool = False

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever the user wrote)
        """Fill in `norm` and `frozen_stages`, which depend on `init`."""
        if not isinstance(data, Mapping):
            return data
        is_random = data.get("init") == "none"
        resolved = {"norm": "trainable", "frozen_stages": 0} if is_random else {"norm": "frozen", "frozen_stages": 1}
        return resolved | {key: value for key, value in data.items() if key not in resolved or value is not None}

    @model_validator(mode="after")
    def _check_width(self) -> "ResNetSpec":
        stem = STEM_CHANNELS * self.width
        if stem % 1:
            raise ValueError(f"width {self.width:g} gives {stem:g} stem channels: use a multiple of 1/{STEM_CHANNELS}")
        if self.width != 1 and self.init == "imagenet":
            raise ValueError(f'no ImageNet weights for width {self.width:g}: use width 1, init "none" or a path')
        if self.dcn and LAYOUT[self.depth][0] is not Bottleneck:
            raise ValueError(
                f"depth {self.depth} has no bottlenecks for deformable convolutions: use 50 or 101, or no dcn"
            )
        return self


class ResNet(nn.Module):
    """The feature maps of strides 8, 16 and 32 of a ResNet; keys are torchvision's, without `fc`."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        block, counts = LAYOUT[spec.depth]
        base = int(STEM_CHANNELS * spec.width)
        self.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(block, base, base, counts[0], stride=1)
        expanded = base * _expansion(block)
        self.layer2 = _stage(block, expanded, 2 * base, counts[1], stride=2)
        self.layer3 = _stage(block, 2 * expanded, 4 * base, counts[2], stride=2)
        self.layer4 = _stage(block, 4 * expanded, 8 * base, counts[3], stride=2)
        self.out_channels = (2 * expanded, 4 * expanded, 8 * expanded)
        self._initialize()
        if spec.dcn:
            for stage in (self.layer2, self.layer3, self.layer4):
                for residual in stage:
                    assert isinstance(residual.conv2, nn.Conv2d)
                    residual.conv2 = DeformableConv2d(residual.conv2)
        for module in self._frozen():
            module.requires_grad_(False)

    def _initialize(self) -> None:
        """Draw He-normal convolutions; the last norm of a block starts at zero, so that each block is the identity.

        Source: torchvision's ResNet with `zero_init_residual`.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def _frozen(self) -> list[nn.Module]:
        """Return the modules that never train: the stem and the first `frozen_stages` stages."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4][: self.spec.frozen_stages]
        return [self.conv1, self.bn1, *stages] if stages else []

    def train(self, mode: bool = True) -> "ResNet":
        """Switch modes; what is frozen keeps using, and never moves, its running statistics."""
        super().train(mode)
        modules = self.modules() if self.spec.norm == "frozen" else (m for top in self._frozen() for m in top.modules())
        for module in modules:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Return the maps of strides 8, 16 and 32 of normalized images."""
        stem: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c3 = self.layer2(self.layer1(stem))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


class DeformableConv2d(nn.Module):
    """A 3x3 convolution that reads where it likes: each output learns an offset for each of its nine inputs.

    Starts out as the plain convolution that it replaces.

    Source: Deformable Convolutional Networks (ICCV 2017, arXiv:1703.06211), without the second version's masks.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.stride = plain.stride[0]
        self.weight = plain.weight
        self.conv_offset = nn.Conv2d(plain.in_channels, 2 * 9, kernel_size=3, stride=self.stride, padding=1)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, feature: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        """Return what the plain convolution would return, but for its inputs' places."""
        offset = self.conv_offset(feature)
        output: Tensor = deform_conv2d(feature, offset, self.weight, stride=self.stride, padding=1)
        return output


def _expansion(block: type[nn.Module]) -> int:
    """Return a block's output channels over its inner ones."""
    return 4 if block is Bottleneck else 1


def _stage(block: type[nn.Module], inputs: int, planes: int, count: int, *, stride: int) -> nn.Sequential:
    """Chain residual blocks; the first changes resolution and channels, its shortcut by a 1x1 convolution."""
    outputs = planes * _expansion(block)
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(count - 1)))


def initialize_backbone(backbone: ResNet) -> None:
    """Load the weights that the spec's `init` names; leave a random backbone alone.

    Raises:
        MissingError: The ImageNet weights cannot be downloaded.
        CheckpointError: The file of `init` is missing, unreadable, or does not fit.
    """
    init = backbone.spec.init
    if init == "none":
        return
    state = _download(backbone.spec.depth) if init == "imagenet" else _read(Path(init))
    load_backbone_weights(backbone, state, source=init)


def load_backbone_weights(backbone: ResNet, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights in torchvision's layout (`fc` is ignored) or those under `backbone.` of an ldctl checkpoint.

    Args:
        backbone: Changed in place.
        state: Entries by name.
        source: What messages call it.

    Raises:
        CheckpointError: Entries are missing, unexpected or of another shape; the first are listed.
    """
    prefix = "backbone."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    given = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    # The first torchvision files predate these counters, which only matter to norms without momentum; and a plain
    # network may be made deformable, with offsets of zero.
    optional = [key for key in own if key.endswith("num_batches_tracked") or ".conv_offset." in key]
    given = {key: own[key] for key in optional} | given
    shapes, own_shapes = ({key: value.shape for key, value in entries.items()} for entries in (given, own))
    verdict = f"do not fit a ResNet-{backbone.spec.depth} of width {backbone.spec.width:g}; change depth or init"
    faults = key_faults(shapes, own_shapes, "the backbone's", verdict)
    if faults:
        raise CheckpointError(f"{source}: {faults}")
    backbone.load_state_dict(given)


def _download(depth: int) -> Mapping[str, Tensor]:
    """Fetch torchvision's ImageNet weights into torch hub's cache, or take them from there."""
    weights = IMAGENET[depth]
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        name = weights.url.rsplit("/", 1)[-1]
        target = Path(torch.hub.get_dir()) / "checkpoints" / name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingError(
            f"cannot get the ImageNet weights {weights.url} ({reason}): "
            f"put {name} at {target}, or pass --init PATH, or --init none to start from random weights"
        ) from error
    return state


def _read(path: Path) -> dict[str, Tensor]:
    """Read a flat file of tensors, `.safetensors` or a `.pth` without any code in it."""
    advice = "pass --init a torchvision ResNet (.pth, .safetensors) or an ldctl checkpoint"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: {advice}, or --init none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the reader raise anything
        raise CheckpointError(f"{path}: not a readable weights file ({type(error).__name__}): {advice}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not a flat dictionary of tensors: {advice}")
    return dict(state)
