"""Samples as columns: built from single ones, joined, relabelled, hashed."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from ldctl.samples import Sample, Samples, Table


def pack(samples: Iterable[Sample]) -> Samples:
    """Return the samples as columns, in their order."""
    rows = list(samples)
    names, first_byte = pack_names([sample.file for sample in rows])
    return whole(
        Table(
            image_id=np.array([sample.image_id for sample in rows], dtype=np.int64),
            height=np.array([sample.height for sample in rows], dtype=np.int64),
            width=np.array([sample.width for sample in rows], dtype=np.int64),
            is_labelled=np.array([sample.is_labelled for sample in rows], dtype=np.bool_),
            first_byte=first_byte,
            names=names,
            first_object=starts([len(sample.label) for sample in rows]),
            # the empty array in front: there may be no samples
            xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(sample.xyxy for sample in rows)]),
            label=np.concatenate([np.zeros(0, np.int64), *(sample.label for sample in rows)]),
            area=np.concatenate([np.zeros(0, np.float32), *(sample.area for sample in rows)]),
            is_crowd=np.concatenate([np.zeros(0, np.bool_), *(sample.is_crowd for sample in rows)]),
        )
    )


def joined(*parts: Samples) -> Samples:
    """Return the images of all parts, in their order, as a table in memory: what was mapped from a file is copied."""
    columns = [_columns(samples) for samples in parts]
    merged: dict[str, Any] = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    names, first_byte = pack_names([samples.file(place) for samples in parts for place in range(len(samples))])
    return whole(Table(first_byte=first_byte, names=names, first_object=starts(merged.pop("count")), **merged))


def whole(table: Table) -> Samples:
    """Return all images of a table, in its order."""
    return Samples(table, np.arange(len(table.image_id)))


def relabelled(samples: Samples, new_label: Int64[np.ndarray, " C"]) -> Samples:
    """Return the same images with label `l` called `new_label[l]`."""
    return replace(samples, new_label=new_label if samples.new_label is None else new_label[samples.new_label])


def pack_names(names: Sequence[str]) -> tuple[UInt8[np.ndarray, " M"], Int64[np.ndarray, " _"]]:
    """Return the names' bytes one after another, and where each starts and the last ends."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]  # what is no text comes back as it was
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), starts([len(name) for name in encoded])


def starts(counts: Sequence[int] | Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " _"]:
    """Return where each of some runs of given lengths starts, and where the last ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.asarray(counts, dtype=np.int64))))


def prefix(folder: Path) -> str:
    """Return what stands before the name of every file in a folder; nothing for the working directory."""
    return str(folder / "x")[:-1]


def fingerprint(classes: tuple[str, ...], category_id: tuple[int, ...], samples: Samples) -> str:
    """Return a SHA-256 that changes with every class, image id, file name, size and box, and with what is unlabelled.

    Folders do not enter, so that a data set keeps its fingerprint when it moves; nor do pixels.
    """
    names = [PurePath(samples.file(position)).name for position in range(len(samples))]
    digest = hashlib.sha256(repr((classes, category_id, names)).encode("utf-8", "surrogatepass"))
    for column in _columns(samples).values():
        digest.update(column.tobytes())
    return digest.hexdigest()


def _columns(samples: Samples) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return the columns of a table of these images alone, but for their names, and how many objects each has."""
    table, rows = samples.table, samples.rows
    count = samples.num_objects
    # the objects of the images one after another: each image's first, and from there on by one
    mine = np.arange(count.sum()) + np.repeat(table.first_object[rows] - starts(count)[:-1], count)
    return {
        "image_id": table.image_id[rows],
        "height": samples.height,
        "width": samples.width,
        "is_labelled": samples.is_labelled,
        "count": count,
        "xyxy": table.xyxy[mine],
        "label": table.label[mine] if samples.new_label is None else samples.new_label[table.label[mine]],
        "area": table.area[mine],
        "is_crowd": table.is_crowd[mine],
    }
