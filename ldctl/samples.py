"""What a data set is made of: images and their objects, kept as columns, and what is wrong with them.

Shape letters beside those of `types.py`:

| letter | meaning |
| --- | --- |
| `I` | images of a table |
| `K` | objects of all its images |
| `M` | bytes of all its names |
| `S` | images that are looked at, rows of a table each |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
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
