"""The detector: images to predictions at every location, and those to final boxes."""

from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ldctl.boxes import decode_ltrb, expected_distance
from ldctl.models.backbone import BackboneSpec, build_backbone
from ldctl.models.fpn import FPN
from ldctl.models.heads import NORM_GROUPS, DenseHead, HeadSpec
from ldctl.models.nms import voting_cluster_diou_nms
from ldctl.models.resnet import ResNetSpec
from ldctl.models.weights import initialize_backbone
from ldctl.schema import Spec
from ldctl.types import Dense, Detections, Locations

STRIDES = (8, 16, 32, 64, 128)


class ModelSpec(Spec):
    """A detector but for its classes.

    Attributes:
        backbone: What reads the image.
        head: What predicts.
        channels: Width of the pyramid and of the head; a multiple of 32, the groups of its norm.
    """

    backbone: BackboneSpec = ResNetSpec()
    head: HeadSpec = HeadSpec()
    channels: int = Field(default=256, ge=NORM_GROUPS, multiple_of=NORM_GROUPS)


class PostprocessSpec(Spec):
    """From predictions to final boxes.

    Attributes:
        score_threshold: A class of a location counts above this score only; see `Dense.score`.
        nms: `"class"` suppresses by IoU. `"voting_cluster_diou"` suppresses by IoU less a penalty for distant centres,
            and lets a box be moved by close ones of lower scores (see `nms.py`); not for export.
        nms_iou: Of two boxes of one class that overlap more than this, the better stays.
        candidates_per_level: Best pairs of location and class that a pyramid level may bring.
        max_detections: Most boxes of an image.

    Source: the defaults are those of GFL and of COCO evaluation.
    """

    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    nms: Literal["class", "voting_cluster_diou"] = "class"
    nms_iou: float = Field(default=0.6, gt=0, le=1)
    candidates_per_level: int = Field(default=1000, ge=1)
    max_detections: int = Field(default=100, ge=1)


class Detector(nn.Module):
    """Backbone, pyramid and dense head. Construction draws random weights; `initialize` loads the backbone's."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = STRIDES
        self.backbone = build_backbone(spec.backbone)
        # The input statistics belong to the code and the spec, not to a weights file.
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)
        self.fpn = FPN(
            self.backbone.out_channels,
            spec.channels,
            has_relu=spec.head.kind == "fcos",
            is_on_input=spec.head.kind == "retina",
        )
        self.head = DenseHead(spec.head, spec.channels, num_classes, STRIDES)

    def normalize(self, images: UInt8[Tensor, "B 3 H W"], size_hw: Int[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
        """Subtract the mean, divide by the standard deviation, and set what lies beyond an image's own size to zero."""
        height, width = images.shape[-2:]
        row = torch.arange(height, device=images.device).view(1, 1, height, 1)
        column = torch.arange(width, device=images.device).view(1, 1, 1, width)
        size = size_hw.view(-1, 2, 1, 1, 1)
        is_inside = (row < size[:, 0]) & (column < size[:, 1])
        return ((images - self.mean) / self.std).where(is_inside, 0.0)

    def forward(self, images: Float[Tensor, "B 3 H W"], cut: int = 0) -> Dense:
        """Predict from normalized images; multiples of 32 pixels waste nothing, any size works.

        Args:
            images: See `normalize`.
            cut: Where in the head's towers to take maps, for CrossKD; see `Tower`.
        """
        dense: Dense = self.head(self.fpn(self.backbone(images)), cut)
        return dense


def initialize(detector: Detector) -> str:
    """Load what the spec's `init` names into the detector's backbone.

    Returns:
        What the user should know of how its entries were matched; empty if there is nothing to say.

    Raises:
        MissingError: The ImageNet weights cannot be downloaded.
        CheckpointError: The file of `init` is missing, unreadable, or does not fit.
    """
    return initialize_backbone(detector.backbone)


@torch.no_grad()
def detect(
    dense: Dense,
    batch_size_hw: Int[Tensor, "B 2"],
    original_hw: Int[Tensor, "B 2"],
    image_id: tuple[int, ...],
    spec: PostprocessSpec,
) -> list[Detections]:
    """Return the final boxes of each image of a batch, in pixels of the stored images, best first.

    Args:
        dense: Predictions.
        batch_size_hw: Size of each image in the batch, without padding; boxes are clipped to it.
        original_hw: Size of each stored image.
        image_id: The images' ids.
        spec: Thresholds.
    """
    sizes, originals = batch_size_hw.tolist(), original_hw.tolist()  # synchronizes, as everything about boxes does
    scores, results = dense.score, []
    for image, (identity, size, original) in enumerate(zip(image_id, sizes, originals, strict=True)):
        scale_hw = (size[0] / original[0], size[1] / original[1])
        found = detect_image(scores[image], dense.edge[image], dense.locations, (size[0], size[1]), scale_hw, spec)
        results.append(Detections(image_id=identity, xyxy=found[0], score=found[1], label=found[2]))
    return results


def detect_image(
    score: Float[Tensor, "A C"],
    edge: Float[Tensor, "A 4 R"],
    locations: Locations,
    size_hw: tuple[int, int],
    scale_hw: tuple[float, float],
    spec: PostprocessSpec,
) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return boxes (`xyxy`, pixels of the stored image), scores and labels of one image, best first.

    Args:
        score: Of each class; see `Dense.score`.
        edge: Logits of the edge distributions.
        locations: Where the rows sit.
        size_hw: Size of the image in the network input; boxes are clipped to it.
        scale_hw: Pixels of the network input per pixel of the stored image.
        spec: Thresholds.

    Source: mmdet 3, which ranks pairs of location and class (not locations), and drops boxes without extent. Differs
    from it: the score of heads that tell centerness is multiplied with it before candidates are chosen, not after.
    """
    row, score, label = _candidates(score, locations.level_sizes, spec)
    ltrb = expected_distance(edge[row])
    xyxy = decode_ltrb(locations.xy[row], ltrb, locations.stride[row])
    limit_wh = xyxy.new_tensor((size_hw[1], size_hw[0])).repeat(2)
    scale_wh = xyxy.new_tensor((scale_hw[1], scale_hw[0])).repeat(2)
    xyxy = torch.minimum(xyxy.clamp(min=0), limit_wh) / scale_wh
    has_extent = (xyxy[:, 2:] > xyxy[:, :2]).all(dim=1)
    xyxy, score, label = xyxy[has_extent], score[has_extent], label[has_extent]
    if spec.nms == "voting_cluster_diou":
        return voting_cluster_diou_nms(xyxy, score, label, threshold=spec.nms_iou, limit=spec.max_detections)
    keep = batched_nms(xyxy, score, label, spec.nms_iou)[: spec.max_detections]
    return xyxy[keep], score[keep], label[keep]


def _candidates(
    score: Float[Tensor, "A C"], level_sizes: tuple[int, ...], spec: PostprocessSpec
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return location, score and class of the best pairs of each level, those above the threshold."""
    rows, scores, labels = [], [], []
    start = 0
    for size in level_sizes:
        of_level = score[start : start + size]
        row, label = torch.nonzero(of_level > spec.score_threshold, as_tuple=True)
        best = of_level[row, label].topk(min(spec.candidates_per_level, row.numel()))
        rows.append(row[best.indices] + start)
        scores.append(best.values)
        labels.append(label[best.indices])
        start += size
    return torch.cat(rows), torch.cat(scores), torch.cat(labels)
