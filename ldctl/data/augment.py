"""Resize and flip: what the network sees of an image, as a pure function of `(sample, seed, epoch, index)`."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from ldctl.data.formats import DataSpec
from ldctl.samples import Sample


@dataclass(frozen=True)
class View:
    """How an image is shown.

    Attributes:
        height: Pixels after resizing.
        width: Pixels after resizing.
        is_flipped: Mirrored left to right, after resizing.
    """

    height: int
    width: int
    is_flipped: bool


@dataclass(frozen=True)
class Objects:
    """Boxes to train on, in pixels of the network input.

    Attributes:
        xyxy: Inside the image, with area.
        label: Class index.
    """

    xyxy: Float32[np.ndarray, "G 4"]
    label: Int64[np.ndarray, " G"]


def resize_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Return height and width after resizing: as large as both limits allow, keeping the ratio.

    The scale is `min(long_side / long, short_side / short)` and a side becomes `int(side * scale + 0.5)`, at least 1.

    Args:
        height: Pixels, positive.
        width: Pixels, positive.
        short_side: Most pixels of the shorter side.
        long_side: Most pixels of the longer side.

    Source: OpenMMLab's keep-ratio resize, which the reference trains with.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def train_view(sample: Sample, spec: DataSpec, seed: int, epoch: int, index: int) -> View:
    """Draw the view of an image in an epoch; reads no pixels.

    Args:
        sample: The image.
        spec: Range of the short side, long side, probability of a flip.
        seed: The run's.
        epoch: Counted from 0.
        index: Position of the sample in its data set.
    """
    rng = np.random.default_rng((seed, epoch, index))
    low, high = spec.short_side
    height, width = resize_size(sample.height, sample.width, int(rng.integers(low, high + 1)), spec.long_side)
    return View(height, width, is_flipped=bool(rng.random() < spec.flip))


def eval_view(sample: Sample, spec: DataSpec) -> View:
    """Return the view of an image in evaluation: the upper end of the short side, not flipped."""
    height, width = resize_size(sample.height, sample.width, spec.short_side[1], spec.long_side)
    return View(height, width, is_flipped=False)


def fixed_view(sample: Sample, spec: DataSpec, is_flipped: bool) -> View:
    """Return one of the two views that an image can have in training at one scale."""
    return replace(eval_view(sample, spec), is_flipped=is_flipped)


def canvas(sample: Sample, spec: DataSpec) -> View:
    """Return a view that holds each that a wide image can have, or each of any other, as the image is."""
    short_side, long_side = spec.short_side[1], spec.long_side
    is_wide = sample.width > sample.height
    return View(*((short_side, long_side) if is_wide else (long_side, short_side)), is_flipped=False)


def scaled(view: View, scale: float) -> View:
    """Return the view of the same image with its sides times `scale`, rounded, at least 1."""
    height, width = (max(int(side * scale + 0.5), 1) for side in (view.height, view.width))
    return View(height, width, view.is_flipped)


def show(image: UInt8[Tensor, "3 H W"], view: View) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of a view.

    Bilinear between pixel centres, without a filter against aliasing, rounded to whole grey levels: as OpenCV
    resizes, which the reference and its published weights use.
    """
    size = (view.height, view.width)
    if image.shape[1:] != size:
        image = functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return image.flip(-1) if view.is_flipped else image


def place(sample: Sample, view: View) -> Objects:
    """Return the boxes of a view: scaled per axis, clipped, mirrored; no crowds, nothing that clipping made empty."""
    scale_x, scale_y = view.width / sample.width, view.height / sample.height
    xyxy = sample.xyxy * np.array((scale_x, scale_y, scale_x, scale_y), dtype=np.float32)
    xyxy = xyxy.clip(0, np.array((view.width, view.height, view.width, view.height), dtype=np.float32))
    if view.is_flipped:
        xyxy = np.stack((view.width - xyxy[:, 2], xyxy[:, 1], view.width - xyxy[:, 0], xyxy[:, 3]), axis=1)
    keep: Bool[np.ndarray, " G"] = (xyxy[:, :2] < xyxy[:, 2:]).all(axis=1) & ~sample.is_crowd
    return Objects(xyxy=xyxy[keep].astype(np.float32), label=sample.label[keep])
