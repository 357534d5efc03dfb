"""What flows through a step: frozen dataclasses of tensors.

Shape letters, used in every signature:

| letter | meaning |
| --- | --- |
| `B` | images of a batch |
| `A` | locations of an image, all pyramid levels concatenated, finest first, row-major in a level; a cell of a map that
| | has several prior boxes has as many, next to each other |
| `G` | objects of an image, padded to the most of any image in the batch |
| `C` | classes |
| `R` | bins of an edge distribution, `reg_max + 1` |
| `N` | selected rows, a location of an image each |
| `H W` | pixels |

Boxes are `xyxy` (left, top, right, bottom; pixels) or `ltrb` (distances from a location to the four edges; stride
units).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor

Rule = Literal["atss", "fcos", "retina"]  # whose rule tells which location answers for which object


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, padded to the same count.

    Attributes:
        gt_xyxy: Pixels of the network input; zeros where padded.
        gt_label: Class index; zero where padded.
        is_object: False where padded.
    """

    gt_xyxy: Float[Tensor, "B G 4"]
    gt_label: Int[Tensor, "B G"]
    is_object: Bool[Tensor, "B G"]


@dataclass(frozen=True)
class Scaled:
    """The images of a batch at another scale, each resized from its stored image by itself.

    Attributes:
        images: RGB, padded like the batch's, but for the scale.
        size_hw: Height and width of each image in `images`, without padding.
    """

    images: UInt8[Tensor, "B 3 h w"]
    size_hw: Int[Tensor, "B 2"]


@dataclass(frozen=True)
class TeacherRows:
    """What a teacher said of some locations of a batch's images, computed before.

    Attributes:
        edge_row: `image * num_locations + location`, ascending.
        edge: Logits of the edge distributions there.
        cls_row: The same for classes.
        cls: Class logits there.
        quality: See `Dense`; where the class logits are.
        counts: For each image the number of rows with edges, and of those with classes.
        num_locations: Locations of each image.
        offset: Of the teacher's locations; see `Locations`.
        edge_regions: Where all edges are told.
        cls_regions: Where all classes are told.
    """

    edge_row: Int[Tensor, " N"]
    edge: Float[Tensor, "N 4 R"]
    cls_row: Int[Tensor, " M"]
    cls: Float[Tensor, "M C"]
    quality: Float[Tensor, " M"] | None
    counts: tuple[tuple[int, int], ...]
    num_locations: int
    offset: float
    edge_regions: tuple[str, ...]
    cls_regions: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Images as the loader yields them, and their objects.

    Attributes:
        images: RGB, padded right and below to a common multiple of 32.
        size_hw: Height and width of each image in `images`, without padding.
        original_hw: Height and width of the stored image; detections are scaled back to it.
        image_id: The images' ids in their annotation file.
        targets: Objects to train on, without crowds. No objects (`G == 0`) in evaluation batches.
        for_teacher: The same views for a teacher that looks at another scale.
        is_labelled: False for images without annotations; none where the whole data set has annotations.
        taught: What a teacher said of the same views, where that was computed before.
    """

    images: UInt8[Tensor, "B 3 H W"]
    size_hw: Int[Tensor, "B 2"]
    original_hw: Int[Tensor, "B 2"]
    image_id: tuple[int, ...]
    targets: Targets
    for_teacher: Scaled | None = None
    is_labelled: Bool[Tensor, " B"] | None = None
    taught: TeacherRows | None = None


@dataclass(frozen=True)
class Locations:
    """Where the predictions of an image sit, all levels concatenated.

    Attributes:
        xy: Location in pixels of the network input: column and row, plus the offset, times the stride.
        stride: Pixels between neighbours of the location's level.
        level: 0 for the finest.
        level_hw: Rows and columns of each level's cells; their products, times the prior boxes, sum to `A`. None where
            these are picked from a grid.
        level_stride: Stride of each level in pixels.
        offset: Of locations from the corner of their cells, in strides: 0, or 0.5 for their centres.
        prior_wh: Width and height of each of a cell's prior boxes, strides; each has a location of its own.
    """

    xy: Float[Tensor, "A 2"]
    stride: Float[Tensor, " A"]
    level: Int[Tensor, " A"]
    level_hw: tuple[tuple[int, int], ...]
    level_stride: tuple[int, ...]
    offset: float
    prior_wh: tuple[tuple[float, float], ...]

    @property
    def num_priors(self) -> int:
        """Return the number of locations of each cell."""
        return len(self.prior_wh)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Return the number of locations of each level."""
        return tuple(height * width * self.num_priors for height, width in self.level_hw)

    def at(self, index: Int[Tensor, " N"]) -> "Locations":
        """Return some of the locations, which make no grid."""
        return replace(self, xy=self.xy[index], stride=self.stride[index], level=self.level[index], level_hw=())


def joint_logit(cls: Float[Tensor, "*#S"], quality: Float[Tensor, "*#S"]) -> Float[Tensor, "*S"]:
    """Return the logit of `sigmoid(cls) * sigmoid(quality)`; shapes broadcast.

    With it the losses of single logits serve for products too: no probability is rounded to 0 or 1 on the way.
    """
    # odds against the product: (1 + e^-c) (1 + e^-q) - 1
    return -torch.logaddexp(torch.logaddexp(-cls, -quality), -cls - quality)


@dataclass(frozen=True)
class TowerMaps:
    """Maps inside the two towers of a head, finest first, before the activation that follows them.

    Attributes:
        cls: Of the tower that tells classes.
        edge: Of the tower that tells boxes.
    """

    cls: tuple[Float[Tensor, "B _ _ _"], ...]
    edge: tuple[Float[Tensor, "B _ _ _"], ...]


