"""Random batches for tests of the mathematics: targets, detectors' outputs, and ranks that talk to each other."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldctl.boxes import location_grid
from ldctl.regions import RegionSpec, meet, pick_rows, vlr_weights
from ldctl.types import Assigned, Dense, Locations, Targets, TowerMaps, Where

STRIDES = (8, 16, 32, 64, 128)
NO_MAPS = TowerMaps((), ())


def grid(height: int, width: int, offset: float = 0.0) -> Locations:
    """Return the locations of an input of this size, as the feature pyramid lays them out."""
    sizes = tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)
    return location_grid(sizes, STRIDES, torch.device("cpu"), offset)


def targets_of(images: list[list[tuple[float, float, float, float, int]]]) -> Targets:
    """Pad lists of `(left, top, right, bottom, label)` to a batch."""
    shape = len(images), max(map(len, images))
    targets = Targets(torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape).bool())
    for image, objects in enumerate(images):
        for index, (*box, label) in enumerate(objects):
            targets.gt_xyxy[image, index] = torch.tensor(box)
            targets.gt_label[image, index] = label
            targets.is_object[image, index] = True
    return targets


def random_targets(num_images: int, size: int, num_classes: int, seed: int, *, most: int = 6) -> Targets:
    """Return images of 0 to `most` objects of every size up to the image's."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(num_images):
        count = int(torch.randint(most + 1, (), generator=generator))
        center = torch.rand(count, 2, generator=generator) * size
        half = torch.exp(torch.rand(count, 2, generator=generator) * 3.0) / 40 * size
        corners = torch.cat((center - half, center + half), dim=1).clamp(0, size).tolist()
        labels = torch.randint(num_classes, (count,), generator=generator).tolist()
        images.append([(*box, label) for box, label in zip(corners, labels, strict=True)])
    return targets_of(images)


def random_dense(locations: Locations, num_images: int, num_classes: int, seed: int, *, num_bins: int = 17) -> Dense:
    """Return outputs that carry gradients back to two leaves, `cls` and `edge`."""
    generator = torch.Generator().manual_seed(seed)
    count = len(locations.level)
    cls = torch.randn(num_images, count, num_classes, generator=generator) * 2 - 2
    edge = torch.randn(num_images, count, 4, num_bins, generator=generator) * 6  # peaked: boxes of every size
    return Dense(cls.requires_grad_(), edge.requires_grad_(), (), NO_MAPS, locations)


def vlr_region(spec: RegionSpec, assigned: Assigned, targets: Targets, locations: Locations) -> Where:
    """Return the VLR by itself."""
    met = meet(("vlr",), spec, assigned, targets, locations)
    weight = vlr_weights(spec, met, assigned, targets, locations) * assigned.is_valid
    return pick_rows({"vlr": weight}, locations)["vlr"]


def images_of(batch: Targets | Dense, images: slice | list[int]) -> Targets | Dense:
    """Return the given images of a batch."""
    if isinstance(batch, Dense):
        features = tuple(each[images] for each in batch.features)
        quality = None if batch.quality is None else batch.quality[images]
        return replace(batch, cls=batch.cls[images], edge=batch.edge[images], features=features, quality=quality)
    return Targets(batch.gt_xyxy[images], batch.gt_label[images], batch.is_object[images])


def on_ranks(monkeypatch: pytest.MonkeyPatch, num_ranks: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    """Return `work(rank)` of every rank; the ranks are threads that exchange tensors."""
    local, barrier = threading.local(), threading.Barrier(num_ranks)
    slots: list[Tensor | None] = [None] * num_ranks
    results: list[Tensor | BaseException] = [RuntimeError("rank did not end")] * num_ranks

    def exchange(value: Tensor) -> list[Tensor]:
        slots[local.rank] = value.clone()
        barrier.wait(timeout=30)
        values = list(slots)
        barrier.wait(timeout=30)
        return values

    def all_reduce(value: Tensor) -> None:
        value.copy_(torch.stack(exchange(value)).sum(dim=0))

    def all_gather(parts: list[Tensor], value: Tensor) -> None:
        for part, given in zip(parts, exchange(value), strict=True):
            part.copy_(given)

    def run(rank: int) -> None:
        local.rank = rank
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.is_initialized", lambda: num_ranks > 1)
        patch.setattr("torch.distributed.get_world_size", lambda: num_ranks)
        patch.setattr("torch.distributed.get_rank", lambda: local.rank)
        patch.setattr("torch.distributed.all_reduce", all_reduce)
        patch.setattr("torch.distributed.all_gather", all_gather)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
