"""A generated data set: nothing to download, and edges that are as hard to place as those of photographs.

Localization Distillation passes on how sure a teacher is of each edge, so a data set of crisp shapes would leave it
nothing to say. Here an object's outline fades over a different width on each of its sides, objects hide one another,
and shadows and seams look like edges. The box is always the exact one of the sharp, whole shape, clipped to the image.
"""

import functools
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from pydantic import Field
from torch import Tensor

from ldctl.data.table import pack
from ldctl.samples import Dataset, Sample
from ldctl.schema import Spec

CLASSES = ("disc", "box", "triangle", "cross")
_DISC, _BOX, _TRIANGLE, _CROSS = range(len(CLASSES))

# Enters the fingerprint: raise it with every change that moves a pixel or a box.
_VERSION = 1
_SMALLEST_PX = 12.0
# Longest side of the largest object over the image's: 100 px of 160.
_LARGEST = 0.625
_MOST_OBJECTS = 6
# Half width of a cross's arms over its half axis.
_ARM = 0.38
# A box may reach this share of its sides beyond the image's border.
_OVERHANG = 0.25
# Two boxes may share at most this much of the smaller one; a shape of which less than a quarter shows is not drawn.
_OVERLAP = 0.4
_LEAST_VISIBLE = 0.25
# The widest penumbra reaches this share of the way from the outline to the shape's middle.
_SOFTEST = 0.8
_TURN = math.radians(20)

Array = np.ndarray
Point = tuple[float, float]


class SyntheticSpec(Spec):
    """What to generate. The same values always give the same images.

    Attributes:
        train: Images to train on.
        val: Images to evaluate on; none of them is among the training images.
        size: Side of the square images, pixels.
        seed: Another seed, another data set.
    """

    train: int = Field(default=1200, ge=1)
    val: int = Field(default=300, ge=1)
    size: int = Field(default=160, ge=64, le=320)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Shape:
    """A sharp shape in the plane.

    Attributes:
        label: Index into `CLASSES`.
        x: Middle, pixels.
        y: Middle, pixels.
        half: Half axes in the shape's own frame, pixels.
        angle: Turn of that frame, radians.
    """

    label: int
    x: float
    y: float
    half: Point
    angle: float


