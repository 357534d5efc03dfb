"""The union of backbones."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ldctl.models.base import Backbone
from ldctl.models.resnet import ResNet, ResNetSpec
from ldctl.models.timm_net import TimmNet, TimmSpec
from ldctl.models.torchvision_net import TorchvisionNet, TorchvisionSpec


def _say_kind(data: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever the user wrote)
    """Take a table that does not say its kind for a ResNet's."""
    return {"kind": "resnet", **data} if isinstance(data, Mapping) else data


BackboneSpec = Annotated[
    ResNetSpec | TorchvisionSpec | TimmSpec, Field(discriminator="kind"), BeforeValidator(_say_kind)
]


def build_backbone(spec: BackboneSpec) -> Backbone:
    """Build a backbone with random weights."""
    if isinstance(spec, ResNetSpec):
        return ResNet(spec)
    return TorchvisionNet(spec) if isinstance(spec, TorchvisionSpec) else TimmNet(spec)
