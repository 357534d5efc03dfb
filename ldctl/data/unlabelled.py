"""Images without annotations, for a student to learn from its teacher on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from ldctl.data.images import SUFFIXES, Header, read_header, read_sample
from ldctl.data.raw import SMALLEST_SIDE
from ldctl.data.table import fingerprint, joined, pack
from ldctl.errors import DataError
from ldctl.samples import Dataset, Fault, Sample, Samples

_THREADS = 16  # waiting for files, not computing


def read_unlabelled(folder: Path, like: Dataset) -> Dataset:
    """List the images in a folder and the folders below it; an image's id is its position among the sorted files.

    Images that cannot be read, or with a side under 32 px, are left out and named in the result's `faults`.

    Args:
        folder: Any annotations in it are passed over.
        like: Whose classes the result is said to have.

    Raises:
        DataError: There is no such folder, or no usable image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: name a folder of images with data.unlabelled, or leave it out")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(_usable_header, files))
    faults = tuple(
        Fault(str(file), "", header, "image skipped")
        for file, header in zip(files, headers, strict=True)
        if isinstance(header, str)
    )
    samples = pack(
        _sample(index, file, header)
        for index, (file, header) in enumerate(zip(files, headers, strict=True))
        if not isinstance(header, str)
    )
    if not samples:
        found = f"the first of {len(faults)} faults is {faults[0]}" if faults else f"looked for {', '.join(SUFFIXES)}"
        raise DataError(f"{folder}: no image to learn from: {found}: see data.unlabelled")
    return Dataset(
        name=str(folder),
        classes=like.classes,
        category_id=like.category_id,
        samples=samples,
        read=read_sample,
        fingerprint=fingerprint(like.classes, like.category_id, samples),
        faults=faults,
    )


def join(labelled: Dataset, unlabelled: Dataset) -> Dataset:
    """Return a data set of the images of both: the labelled ones first, each once."""
    is_plain = labelled.read is unlabelled.read
    return with_samples(
        replace(
            labelled,
            name=f"{labelled.name} and {unlabelled.name}",
            read=labelled.read if is_plain else ReadEither(labelled.read, unlabelled.read),
            faults=labelled.faults + unlabelled.faults,
        ),
        joined(labelled.samples, unlabelled.samples),
    )


def only_labelled(dataset: Dataset) -> Dataset:
    """Return the data set without its unlabelled images; itself where it has none."""
    is_labelled = dataset.samples.is_labelled
    return dataset if is_labelled.all() else with_samples(dataset, dataset.samples.take(is_labelled))


def as_many_labelled(dataset: Dataset) -> Dataset:
    """Return as many images, all of them labelled: each is there about equally often, and seen anew each time."""
    labelled = only_labelled(dataset)
    if labelled is dataset:
        return dataset
    again = np.arange(len(dataset.samples)) % len(labelled.samples)
    return with_samples(labelled, labelled.samples.take(again))


def with_samples(dataset: Dataset, samples: Samples) -> Dataset:
    """Return the data set with other images, and its fingerprint with them."""
    mark = fingerprint(dataset.classes, dataset.category_id, samples)
    return replace(dataset, samples=samples, fingerprint=mark)


@dataclass(frozen=True)
class ReadEither:
    """Read labelled images in one way and the others in another; an object, so that it can be sent to a process."""

    labelled: Callable[[Sample], UInt8[Tensor, "3 H W"]]
    unlabelled: Callable[[Sample], UInt8[Tensor, "3 H W"]]

    def __call__(self, sample: Sample) -> UInt8[Tensor, "3 H W"]:
        """Return the pixels of a sample."""
        return self.labelled(sample) if sample.is_labelled else self.unlabelled(sample)


def _usable_header(file: Path) -> Header | str:
    """Return an image's header, or why the image is of no use."""
    try:
        header = read_header(file)
    except DataError as error:
        return str(error).removeprefix(f"{file}: ")
    if min(header.upright_hw) < SMALLEST_SIDE:
        return f"a side is under {SMALLEST_SIDE} px"
    return header


def _sample(index: int, file: Path, header: Header) -> Sample:
    height, width = header.upright_hw
    return Sample(
        image_id=index,
        file=str(file),
        height=height,
        width=width,
        xyxy=np.zeros((0, 4), dtype=np.float32),
        label=np.zeros(0, dtype=np.int64),
        area=np.zeros(0, dtype=np.float32),
        is_crowd=np.zeros(0, dtype=np.bool_),
        is_labelled=False,
    )
