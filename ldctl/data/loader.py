"""Batches: which images, in which order, seen how.

Everything is a function of `(seed, epoch, index)` and of nothing else: not of the number of worker processes or
ranks, nor of what was loaded before. A run therefore resumes in the middle of an epoch by saying at which step, and
needs no loader state.

An epoch shuffles the images, divides them into wide ones (width > height) and others, and cuts each group into
batches, so that little is padded. What is left over of both groups makes up the last one or two batches; they come
first in the epoch, so that the widest padding, and with it the most memory, is met at the first step. The last of
them is filled up with images from the front of the shuffled list. An epoch thus shows every image at least once, and
at most `batch_size - 1` times an image again. On canvases (`DataSpec.canvas`) what is left over of each group makes up
a batch of its own, which is filled up from that group.
"""

import math
import os
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ldctl.boxes import PAD_MULTIPLE
from ldctl.data.augment import Objects, View, canvas, eval_view, fixed_view, place, scaled, show, train_view
from ldctl.data.formats import DataSpec
from ldctl.data.images import read_sample
from ldctl.data.teacher_cache import TeacherCache
from ldctl.errors import CheckpointError, DataError, LdctlError, SpecError
from ldctl.samples import Dataset, Sample
from ldctl.types import Batch, Scaled, Targets, TeacherRows

# What crosses from a worker: a few tensors (each costs a file handle; images and their sizes at each scale come last),
# or what is wrong, as an object: raised there, it would lose its class on the way.
_Packed = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Plan:
    """A batch before any pixel is read.

    Attributes:
        index: Samples of this rank's share.
        views: How each is shown.
        padded_hw: Size of the batch, common to all ranks.
    """

    index: tuple[int, ...]
    views: tuple[View, ...]
    padded_hw: tuple[int, int]


