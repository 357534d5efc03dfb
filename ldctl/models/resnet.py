"""ResNet as torchvision lays it out, at any width, with frozen or trainable batch norm, plain or deformable."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import deform_conv2d

from ldctl.models.base import Backbone, Entry, resolve
from ldctl.models.weights import download
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
NUM_CLASSES = 1000  # of ImageNet


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

    @property
    def short(self) -> str:
        """Return what a run's folder is called."""
        return f"r{self.depth}"

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever the user wrote)
        """Fill in `norm` and `frozen_stages`, which depend on `init`."""
        return resolve(data, {"norm": "frozen", "frozen_stages": 1}, {"norm": "trainable", "frozen_stages": 0})

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


class ResNet(Backbone):
    """The feature maps of strides 8, 16 and 32 of a ResNet; keys are torchvision's, without `fc`."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec: ResNetSpec = spec
        self.title = f"a ResNet-{spec.depth} of width {spec.width:g}"
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
        self.freeze()
        self.published = {key: Entry(key, tuple(value.shape)) for key, value in self.state_dict().items()}
        self.published["fc.weight"] = Entry(None, (NUM_CLASSES, 8 * expanded))
        self.published["fc.bias"] = Entry(None, (NUM_CLASSES,))

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

    def frozen(self) -> list[nn.Module]:
        """Return the modules that never train: the stem and the first `frozen_stages` stages."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4][: self.spec.frozen_stages]
        return [self.conv1, self.bn1, *stages] if stages else []

    def imagenet(self) -> Mapping[str, Tensor]:
        """Return torchvision's V1 weights.

        Raises:
            MissingError: They cannot be downloaded.
        """
        return download(IMAGENET[self.spec.depth])

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
        self.bias = plain.bias  # none, unless a norm was folded into it
        self.conv_offset = nn.Conv2d(plain.in_channels, 2 * 9, kernel_size=3, stride=self.stride, padding=1)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, feature: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        """Return what the plain convolution would return, but for its inputs' places."""
        offset = self.conv_offset(feature)
        output: Tensor = deform_conv2d(feature, offset, self.weight, self.bias, stride=self.stride, padding=1)
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
