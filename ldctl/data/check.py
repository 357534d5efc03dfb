"""Look at a data set before the first step: all that is wrong with it at once, and what is done about each fault."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from ldctl.data import index
from ldctl.data.images import check_file, check_size, read_sample
from ldctl.data.table import fingerprint
from ldctl.errors import DataError
from ldctl.samples import Dataset, Fault, Sample, Samples
from ldctl.schema import Spec

_THREADS = 16  # waiting for files, not computing
_CHUNK = 256  # images per task of a thread
_COLUMNS: index.Columns = {"stamp": ("I64", 2)}


class _Checked(Spec):
    """What a memory of sound files is of.

    Attributes:
        made_of: Fingerprint of the data set.
    """

    made_of: str


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        faults: Everything that is wrong, faults of the annotations first.
        dataset: The data set without what is unusable.
    """

    faults: tuple[Fault, ...]
    dataset: Dataset


@dataclass(frozen=True)
class _Look:
    """What was found of some images.

    Attributes:
        stamp: Of each file that is sound, its size and times of change; zeros for others.
        faults: Of each image, what is wrong with it.
    """

    stamp: Int64[np.ndarray, "S 3"]
    faults: tuple[Fault | None, ...]


def inspect(dataset: Dataset) -> Inspection:
    """List all faults of a data set, and leave out the images that cannot be used.

    Faults of the annotations were found while they were read. This adds those of the image files: missing, truncated,
    no image, of another size than annotated. `ldctl.data.images.check_file` says what is read of them; nothing of a
    file that was found sound before and has the same size and times since, where that is remembered
    (`Dataset.checked`). Generated images have no files to look at.

    Raises:
        DataError: No image is left.
    """
    if dataset.read is not read_sample:
        return Inspection(dataset.faults, dataset)
    samples = dataset.samples
    known = _remembered(dataset)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(samples), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        looks = list(pool.map(_look, [samples[chunk] for chunk in chunks], [known[chunk] for chunk in chunks]))
    stamp = np.concatenate([look.stamp for look in looks])
    if dataset.checked and not np.array_equal(stamp, known):
        index.store(dataset.checked, _Checked(made_of=dataset.fingerprint), {"stamp": stamp})
    found = [fault for look in looks for fault in look.faults]
    faults = (*dataset.faults, *(fault for fault in found if fault is not None))
    left = samples.take(np.array([fault is None for fault in found]))
    if not left:
        raise DataError(f"{dataset.name}: not one image can be used; the first of {len(faults)} faults is {faults[0]}")
    if len(left) < len(samples):
        mark = fingerprint(dataset.classes, dataset.category_id, left)
        dataset = replace(dataset, samples=left, fingerprint=mark)
    return Inspection(faults, replace(dataset, faults=faults))


def _remembered(dataset: Dataset) -> Int64[np.ndarray, "S 3"]:
    """Return the stamps of the files that were found sound before, zeros for all others."""
    stored = index.load(dataset.checked, _Checked, _COLUMNS) if dataset.checked else None
    nothing = np.zeros((len(dataset.samples), 3), dtype=np.int64)
    if stored is None or stored.about.made_of != dataset.fingerprint:
        return nothing
    stamp = stored.arrays["stamp"]
    return stamp if stamp.shape == nothing.shape else nothing


def _look(samples: Samples, known: Int64[np.ndarray, "S 3"]) -> _Look:
    """Check the files that are not known to be sound; a file is stamped before it is read, in case it changes."""
    stamp = np.array([_stamp(samples.file(position)) for position in range(len(samples))], dtype=np.int64)
    is_known = (stamp == known).all(axis=1) & stamp.any(axis=1)
    faults = tuple(None if is_known[position] else _file_fault(samples[position]) for position in range(len(samples)))
    stamp[[fault is not None for fault in faults]] = 0
    return _Look(stamp, faults)


def _stamp(file: str) -> tuple[int, int, int]:
    """Return what changes when a file is written to or replaced; zeros where there is none."""
    try:
        status = os.stat(file)  # noqa: PTH116 (a hundred thousand of them)
    except (OSError, ValueError):  # the latter: no possible name of a file
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _file_fault(sample: Sample) -> Fault | None:
    try:
        check_size(sample, check_file(Path(sample.file)))
    except DataError as error:
        problem = str(error).removeprefix(f"{sample.file}: ")
        return Fault(sample.file, f"image {sample.image_id}", problem, "image skipped")
    return None
