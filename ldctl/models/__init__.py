"""Detectors: backbone, feature pyramid, head, and the way from predictions to boxes."""

from ldctl.models.backbone import BackboneSpec, build_backbone
from ldctl.models.detector import (
    Detector,
    ModelSpec,
    PostprocessSpec,
    detect,
    final_boxes,
    initialize,
)
from ldctl.models.heads import DenseHead, HeadSpec
from ldctl.models.resnet import ResNet, ResNetSpec
from ldctl.models.timm_net import TimmSpec
from ldctl.models.torchvision_net import TorchvisionSpec
from ldctl.models.weights import load_backbone_weights

__all__ = [
    "BackboneSpec",
    "DenseHead",
    "Detector",
    "HeadSpec",
    "ModelSpec",
    "PostprocessSpec",
    "ResNet",
    "ResNetSpec",
    "TimmSpec",
    "TorchvisionSpec",
    "build_backbone",
    "detect",
    "final_boxes",
    "initialize",
    "load_backbone_weights",
]