def synthetic_dataset(spec: SyntheticSpec, split: Literal["train", "val"]) -> Dataset:
    """Describe one split; the pixels are rendered when they are read.

    Returns:
        1 to 6 objects in nearly every image; `area` is the box's.
    """
    count = spec.train if split == "train" else spec.val
    identity = f"{_VERSION} {split} {count} {spec.model_dump_json(exclude={'train', 'val'})}"
    return Dataset(
        name=f"synthetic {split}",
        classes=CLASSES,
        category_id=tuple(range(1, len(CLASSES) + 1)),
        samples=pack(_sample(spec, split, index) for index in range(count)),
        read=Reader(spec, split),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


@dataclass(frozen=True)
class Reader:
    """Render the image of a sample: a pure function of the spec's seed and size, the split and the image's index."""

    spec: SyntheticSpec
    split: Literal["train", "val"]

    def __call__(self, sample: Sample) -> UInt8[Tensor, "3 H W"]:
        """Give the pixels, from memory where this process rendered them before."""
        # A copy: a caller that writes into the image must not change the next epoch's.
        return torch.from_numpy(_image(self.spec.seed, self.split, sample.image_id, self.spec.size).copy())


def _sample(spec: SyntheticSpec, split: str, index: int) -> Sample:
    shapes = _layout(_generator(spec.seed, split, index, "layout"), spec.size)
    boxes = np.array([bounds(shape) for shape in shapes], dtype=np.float32).reshape(-1, 4).clip(0, spec.size)
    return Sample(
        image_id=index,
        file=f"synthetic/{split}/{index:06d}",
        height=spec.size,
        width=spec.size,
        xyxy=boxes,
        label=np.array([shape.label for shape in shapes], dtype=np.int64),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        is_crowd=np.zeros(len(shapes), dtype=np.bool_),
    )


# The default data set whole: 115 MB at 160 px in each process that reads it, 630 MB at the largest size.
@functools.lru_cache(maxsize=2048)
def _image(seed: int, split: str, index: int, size: int) -> UInt8[Array, "3 H W"]:
    shapes = _layout(_generator(seed, split, index, "layout"), size)
    return _render(_generator(seed, split, index, "pixels"), shapes, size)


def _generator(seed: int, split: str, index: int, purpose: Literal["layout", "pixels"]) -> np.random.Generator:
    return np.random.default_rng((seed, ("train", "val").index(split), index, ("layout", "pixels").index(purpose)))


# --- where the objects are ------------------------------------------------------------------------------------------


def bounds(shape: Shape) -> tuple[float, float, float, float]:
    """Give the tight box of a shape: left, top, right, bottom in pixels, not clipped to the image."""
    (a, b), cos, sin = shape.half, math.cos(shape.angle), math.sin(shape.angle)
    if shape.label == _DISC:
        reach_x, reach_y = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        return shape.x - reach_x, shape.y - reach_y, shape.x + reach_x, shape.y + reach_y
    corners = _corners(shape)
    xs = [shape.x + u * cos - v * sin for u, v in corners]
    ys = [shape.y + u * sin + v * cos for u, v in corners]
    return min(xs), min(ys), max(xs), max(ys)


def distance(shape: Shape, x: Float32[Array, "..."], y: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Tell how far points lie outside a shape.

    Returns:
        Pixels, negative inside; zero exactly on the outline, and near it the distance to the nearest straight piece.
    """
    (a, b), cos, sin = shape.half, math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = x - shape.x, y - shape.y
    u, v = np.abs(dx * cos + dy * sin), dy * cos - dx * sin
    if shape.label == _TRIANGLE:  # apex at (0, -b), base from (-a, b) to (a, b)
        slope = math.hypot(2 * b, a)
        return np.maximum(v - b, u * (2 * b / slope) - (v + b) * (a / slope))
    v = np.abs(v)
    if shape.label == _DISC:  # first-order distance to an ellipse: f / |grad f| of f = |p / half| - 1
        u, v = u * (1 / a), v * (1 / b)
        square = u * u + v * v
        u, v = u * (1 / a), v * (1 / b)
        return (square - np.sqrt(square)) / np.sqrt(u * u + v * v + np.float32(1e-12))
    if shape.label == _BOX:
        return np.maximum(u - a, v - b)
    return np.minimum(np.maximum(u - a, v - _ARM * b), np.maximum(u - _ARM * a, v - b))


def _corners(shape: Shape) -> tuple[Point, ...]:
    a, b = shape.half
    if shape.label == _TRIANGLE:
        return (0.0, -b), (-a, b), (a, b)
    pairs = ((a, b),) if shape.label == _BOX else ((a, _ARM * b), (_ARM * a, b))
    return tuple((su * u, sv * v) for u, v in pairs for su in (-1, 1) for sv in (-1, 1))


def _inradius(shape: Shape) -> float:
    a, b = shape.half
    if shape.label == _TRIANGLE:
        return 2 * a * b / (a + math.hypot(a, 2 * b))  # twice the area over the perimeter
    return min(a, b) * (_ARM if shape.label == _CROSS else 1.0)


def _layout(rng: np.random.Generator, size: int) -> list[Shape]:
    """Place the shapes of an image, lowest first; each shows at least a quarter of itself."""
    shapes: list[Shape] = []
    for _ in range(rng.integers(1, _MOST_OBJECTS + 1)):
        shape = _place(rng, size, shapes)
        if shape is not None:
            shapes.append(shape)
    # Leaving one out only uncovers others, so a single pass is enough.
    return [shape for rank, shape in enumerate(shapes) if _visible(shape, shapes[rank + 1 :], size) >= _LEAST_VISIBLE]


def _place(rng: np.random.Generator, size: int, others: list[Shape]) -> Shape | None:
    """Draw a shape and look for room; None where there is none."""
    label = int(rng.integers(len(CLASSES)))
    angle = float(rng.integers(4) * (math.pi / 2) + rng.uniform(-_TURN, _TURN))
    longest = float(np.exp(rng.uniform(math.log(_SMALLEST_PX), math.log(_LARGEST * size))))
    aspect = float(np.exp(rng.uniform(-0.4, 0.4)))
    unit = Shape(label, 0.0, 0.0, (1.0, aspect), angle)
    left, top, right, bottom = bounds(unit)
    scale = longest / max(right - left, bottom - top)
    width, height = (right - left) * scale, (bottom - top) * scale
    for _ in range(8):
        x = -left * scale - _OVERHANG * width + rng.random() * (size - (1 - 2 * _OVERHANG) * width)
        y = -top * scale - _OVERHANG * height + rng.random() * (size - (1 - 2 * _OVERHANG) * height)
        shape = Shape(label, x, y, (scale, scale * aspect), angle)
        if all(_shared(bounds(shape), bounds(other)) <= _OVERLAP for other in others):
            return shape
    return None


def _shared(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Give the intersection of two boxes as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0.0) * max(height, 0.0) / area


def _visible(shape: Shape, above: list[Shape], size: int) -> float:
    """Give the share of a shape that lies in the image and under no other, from 12 x 12 points of its box."""
    left, top, right, bottom = box = bounds(shape)
    covers = [other for other in above if _shared(box, bounds(other)) > 0]
    if not covers and min(left, top) >= 0 and max(right, bottom) <= size:
        return 1.0
    at = (np.arange(12, dtype=np.float32) + np.float32(0.5)) / 12
    x, y = left + at[None, :] * (right - left), top + at[:, None] * (bottom - top)
    inside = distance(shape, x, y) < 0
    is_shown = inside & (x > 0) & (x < size) & (y > 0) & (y < size)
    for other in covers:
        is_shown &= distance(other, x, y) > 0
    return float(is_shown.sum() / inside.sum())


# --- pixels ---------------------------------------------------------------------------------------------------------


def coverage(
    shape: Shape, x: Float32[Array, "1 W"], y: Float32[Array, "H 1"], soft: Float[Array, "4"]
) -> Float32[Array, "H W"]:
    """Tell how much of a shape shows at pixels: 1 inside, 0 outside, 1/2 on the outline.

    Args:
        shape: The sharp shape.
        x: Columns, pixels.
        y: Rows, pixels.
        soft: Half width of the penumbra on the left, top, right and bottom side, pixels, positive; blended in between.
    """
    dx, dy = x - np.float32(shape.x), y - np.float32(shape.y)
    left, top, right, bottom = soft.astype(np.float32)
    ax, ay = np.abs(dx), np.abs(dy)
    width = (ax * np.where(dx < 0, left, right) + ay * np.where(dy < 0, top, bottom)) / (ax + ay + np.float32(1e-3))
    t = np.clip(0.5 - distance(shape, x, y) / (2 * width + np.float32(1e-3)), 0, 1)
    share: Array = t * t * (3 - 2 * t)
    return share


def _render(rng: np.random.Generator, shapes: list[Shape], size: int) -> UInt8[Array, "3 H W"]:
    """Paint background, distractors, the shapes with their shadows, cast shadows and sensor noise, in this order."""
    base = rng.uniform(50, 205, 3).astype(np.float32)
    strength = rng.uniform(10, 35)
    grey = _texture(rng, size, planes=1, cells=size // 5) * rng.uniform(3, 18)
    grey += _texture(rng, size, planes=1, cells=6) * strength
    canvas = _texture(rng, size, planes=3, cells=6) * (0.4 * strength) + grey
    canvas += base[:, None, None]
    for _ in range(rng.integers(0, 4)):
        _add(canvas, _seam(rng, size), _colour_step(rng, base, rng.uniform(15, 60)))
    for _ in range(rng.integers(0, 3)):
        _add(canvas, _arc(rng, size), _colour_step(rng, base, rng.uniform(15, 100)))
    light = rng.uniform(0, 2 * math.pi)
    for shape in shapes:
        _paint(rng, canvas, shape, base, light)
    for _ in range(rng.integers(0, 3)):
        canvas *= 1 - _seam(rng, size) * np.float32(rng.uniform(0.15, 0.45))
    canvas += (rng.random((1, size, size), dtype=np.float32) - 0.5) * rng.uniform(4, 24)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _add(canvas: Float32[Array, "3 H W"], amount: Float32[Array, "H W"], colour: Float32[Array, "3"]) -> None:
    """Add a colour in place, plane by plane: three small temporaries are cheaper than a large one."""
    for plane, value in zip(canvas, colour, strict=True):
        plane += amount * value


def _paint(rng: np.random.Generator, canvas: Float32[Array, "3 H W"], shape: Shape, base: Array, light: float) -> None:
    """Paint one shape and the shadow it throws, in place."""
    left, top, right, bottom = bounds(shape)
    longest = max(right - left, bottom - top)
    inradius = _inradius(shape)
    # Squared: most sides are fairly crisp, some hardly an edge at all.
    soft = 0.5 + rng.random(4) ** 2 * (_SOFTEST * inradius)
    if rng.random() < 0.6:
        reach = longest * rng.uniform(0.05, 0.2)
        blur = np.full(4, rng.uniform(0.1, 0.8) * inradius + 0.5)
        moved = replace(shape, x=shape.x + reach * math.cos(light), y=shape.y + reach * math.sin(light))
        window, x, y = _window(bounds(moved), blur.max(), canvas.shape[1])
        canvas[window] *= 1 - coverage(moved, x, y, blur) * np.float32(rng.uniform(0.2, 0.6))
    window, x, y = _window((left, top, right, bottom), soft.max(), canvas.shape[1])
    first = base + _colour_step(rng, base, rng.uniform(60, 160))
    step = _colour_step(rng, first, rng.uniform(0, 60))
    alpha, pattern = coverage(shape, x, y, soft), _pattern(rng, shape, x, y, longest)
    for plane, middle, swing in zip(canvas[window], first, step, strict=True):
        plane += alpha * (pattern * swing + middle - plane)


def _window(
    box: tuple[float, float, float, float], margin: float, size: int
) -> tuple[tuple[slice, slice, slice], Float32[Array, "1 W"], Float32[Array, "H 1"]]:
    """Give the part of the canvas that a box and a margin reach, and the middles of its columns and rows."""
    left, top = (max(int(edge - margin), 0) for edge in box[:2])
    right, bottom = (min(int(edge + margin) + 1, size) for edge in box[2:])
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5)
    return (slice(None), slice(top, bottom), slice(left, right)), x, y


def _pattern(
    rng: np.random.Generator, shape: Shape, x: Float32[Array, "1 W"], y: Float32[Array, "H 1"], longest: float
) -> Float32[Array, "H W"]:
    """Give a fill in [-1, 1] around the shape: stripes, checks or cloud; no hint at the class."""
    kind = rng.integers(3)
    angle, period = rng.uniform(0, 2 * math.pi), max(longest * rng.uniform(0.15, 0.6), 4.0)
    across = ((x - shape.x) * math.cos(angle) + (y - shape.y) * math.sin(angle)) * np.float32(2 * math.pi / period)
    along = ((y - shape.y) * math.cos(angle) - (x - shape.x) * math.sin(angle)) * np.float32(2 * math.pi / period)
    fill: Array
    if kind == 0:
        fill = np.sin(across)
    elif kind == 1:
        fill = np.clip(3 * np.sin(across) * np.sin(along), -1, 1)
    else:
        fill = np.sin(across * 0.5 + 2 * np.sin(along * 0.37)) * np.cos(along * 0.71)
    return fill


def _seam(rng: np.random.Generator, size: int) -> Float32[Array, "H W"]:
    """Give a half plane or a band in [0, 1] with soft borders: an edge that belongs to no object."""
    angle, soft, band = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.06 * size), rng.uniform(0.05, 0.3) * size
    x, y = (np.arange(size, dtype=np.float32) - rng.uniform(0.1, 0.9) * size for _ in range(2))
    across = x[None, :] * math.cos(angle) + y[:, None] * math.sin(angle)
    edge = across if rng.random() < 0.5 else np.abs(across) - band
    return np.clip(0.5 - edge / (2 * soft), 0, 1)


def _arc(rng: np.random.Generator, size: int) -> Float32[Array, "H W"]:
    """Give a line of a few pixels in [0, 1], on a circle that may be larger than the image."""
    radius, thickness = rng.uniform(0.15, 1.2) * size, rng.uniform(0.5, 0.015 * size)
    x, y = (np.arange(size, dtype=np.float32) - rng.uniform(-0.3, 1.3) * size for _ in range(2))
    gap = np.abs(np.sqrt((x * x)[None, :] + (y * y)[:, None]) - radius)
    line: Array = np.clip(thickness + 0.5 - gap, 0, 1)
    return line


def _colour_step(rng: np.random.Generator, colour: Float32[Array, "3"], length: float) -> Float32[Array, "3"]:
    """Draw a step of a given length in RGB that stays within 0..255 where it can."""
    step = rng.standard_normal(3)
    step *= length / math.hypot(*step.tolist())
    step[(colour + step < 0) | (colour + step > 255)] *= -1
    return step.astype(np.float32)


def _texture(rng: np.random.Generator, size: int, *, planes: int, cells: int) -> Float32[Array, "planes H W"]:
    """Give smooth noise of about unit height, `cells` lumps across the image."""
    spread = _interpolation(cells, size)
    noise: Array = spread @ rng.standard_normal((planes, cells, cells), dtype=np.float32) @ spread.T
    return noise


@functools.lru_cache(maxsize=8)
def _interpolation(cells: int, size: int) -> Float32[Array, "size cells"]:
    """Give the matrix that stretches `cells` values to `size` linearly."""
    at = np.linspace(0, cells - 1, size)
    matrix: Array = np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, 1).astype(np.float32)
    return matrix