def num_steps(dataset: Dataset, batch_size: int, *, canvas: bool) -> int:
    """Return the number of global batches in an epoch; see the top of this file for what `canvas` changes."""
    groups = [int(np.sum(is_wide(dataset))), int(np.sum(~is_wide(dataset)))]
    return sum(-(-count // batch_size) for count in (groups if canvas else [sum(groups)]))


def train_batches(
    dataset: Dataset,
    spec: DataSpec,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    teacher_scale: float = 1.0,
    cache: TeacherCache | None = None,
) -> Generator[Batch, None, None]:
    """Yield the batches of an epoch, augmented.

    A global batch is padded to one size on all ranks, so that the number of ranks does not change what is computed.

    Args:
        dataset: What to train on.
        spec: Sizes, flip, number of workers.
        batch_size: Images per global batch, over all ranks.
        seed: The run's.
        epoch: Counted from 0.
        first_step: Batches of the epoch to skip; nothing of them is read.
        rank: Which share of each global batch to yield: the images `rank`, `rank + world_size`, ...
        world_size: Number of ranks; divides `batch_size`.
        teacher_scale: Unless 1, the views are also shown at this scale, for the teacher; a power of two from 1/2 on.
        cache: What the teacher says of each view, to go with the batches.

    Raises:
        DataError: An image cannot be read.
        CheckpointError: The cache cannot be read, or is damaged.
        SpecError: `batch_size` cannot be shared out evenly.
    """
    if batch_size % world_size:
        raise SpecError(f"train.batch {batch_size} cannot be shared by {world_size} ranks: make it a multiple of them")
    order = epoch_order(dataset, batch_size, seed, epoch, canvas=spec.canvas)
    multiple = round(PAD_MULTIPLE / min(teacher_scale, 1.0))  # so that a smaller teacher's input has whole strides, too
    plan = _TrainPlan(dataset, spec, order, seed, epoch, rank, world_size, multiple)
    yield from _load(
        _Batches(
            dataset, plan, with_targets=True, teacher_scale=teacher_scale, scaled_jpeg=spec.scaled_jpeg, cache=cache
        ),
        range(first_step, len(order)),
        spec.workers,
    )


def eval_batches(
    dataset: Dataset, spec: DataSpec, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Generator[Batch, None, None]:
    """Yield every image once, at the evaluation size.

    A batch holds only images of the same padded size, so that no image is padded further than it would be alone: what a
    detector says of it does not depend on `batch_size` nor on the number of ranks, but for rounding. The largest size
    comes first; images of a size keep the data set's order. `Batch.image_id` says which images they are.

    Args:
        dataset: What to evaluate on.
        spec: Sizes, number of workers.
        batch_size: Most images per batch of a rank.
        rank: Which share to yield: the batches `rank`, `rank + world_size`, ...; ranks may differ by one batch.
        world_size: Number of ranks.

    Raises:
        DataError: An image cannot be read.
    """
    groups: dict[tuple[int, int], list[tuple[int, View]]] = {}
    for index, sample in enumerate(dataset.samples):
        view = eval_view(sample, spec)
        groups.setdefault(_common_size([view]), []).append((index, view))
    plans = []
    for size, members in sorted(groups.items(), key=lambda item: (-item[0][0] * item[0][1], item[0])):
        for start in range(0, len(members), batch_size):
            indices, views = zip(*members[start : start + batch_size], strict=True)
            plans.append(_Plan(indices, views, size))
    plans = plans[rank::world_size]
    yield from _load(_Batches(dataset, plans.__getitem__, with_targets=False), range(len(plans)), spec.workers)


def view_plan(dataset: Dataset, batch_size: int, flips: Sequence[bool]) -> list[tuple[tuple[int, bool], ...]]:
    """Return every view of every image once, as `(index, is_flipped)`, in batches of one canvas.

    The views of one image stand together; the last batch of each canvas may be smaller.
    """
    index = np.arange(len(dataset.samples))
    plan: list[tuple[tuple[int, bool], ...]] = []
    for group in (index[is_wide(dataset)], index[~is_wide(dataset)]):
        views = [(image, is_flipped) for image in group.tolist() for is_flipped in flips]
        plan += [tuple(views[first : first + batch_size]) for first in range(0, len(views), batch_size)]
    return plan


def view_batches(
    dataset: Dataset, spec: DataSpec, plan: Sequence[Sequence[tuple[int, bool]]], *, batch_size: int
) -> Generator[Batch, None, None]:
    """Yield the batches of a plan, with their objects, on their canvases.

    A batch that is smaller is filled up with its own views once more, since what a network says of an image may depend
    on the size of the batch, if only by rounding; of such a batch the first images are meant.

    Args:
        dataset: Images.
        spec: Sizes, number of workers; of one scale.
        plan: See `view_plan`.
        batch_size: Images per batch.

    Raises:
        DataError: An image cannot be read.
    """
    batches = _Batches(
        dataset, _ViewPlan(dataset, spec, plan, batch_size), with_targets=True, scaled_jpeg=spec.scaled_jpeg
    )
    yield from _load(batches, range(len(plan)), spec.workers)


def is_wide(dataset: Dataset) -> Bool[np.ndarray, " N"]:
    """Tell which images are wider than high."""
    return dataset.samples.width > dataset.samples.height


def epoch_order(
    dataset: Dataset, batch_size: int, seed: int, epoch: int, *, canvas: bool
) -> Int64[np.ndarray, "steps batch"]:
    """Return which samples make up each global batch of an epoch; see the top of this file for the rule."""
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(dataset.samples))
    is_first = is_wide(dataset)[shuffled]
    groups = (shuffled[is_first], shuffled[~is_first])
    full, left = [], []
    for group in groups:
        whole = len(group) // batch_size * batch_size
        full.append(group[:whole].reshape(-1, batch_size))
        left.append(group[whole:])
    pools = groups if canvas else (shuffled,)
    rests = left if canvas else [np.concatenate(left)]
    filled = [
        np.concatenate((rest, np.resize(pool, -len(rest) % batch_size))).reshape(-1, batch_size)
        for rest, pool in zip(rests, pools, strict=True)
    ]
    return np.concatenate((*filled, rng.permutation(np.concatenate(full))))


def usable_workers(wanted: int) -> int:
    """Return the number of worker processes to start: no more than there are CPU cores for this process."""
    # the affinity mask knows of containers and batch systems; only Linux has one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


@dataclass(frozen=True)
class _TrainPlan:
    """Plans the batches of an epoch one by one, in the worker that loads them."""

    dataset: Dataset
    spec: DataSpec
    order: Int64[np.ndarray, "steps batch"]
    seed: int
    epoch: int
    rank: int
    world_size: int
    multiple: int

    def __call__(self, step: int) -> _Plan:
        order = self.order[step].tolist()
        views = [train_view(self.dataset.samples[i], self.spec, self.seed, self.epoch, i) for i in order]
        share = slice(self.rank, None, self.world_size)
        held = [canvas(self.dataset.samples[order[0]], self.spec)] if self.spec.canvas else views
        return _Plan(tuple(order[share]), tuple(views[share]), _common_size(held, self.multiple))


@dataclass(frozen=True)
class _ViewPlan:
    """Plans the batches of `view_batches` one by one, in the worker that loads them."""

    dataset: Dataset
    spec: DataSpec
    plan: Sequence[Sequence[tuple[int, bool]]]
    batch_size: int

    def __call__(self, step: int) -> _Plan:
        views = self.plan[step]
        chosen = [views[slot % len(views)] for slot in range(self.batch_size)]
        samples = [self.dataset.samples[index] for index, _ in chosen]
        shown = [fixed_view(one, self.spec, is_flipped) for one, (_, is_flipped) in zip(samples, chosen, strict=True)]
        size = _common_size([canvas(samples[0], self.spec)])
        return _Plan(tuple(index for index, _ in chosen), tuple(shown), size)


@dataclass(frozen=True)
class _Batches(TorchDataset[_Packed | LdctlError]):
    """The batches of an epoch by number, or what is wrong with an image or the cache."""

    dataset: Dataset
    plan: Callable[[int], _Plan]
    with_targets: bool
    teacher_scale: float = 1.0
    scaled_jpeg: bool = False
    cache: TeacherCache | None = None

    def __getitem__(self, step: int) -> _Packed | LdctlError:
        try:
            return self._pack(self.plan(step))
        except (DataError, CheckpointError) as error:
            return error

    def _pack(self, plan: _Plan) -> _Packed:
        samples = [self.dataset.samples[index] for index in plan.index]
        scales = (1.0,) if self.teacher_scale == 1 else (1.0, self.teacher_scale)
        height, width = plan.padded_hw
        shown = [_black(len(samples), int(height * scale), int(width * scale)) for scale in scales]
        for row, (sample, view) in enumerate(zip(samples, plan.views, strict=True)):
            pixels = self._read(sample, scaled(view, max(scales)))
            for images, scale in zip(shown, scales, strict=True):
                part = scaled(view, scale)
                images[row, :, : part.height, : part.width] = show(pixels, part)
        objects = [place(s, view) for s, view in zip(samples, plan.views, strict=True)] if self.with_targets else []
        targets = padded(objects, len(samples))
        sizes_hw = [_sizes_hw([scaled(view, scale) for view in plan.views]) for scale in scales]
        counts, taught = _taught(self.cache, plan) if self.cache else ([(0, 0)] * len(samples), ())
        original_hw = torch.tensor([(sample.height, sample.width) for sample in samples])
        is_labelled = torch.tensor([sample.is_labelled for sample in samples])
        about = torch.tensor([(sample.image_id, *told) for sample, told in zip(samples, counts, strict=True)])
        return (
            about,
            original_hw,
            is_labelled,
            targets.gt_xyxy,
            targets.gt_label,
            targets.is_object,
            *taught,
            *shown,
            *sizes_hw,
        )

    def _read(self, sample: Sample, largest: View) -> UInt8[Tensor, "3 H W"]:
        """Return the pixels of an image, or at least as many as its largest view has."""
        if self.scaled_jpeg and self.dataset.read is read_sample:
            return read_sample(sample, (largest.height, largest.width))
        return self.dataset.read(sample)


def padded(objects: Sequence[Objects], num_images: int) -> Targets:
    """Pad the objects of a batch's images to one number; none of any image gives none."""
    most = max((len(found.label) for found in objects), default=0)
    xyxy = torch.zeros((num_images, most, 4))
    label = torch.zeros((num_images, most), dtype=torch.int64)
    is_object = torch.zeros((num_images, most), dtype=torch.bool)
    for row, found in enumerate(objects):
        count = len(found.label)
        xyxy[row, :count] = torch.from_numpy(found.xyxy)
        label[row, :count] = torch.from_numpy(found.label)
        is_object[row, :count] = True
    return Targets(gt_xyxy=xyxy, gt_label=label, is_object=is_object)


def _taught(cache: TeacherCache, plan: _Plan) -> tuple[list[tuple[int, int]], _Packed]:
    """Return how many edges and classes are told of each view, and where and what, as in `TeacherRows`."""
    views = [cache.view(index, view.is_flipped) for index, view in zip(plan.index, plan.views, strict=True)]
    first = np.arange(len(views), dtype=np.int64) * cache.header.num_locations
    values = [
        np.concatenate([start + one.edge_location for start, one in zip(first, views, strict=True)]),
        np.concatenate([one.edge for one in views]),
        np.concatenate([start + one.cls_location for start, one in zip(first, views, strict=True)]),
        np.concatenate([one.cls for one in views]),
    ]
    if cache.header.has_quality:
        values.append(np.concatenate([one.quality for one in views if one.quality is not None]))
    counts = [(len(one.edge_location), len(one.cls_location)) for one in views]
    return counts, tuple(torch.from_numpy(value) for value in values)


def _load(batches: _Batches, steps: range, workers: int) -> Generator[Batch, None, None]:
    workers = min(usable_workers(workers), len(steps))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # a generator of its own: workers draw a base seed, which must not move the run's random state
        generator=torch.Generator(),
        worker_init_fn=_leave_signals,
    )
    # decided for the data set, not for the batch: all ranks have to take the same way through a step
    is_annotated = batches.dataset.samples.is_labelled.all()
    iterator = iter(loader)
    try:
        for packed in iterator:
            if isinstance(packed, LdctlError):
                raise packed
            about, original_hw, is_labelled, xyxy, label, is_object, *rest = packed
            count = 4 + batches.cache.header.has_quality if batches.cache else 0
            taught, shown = rest[:count], rest[count:]
            images, sizes_hw = shown[: len(shown) // 2], shown[len(shown) // 2 :]
            yield Batch(
                images=images[0],
                size_hw=sizes_hw[0],
                original_hw=original_hw,
                image_id=tuple(about[:, 0].tolist()),
                targets=Targets(gt_xyxy=xyxy, gt_label=label, is_object=is_object),
                for_teacher=Scaled(images[1], sizes_hw[1]) if len(images) > 1 else None,
                is_labelled=None if is_annotated else is_labelled,
                taught=_teacher_rows(batches.cache, about[:, 1:].tolist(), taught) if batches.cache else None,
            )
    finally:
        # An error's traceback keeps the iterator alive to the end of the process, which would then wait for workers
        # that nobody has told to stop.
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def _teacher_rows(cache: TeacherCache, counts: list[list[int]], tensors: Sequence[Tensor]) -> TeacherRows:
    edge_row, edge, cls_row, cls, *quality = tensors
    return TeacherRows(
        edge_row=edge_row,
        edge=edge,
        cls_row=cls_row,
        cls=cls,
        quality=quality[0] if quality else None,
        counts=tuple((num_edge, num_cls) for num_edge, num_cls in counts),
        num_locations=cache.header.num_locations,
        offset=cache.header.location_offset,
        edge_regions=cache.header.edge_regions,
        cls_regions=cache.header.cls_regions,
    )


def _leave_signals(_: int) -> None:
    """Leave to the main process what reaches all processes of a group: it stops after its step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is Unix's
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _black(num_images: int, height: int, width: int) -> UInt8[Tensor, "B 3 H W"]:
    """Return images of zeros; of a worker's, in the memory that it shares, where they would else be copied to."""
    shape = (num_images, 3, height, width)
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]  # zeros, as new memory is
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _sizes_hw(views: Sequence[View]) -> Int64[Tensor, "B 2"]:
    return torch.tensor([(view.height, view.width) for view in views])


def _common_size(views: Sequence[View], multiple: int = PAD_MULTIPLE) -> tuple[int, int]:
    """Return the smallest multiples that hold all views."""
    height, width = max(view.height for view in views), max(view.width for view in views)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
