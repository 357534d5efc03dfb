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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image of a data set and its objects, before any transform.

    Attributes:
        image_id: The image's id in its annotation file, or its index where the format has none.
        file: Path of the image, or the name of a generated one.
        height: Pixels of the stored image.
        width: Pixels of the stored image.
        xyxy: Boxes in pixels of the stored image.
        label: Class index, 0-based.
        area: Area in square pixels that the evaluation bins by size (a mask's, where the format has one).
        is_crowd: True where the box covers a group or is to be ignored: never trained on, not counted in the
            evaluation.
        is_labelled: False for an image without annotations, of which only a teacher can say what is in it.
    """

    image_id: int
    file: str
    height: int
    width: int
    xyxy: Float32[np.ndarray, "G 4"]
    label: Int64[np.ndarray, " G"]
    area: Float32[np.ndarray, " G"]
    is_crowd: Bool[np.ndarray, " G"]
    is_labelled: bool = True


@dataclass(frozen=True, eq=False)
class Table:
    """Images and their objects as columns: some arrays, which may be mapped from a file, whatever the number of images.

    Image `i` has the objects from `first_object[i]` up to `first_object[i + 1]`, and its name is the bytes of `names`
    from `first_byte[i]` up to `first_byte[i + 1]`.

    Attributes:
        image_id: As in `Sample`, as are the columns that are not described here.
        height: Pixels.
        width: Pixels.
        is_labelled: False for an image without annotations.
        first_byte: Where names start; the end of the last name comes last.
        names: The images' files in UTF-8, without `prefix`.
        first_object: Where the images' objects start; the end of the last image's comes last.
        xyxy: Boxes in pixels of the stored image.
        label: Class index, 0-based.
        area: Square pixels.
        is_crowd: To be ignored.
        prefix: What all files start with: their folder and a separator, or nothing.
        reopen: Gives the same table to another process, which would else be sent a copy.
    """

    image_id: Int64[np.ndarray, " I"]
    height: Int64[np.ndarray, " I"]
    width: Int64[np.ndarray, " I"]
    is_labelled: Bool[np.ndarray, " I"]
    first_byte: Int64[np.ndarray, " I+1"]
    names: UInt8[np.ndarray, " M"]
    first_object: Int64[np.ndarray, " I+1"]
    xyxy: Float32[np.ndarray, "K 4"]
    label: Int64[np.ndarray, " K"]
    area: Float32[np.ndarray, " K"]
    is_crowd: Bool[np.ndarray, " K"]
    prefix: str = ""
    reopen: "Callable[[], Table] | None" = None

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 (as the base class)
        return (self.reopen, ()) if self.reopen else super().__reduce_ex__(protocol)


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Images of a table, each made into a `Sample` when it is asked for; `ldctl.data.table` builds them.

    Attributes:
        table: Where they are.
        rows: Which of them, in which order; some may be left out or be there twice.
        new_label: The class that each label of the table stands for; none where it is the same.
    """

    table: Table
    rows: Int64[np.ndarray, " S"]
    new_label: Int64[np.ndarray, " C"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Sample: ...
    @overload
    def __getitem__(self, position: slice) -> "Samples": ...
    def __getitem__(self, position: int | slice) -> "Sample | Samples":
        if isinstance(position, slice):
            return replace(self, rows=self.rows[position])
        table, row = self.table, int(self.rows[position])
        mine = slice(table.first_object[row], table.first_object[row + 1])
        return Sample(
            image_id=int(table.image_id[row]),
            file=self.file(position),
            height=int(table.height[row]),
            width=int(table.width[row]),
            xyxy=table.xyxy[mine],
            label=table.label[mine] if self.new_label is None else self.new_label[table.label[mine]],
            area=table.area[mine],
            is_crowd=table.is_crowd[mine],
            is_labelled=bool(table.is_labelled[row]),
        )

    def file(self, position: int) -> str:
        """Return the file of one image."""
        row = self.rows[position]
        name = self.table.names[self.table.first_byte[row] : self.table.first_byte[row + 1]]
        return self.table.prefix + name.tobytes().decode("utf-8", "surrogatepass")

    def take(self, positions: Int64[np.ndarray, " _"] | Bool[np.ndarray, " S"]) -> "Samples":
        """Return the images at some positions, or those where a mask is true."""
        return replace(self, rows=self.rows[positions])

    @property
    def width(self) -> Int64[np.ndarray, " S"]:
        """Return the width of each image."""
        return self.table.width.take(self.rows)

    @property
    def height(self) -> Int64[np.ndarray, " S"]:
        """Return the height of each image."""
        return self.table.height.take(self.rows)

    @property
    def is_labelled(self) -> Bool[np.ndarray, " S"]:
        """Return of each image whether it has annotations."""
        return self.table.is_labelled.take(self.rows)

    @property
    def num_objects(self) -> Int64[np.ndarray, " S"]:
        """Return the number of objects of each image, crowds included."""
        return np.diff(self.table.first_object).take(self.rows)


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set, and what was done about it.

    Attributes:
        file: The file in which it stands.
        item: Where in the file, such as `annotation 17 of 000000000009.jpg`; empty for the file as a whole.
        problem: What is wrong.
        action: What was done about it.
    """

    file: str
    item: str
    problem: str
    action: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.item}" if self.item else self.file
        return f"{where}: {self.problem}: {self.action}"


@dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
        name: What messages call it: the annotation file or folder.
        classes: Class names; a label indexes them.
        category_id: The id of each class in the annotation file; detections are written with it.
        samples: The images.
        read: Pixels of a sample, uint8 RGB; a `DataError` that names the file where it cannot be read.
        fingerprint: SHA-256 over everything that `samples` and `classes` hold.
        faults: What was found wrong while the annotations were read; the samples are already free of it.
        checked: Where it is remembered which image files were found sound; none: nowhere.
    """

    name: str
    classes: tuple[str, ...]
    category_id: tuple[int, ...]
    samples: Samples
    read: Callable[[Sample], UInt8[Tensor, "3 H W"]]
    fingerprint: str
    faults: tuple[Fault, ...] = ()
    checked: Path | None = None


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
    """

    images: UInt8[Tensor, "B 3 H W"]
    size_hw: Int[Tensor, "B 2"]
    original_hw: Int[Tensor, "B 2"]
    image_id: tuple[int, ...]
    targets: Targets
    for_teacher: Scaled | None = None
    is_labelled: Bool[Tensor, " B"] | None = None


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
