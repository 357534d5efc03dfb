"""The detector: images to predictions at every location, and those to final boxes."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from ldctl.boxes import decode_ltrb, expected_distance, group_nms, rank_in_group
from ldctl.models.backbone import BackboneSpec, build_backbone
from ldctl.models.fpn import FPN
from ldctl.models.heads import NORM_GROUPS, DenseHead, HeadSpec
from ldctl.models.nms import voting_cluster_diou_nms
from ldctl.models.resnet import ResNetSpec
from ldctl.models.weights import initialize_backbone
from ldctl.schema import Spec
from ldctl.types import Dense, Detections

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
            has_relu=spec.head.traits.has_pyramid_relu,
            is_on_input=spec.head.traits.is_pyramid_on_input,
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


@dataclass(frozen=True)
class Found:
    """Boxes of a batch in one list: image by image, best first.

    Attributes:
        image: Index in the batch.
        xyxy: Pixels.
        score: In (0, 1).
        label: Class index.
    """

    image: Int[Tensor, " N"]
    xyxy: Float[Tensor, "N 4"]
    score: Float[Tensor, " N"]
    label: Int[Tensor, " N"]

    def __getitem__(self, rows: Int[Tensor, " M"]) -> "Found":
        return Found(self.image[rows], self.xyxy[rows], self.score[rows], self.label[rows])


def detect(
    dense: Dense,
    batch_size_hw: Int[Tensor, "B 2"],
    original_hw: Int[Tensor, "B 2"],
    image_id: tuple[int, ...],
    spec: PostprocessSpec,
) -> list[Detections]:
    """Return the final boxes of each image of a batch, in pixels of the stored images, best first, on the CPU.

    Args:
        dense: Predictions.
        batch_size_hw: Size of each image in the batch, without padding; boxes are clipped to it.
        original_hw: Size of each stored image.
        image_id: The images' ids.
        spec: Thresholds.
    """
    found = final_boxes(dense, batch_size_hw, batch_size_hw / original_hw, spec)
    counts = found.image.cpu().bincount(minlength=len(image_id)).tolist()
    columns = (torch.split(part.cpu(), counts) for part in (found.xyxy, found.score, found.label))
    # copies: a part would carry its whole batch along to other ranks
    return [
        Detections(identity, *(part.clone() for part in parts))
        for identity, *parts in zip(image_id, *columns, strict=True)
    ]


@torch.no_grad()
def final_boxes(
    dense: Dense,
    size_hw: Int[Tensor, "B 2"],
    scale_hw: Float[Tensor, "B 2"],
    spec: PostprocessSpec,
    is_wanted: Bool[Tensor, " B"] | None = None,
) -> Found:
    """Return the final boxes of a batch; those of an image do not depend on the others.

    Synchronises with the host four times, whatever the number of images; but above 25,000 candidates of the batch, on a
    CPU above 1,000, torchvision suppresses class by class and image by image, which waits more often and takes longer.

    Args:
        dense: Predictions.
        size_hw: Size of each image in the network input, without padding; boxes are clipped to it.
        scale_hw: What to divide the boxes by: pixels of the network input per pixel of the result.
        spec: Thresholds.
        is_wanted: Images to look at; all unless given.

    Source: mmdet 3, which ranks pairs of location and class (not locations), and drops boxes without extent. Differs
    from it: the score of heads that tell centerness is multiplied with it before candidates are chosen, not after.
    """
    found = candidates(dense, size_hw, spec, is_wanted)
    found = replace(found, xyxy=found.xyxy / scale_hw.flip(-1).repeat(1, 2)[found.image])
    has_extent = (found.xyxy[:, 2:] > found.xyxy[:, :2]).all(dim=1)
    found = found[has_extent.nonzero().squeeze(1)]  # synchronises
    if spec.nms == "voting_cluster_diou":
        return _vote(found, len(size_hw), spec)
    group = found.image * dense.cls.shape[-1] + found.label
    found = found[group_nms(found.xyxy, found.score, group, spec.nms_iou)]
    return found[(rank_in_group(found.image) < spec.max_detections).nonzero().squeeze(1)]  # synchronises


def candidates(
    dense: Dense, size_hw: Int[Tensor, "B 2"], spec: PostprocessSpec, is_wanted: Bool[Tensor, " B"] | None = None
) -> Found:
    """Return the best pairs of location and class of each level above the threshold, with boxes in the network's input.

    Of equal scores, the finer level comes first, then the upper and the left location, then the lower class; which of
    those that tie for the last place of a level are taken is left to `topk`.

    Args:
        dense: Predictions.
        size_hw: Size of each image without padding; boxes are clipped to it.
        spec: Thresholds.
        is_wanted: Images to look at; all unless given.
    """
    score, place = best_pairs(dense.score, dense.locations.level_sizes, spec.candidates_per_level)
    is_candidate = score > spec.score_threshold
    if is_wanted is not None:
        is_candidate &= is_wanted[:, None]
    image, column = is_candidate.nonzero(as_tuple=True)  # synchronises
    score, place = score[image, column], place[image, column]
    order = place.argsort()
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[image[order].argsort(stable=True)]
    image, score, place = image[order], score[order], place[order]
    num_classes = dense.cls.shape[-1]
    row = place // num_classes
    ltrb = expected_distance(dense.edge[image, row])
    xyxy = decode_ltrb(dense.locations.xy[row], ltrb, dense.locations.stride[row])
    xyxy = torch.minimum(xyxy.clamp(min=0), size_hw.flip(-1).repeat(1, 2)[image])
    return Found(image, xyxy, score, place % num_classes)


def best_pairs(
    score: Float[Tensor, "B A C"], level_sizes: tuple[int, ...], count: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return score and place of the `count` best pairs of location and class of each level, in no order.

    A place is `location * num_classes + class`.
    """
    num_classes = score.shape[-1]
    scores, places, start = [], [], 0
    for of_level in torch.split(score, list(level_sizes), dim=1):
        flat = of_level.flatten(1)
        best = flat.topk(min(count, flat.shape[1]), dim=1, sorted=False)
        scores.append(best.values)
        places.append(best.indices + start * num_classes)
        start += of_level.shape[1]
    return torch.cat(scores, dim=1), torch.cat(places, dim=1)


def _vote(found: Found, num_images: int, spec: PostprocessSpec) -> Found:
    """Suppress and vote, image by image."""
    parts = []
    for image in range(num_images):
        one = found[(found.image == image).nonzero().squeeze(1)]
        xyxy, score, label = voting_cluster_diou_nms(
            one.xyxy, one.score, one.label, threshold=spec.nms_iou, limit=spec.max_detections
        )
        parts.append(Found(torch.full_like(label, image), xyxy, score, label))
    return Found(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))
