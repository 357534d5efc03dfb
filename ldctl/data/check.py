"""Look at a data set before the first step: all that is wrong with it at once, and what is done about each fault."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ldctl.data.images import check_file, check_size, read_sample
from ldctl.data.raw import fingerprint
from ldctl.errors import DataError
from ldctl.types import Dataset, Fault, Sample

_THREADS = 16  # waiting for files, not computing
_CHUNK = 256  # images per task of a thread


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        faults: Everything that is wrong, faults of the annotations first.
        dataset: The data set without what is unusable.
    """

    faults: tuple[Fault, ...]
    dataset: Dataset


def inspect(dataset: Dataset) -> Inspection:
    """List all faults of a data set, and leave out the images that cannot be used.

    Faults of the annotations were found while they were read. This adds those of the image files: missing, truncated,
    no image, of another size than annotated. `ldctl.data.images.check_file` says what is read of them. Generated images
    have no files to look at.

    Raises:
        DataError: No image is left.
    """
    if dataset.read is not read_sample:
        return Inspection(dataset.faults, dataset)
    samples = dataset.samples
    chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(chain.from_iterable(pool.map(_file_faults, chunks)))
    left = tuple(sample for sample, fault in zip(samples, found, strict=True) if fault is None)
    faults = (*dataset.faults, *(fault for fault in found if fault is not None))
    if not left:
        raise DataError(f"{dataset.name}: not one image can be used; the first of {len(faults)} faults is {faults[0]}")
    if len(left) < len(samples):
        mark = fingerprint(dataset.classes, dataset.category_id, left)
        dataset = replace(dataset, samples=left, fingerprint=mark)
    return Inspection(faults, replace(dataset, faults=faults))


def _file_faults(samples: Sequence[Sample]) -> list[Fault | None]:
    return [_file_fault(sample) for sample in samples]


def _file_fault(sample: Sample) -> Fault | None:
    try:
        check_size(sample, check_file(Path(sample.file)))
    except DataError as error:
        problem = str(error).removeprefix(f"{sample.file}: ")
        return Fault(sample.file, f"image {sample.image_id}", problem, "image skipped")
    return None
