"""Detectors: backbone, feature pyramid, head, and the way from predictions to boxes."""

from ldctl.models.backbone import ResNet, ResNetSpec, load_backbone_weights
from ldctl.models.detector import (
    Detector,
    ModelSpec,
    PostprocessSpec,
    detect,
    detect_image,
    initialize,
)
from ldctl.models.heads import DenseHead, HeadSpec

__all__ = [
    "DenseHead",
    "Detector",
    "HeadSpec",
    "ModelSpec",
    "PostprocessSpec",
    "ResNet",
    "ResNetSpec",
    "detect",
    "detect_image",
    "initialize",
    "load_backbone_weights",
]