@dataclass(frozen=True)
class Dense:
    """What a detector says of every location.

    Attributes:
        cls: Class logits.
        edge: Logits of the edge distributions, edges in the order left, top, right, bottom; always float32.
        features: Pyramid maps that the head read, finest first.
        towers: Maps inside the head's towers, where it was asked to be cut; the pyramid maps themselves at cut 0.
        locations: Where the rows sit.
        quality: Logit of how good the location's box is, whatever its class; none where the class logits tell it alone.
    """

    cls: Float[Tensor, "B A C"]
    edge: Float32[Tensor, "B A 4 R"]
    features: tuple[Float[Tensor, "B _ _ _"], ...]
    towers: TowerMaps
    locations: Locations
    quality: Float[Tensor, "B A"] | None = None

    def at(self, rows: Sequence[Int[Tensor, " _"]]) -> list["Dense"]:
        """Return the predictions at several sets of locations, each as those of one image without maps.

        They are gathered together, since each gathering makes a gradient as large as all predictions.

        Args:
            rows: `image * A + location` each.
        """
        sizes, row = [len(each) for each in rows], torch.cat(list(rows))
        cls = torch.split(self.cls.flatten(0, 1).index_select(0, row)[None], sizes, dim=1)
        edge = torch.split(self.edge.flatten(0, 1).index_select(0, row)[None], sizes, dim=1)
        quality: Sequence[Tensor | None] = [None] * len(sizes)
        if self.quality is not None:
            quality = torch.split(self.quality.flatten().index_select(0, row)[None], sizes, dim=1)
        locations = [self.locations.at(each % self.cls.shape[1]) for each in rows]
        return [
            Dense(cls=c, edge=e, features=(), towers=TowerMaps((), ()), locations=at, quality=q)
            for c, e, at, q in zip(cls, edge, locations, quality, strict=True)
        ]

    @property
    def score(self) -> Float32[Tensor, "B A C"]:
        """Return the score of each class in [0, 1]: `sigmoid(cls)`, times `sigmoid(quality)` where the head tells it.

        Everything that ranks or weighs locations by score means this one.
        """
        score = self.cls.float().sigmoid()
        return score if self.quality is None else score * self.quality.float().sigmoid()[..., None]

    @property
    def score_logit(self) -> Float32[Tensor, "B A C"]:
        """Return the logit of `score`."""
        cls = self.cls.float()
        return cls if self.quality is None else joint_logit(cls, self.quality.float()[..., None])

    @property
    def best_score(self) -> Float32[Tensor, "B A"]:
        """Return the score of each location's best class."""
        return replace(self, cls=self.cls.amax(dim=-1, keepdim=True)).score.squeeze(-1)


@dataclass(frozen=True)
class Assigned:
    """Which location answers for which object.

    Attributes:
        label: Class of the location's object; `num_classes` where it has none.
        gt_xyxy: Box of the location's object, pixels; zeros where it has none.
        is_positive: True where the location answers for an object.
        is_valid: False for locations beyond the image's own padding: they take part in nothing.
        is_ignored: True where the rule leaves open whether a location is background: no class loss looks there.
        threshold: Each object's positive IoU threshold; infinite for padded objects.
    """

    label: Int[Tensor, "B A"]
    gt_xyxy: Float[Tensor, "B A 4"]
    is_positive: Bool[Tensor, "B A"]
    is_valid: Bool[Tensor, "B A"]
    is_ignored: Bool[Tensor, "B A"]
    threshold: Float[Tensor, "B G"]


@dataclass(frozen=True)
class Where:
    """The locations that a loss looks at: rows of the batch's flattened `B * A` locations.

    Attributes:
        row: `image * A + location`, ascending; or all of them, as a slice.
        weight: How much each row counts in a localization loss, in [0, 1]; detached.
        level: Pyramid level of each row.
        image: Image of each row.
        num_images: Images of the batch, those without rows included.
        num_levels: Pyramid levels, those without rows included.
    """

    row: Int[Tensor, " N"] | slice
    weight: Float[Tensor, " N"]
    level: Int[Tensor, " N"]
    image: Int[Tensor, " N"]
    num_images: int
    num_levels: int

    @property
    def picked(self) -> Int[Tensor, " N"]:
        """Return the rows of a region that is not all."""
        assert isinstance(self.row, Tensor), "the region was picked"
        return self.row


@dataclass(frozen=True)
class Normalizer:
    """What losses are divided by.

    Attributes:
        kind: `"reference"` keeps the sums of the released LD code, which grow with the images per rank; `"synced"` does
            not depend on how a batch is split over ranks, and equals the reference at its 8 ranks of 2 images.
        num_positive: Positives, at least one counted per image; averaged over ranks.
        weight_sum: Sum of the weights of the positives, kept off zero; averaged over ranks.
    """

    kind: Literal["synced", "reference"]
    num_positive: Float[Tensor, ""]
    weight_sum: Float[Tensor, ""]


@dataclass(frozen=True)
class Pair:
    """What a distillation term compares: two detectors' outputs on one batch.

    Attributes:
        student: The student's outputs; its features and towers are as wide as the teacher's, by an adapter if need be.
        teacher: The teacher's outputs, without gradient.
        crossed: What the rest of the teacher's head makes of the student's tower maps, with gradient to those; given
            when a term asks for it.
    """

    student: Dense
    teacher: Dense
    crossed: Dense | None = None


@dataclass(frozen=True)
class Detections:
    """Final boxes of one image, best first.

    Attributes:
        image_id: The image's id in its annotation file.
        xyxy: Pixels of the stored image.
        score: In (0, 1).
        label: Class index.
    """

    image_id: int
    xyxy: Float[Tensor, "N 4"]
    score: Float[Tensor, " N"]
    label: Int[Tensor, " N"]
