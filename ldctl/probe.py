"""The largest batch that fits: tried out before a run, on a detector and an optimizer that are thrown away."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ldctl import distributed
from ldctl.assemble import Setting, job_of, note
from ldctl.boxes import PAD_MULTIPLE
from ldctl.data import DataSpec
from ldctl.data.augment import Objects, canvas, eval_view, place, resize_size
from ldctl.errors import SpecError, TrainingError
from ldctl.memory import available_bytes, peak_bytes
from ldctl.models.detector import Detector, ModelSpec
from ldctl.optim import scaled_lr
from ldctl.samples import Dataset
from ldctl.spec import AUTO, DistillSpec, RunSpec, TeacherSpec
from ldctl.step import Teaching
from ldctl.trainer import Job, Trainer
from ldctl.types import Batch, Scaled, Targets

# Shares of the memory that a batch may take. On a GPU, where it is tried out, the rest is for fragments, work space of
# libraries and evaluation. On a CPU it is calculated, and all else on the machine takes from the same memory.
GPU_SHARE = 0.9
CPU_SHARE = 0.5
MOST_IMAGES = 256  # up to here the linear rule trains detectors. Source: MegDet (CVPR 2018, arXiv:1711.07240)
STEPS_PER_EPOCH = 10  # at least: with fewer, no memory makes up for the steps that are missing. This project's choice

S = TypeVar("S", TeacherSpec, DistillSpec)


@dataclass(frozen=True)
class Fit:
    """The largest batch of a rank's micro-batch, and what it takes.

    Attributes:
        images: Of the micro-batch.
        taken: Bytes at the peak of a step.
        total: Bytes that there are for this process.
    """

    images: int
    taken: int
    total: int


def settle_batch(spec: S, name: str, model: ModelSpec, setting: Setting, teaching: Teaching | None = None) -> S:
    """Return the spec with a number in the place of a batch that is `"auto"`, and say which; others as they are.

    The number is a multiple of what ranks and micro-batches share, and the same for all ranks. It leaves at least
    `STEPS_PER_EPOCH` steps in an epoch and does not exceed `MOST_IMAGES`, however much memory there is.

    Args:
        spec: How to train it.
        name: What messages call it.
        model: The detector.
        setting: Device and data.
        teaching: From whom it learns, and what; the teacher is in memory.

    Raises:
        TrainingError: Not even one image fits.
        SpecError: It cannot be told how much memory there is.
    """
    if spec.train.batch != AUTO:
        return spec
    accumulate, ranks = spec.train.accumulate, distributed.world_size()
    share = ranks * accumulate
    most = max(most_images(len(setting.train_set.samples)) // share, 1)
    with distributed.alone(), torch.random.fork_rng([setting.device] if setting.device.type == "cuda" else []):
        trial = Trial(spec, model, setting, teaching, has_buckets=ranks > 1)
        find = _largest_on_gpu if setting.device.type == "cuda" else _largest_on_cpu
        fit = find(trial, most, setting.device)
    if (images := min(distributed.gather([fit.images]))) == 0:
        raise TrainingError(
            f"{name}: not even one image fits in {fit.total / 2**30:.1f} GB: lower data.short_side and "
            "data.long_side, or take a smaller detector"
        )
    batch = images * share
    why = "" if images < most else f", the most that is tried for {len(setting.train_set.samples)} images"
    note(
        f"{name}: batch {batch} fits in {fit.taken / 2**30:.1f} of {fit.total / 2**30:.1f} GB{why}; "
        f"learning rate {scaled_lr(spec.train.optim, batch):g} by the linear rule"
    )
    return spec.model_copy(update={"train": spec.train.model_copy(update={"batch": batch})})


def most_images(num_images: int) -> int:
    """Return the largest batch that makes sense for a data set, however much memory there is."""
    return max(min(MOST_IMAGES, num_images // STEPS_PER_EPOCH), 1)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to `most` that fits, 0 if none does: by doubling, then by halving what is left.

    Args:
        fits: Whether a number does; if one does not, no larger one does.
        most: At least 1.
    """
    low, high = 0, most + 1  # what fits, and what does not
    while high - low > 1:
        tried = min(max(2 * low, 1), most) if high > most else (low + high) // 2
        if fits(tried):
            low = tried
        else:
            high = tried
    return low


@dataclass(frozen=True)
class Extent:
    """What a data set's images take at most.

    Attributes:
        height: Pixels of the highest image in the network input, or of a canvas.
        width: Of the widest.
        fullest: The objects of the image with the most.
        has_unlabelled: Whether some images have no annotations.
    """

    height: int
    width: int
    fullest: Objects
    has_unlabelled: bool


class Trial:
    """Takes training steps with micro-batches of some size, of the largest images with the most objects of a data set.

    Nothing of the run takes part but the teacher, which is frozen: detector, optimizer and average are the trial's own.
    """

    def __init__(
        self, spec: RunSpec, model: ModelSpec, setting: Setting, teaching: Teaching | None, *, has_buckets: bool
    ) -> None:
        """Try nothing yet.

        Args:
            spec: How to train.
            model: The detector.
            setting: Device and data.
            teaching: From whom it learns, and what.
            has_buckets: Hold as much memory as gradients take, which ranks copy to exchange them.
        """
        self.spec, self.model, self.setting, self.teaching = spec, model, setting, teaching
        self.has_buckets = has_buckets
        self.extent = extent_of(setting.train_set, spec.data)

    def __call__(self, images: int) -> None:
        """Take two steps: the second one with the optimizer's state in memory, and both as at the start of an epoch."""
        parts = min(self.spec.train.accumulate, 2)  # the second finds the first one's gradients in memory
        trainer = Trainer(self.job(images * parts, parts))
        trainer.wrapped.train()
        scale = self.teaching.scale if self.teaching else 1.0
        batch = largest_batch(self.extent, images * parts, scale, self.setting.device)
        buckets = [torch.zeros_like(p) for p in trainer.learner.parameters() if p.requires_grad and self.has_buckets]
        for _ in range(2):
            trainer.take_step(batch)
        del buckets

    def job(self, batch: int, accumulate: int) -> Job:
        """Return the run's job with a detector of random weights and another batch; nothing of it is saved."""
        train = self.spec.train.model_copy(update={"batch": batch, "accumulate": accumulate})
        spec = self.spec.model_copy(update={"train": train})
        detector = Detector(self.model, len(self.setting.train_set.classes))
        return job_of(spec, "trial", Path(os.devnull), detector, self.setting, self.teaching)


def extent_of(dataset: Dataset, spec: DataSpec) -> Extent:
    """Return what the images of a data set take at most.

    The highest and the widest image may be in one batch, as a batch can be of both orientations; a canvas takes the
    same in either.

    Args:
        dataset: What to train on.
        spec: Sizes.
    """
    samples, table = dataset.samples, dataset.samples.table
    before = np.concatenate((np.zeros(1, np.int64), np.cumsum(~table.is_crowd)))  # objects that are no crowds
    fullest = samples[int(np.diff(before[table.first_object]).take(samples.rows).argmax())]
    if spec.canvas:
        held = canvas(fullest, spec)
        height, width = held.height, held.width
    else:
        stored = np.unique(np.stack((samples.height, samples.width), axis=1), axis=0).tolist()
        shown = [resize_size(high, wide, spec.short_side[1], spec.long_side) for high, wide in stored]
        height, width = (max(sides) for sides in zip(*shown, strict=True))
    objects = place(fullest, eval_view(fullest, spec))
    return Extent(height, width, objects, has_unlabelled=not samples.is_labelled.all())


def largest_batch(extent: Extent, images: int, teacher_scale: float, device: torch.device) -> Batch:
    """Return a batch that takes as much memory as any of a data set can.

    Args:
        extent: Of the data set.
        images: How many.
        teacher_scale: See `train_batches`.
        device: Where to put it.
    """
    multiple = round(PAD_MULTIPLE / min(teacher_scale, 1.0))
    height, width = (-(-side // multiple) * multiple for side in (extent.height, extent.width))
    xyxy, label = torch.from_numpy(extent.fullest.xyxy), torch.from_numpy(extent.fullest.label)

    def repeated(value: Tensor) -> Tensor:
        return value.expand(images, *value.shape).to(device)

    def noise(scale: float) -> Tensor:
        return torch.randint(
            256, (images, 3, int(height * scale), int(width * scale)), dtype=torch.uint8, device=device
        )

    size_hw = repeated(torch.tensor([height, width]))
    return Batch(
        images=noise(1.0),
        size_hw=size_hw,
        original_hw=size_hw,
        image_id=tuple(range(images)),
        targets=Targets(repeated(xyxy), repeated(label), repeated(torch.ones(len(label), dtype=torch.bool))),
        for_teacher=None
        if teacher_scale == 1
        else Scaled(noise(teacher_scale), (size_hw * teacher_scale).to(size_hw.dtype)),
        is_labelled=torch.arange(images, device=device) % 2 == 0 if extent.has_unlabelled else None,
    )


def _largest_on_gpu(trial: Callable[[int], None], most: int, device: torch.device) -> Fit:
    """Try sizes until memory runs out, or more than `GPU_SHARE` of what this process can have is taken."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    taken: dict[int, int] = {}

    def fits(images: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            trial(images)
        except RuntimeError as error:
            if not _says_out_of_memory(error):
                raise
            peak = None
        else:
            peak = torch.cuda.max_memory_allocated(device)
        gc.collect()  # outside of the handler, for the error holds on to what was in memory
        torch.cuda.empty_cache()
        if peak is None or peak > GPU_SHARE * total:
            return False
        taken[images] = peak
        return True

    images = largest(fits, most)
    torch.cuda.reset_peak_memory_stats(device)
    return Fit(images, taken.get(images, 0), total)


def _says_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch, or a library below it, could not get GPU memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _largest_on_cpu(trial: Callable[[int], None], most: int, _: torch.device) -> Fit:
    """Measure what two images and four take, and draw a line through both; or one image, where no more are asked for.

    A process that takes too much is killed without a word, so that nothing larger is tried out; nor are four images
    where they might not fit: they take at most twice as much as two.

    Raises:
        SpecError: The system does not tell what is taken and what is free, as all but Linux.
    """
    try:
        total = available_bytes()
        if most == 1:
            one = peak_bytes(trial, 1)
            return Fit(int(one <= CPU_SHARE * total), one, total)
        two = peak_bytes(trial, 2)
        four = peak_bytes(trial, 4) if 2 * two <= CPU_SHARE * total else 2 * two
    except OSError as error:
        raise SpecError(
            'train.batch is "auto", but this system does not tell how much memory a step takes: pass a number'
        ) from error
    return fit_on_line(two, four, total, most)


def fit_on_line(two: int, four: int, total: int, most: int) -> Fit:
    """Return the largest number of images of which at most `CPU_SHARE` of the memory is taken.

    Args:
        two: Bytes that a step with two images takes.
        four: Bytes that a step with four images takes.
        total: Bytes that there are.
        most: Most images.
    """
    per_image = max(four - two, 0) // 2

    def taken(images: int) -> int:
        return two + (images - 2) * per_image

    images = largest(lambda images: taken(images) <= CPU_SHARE * total, most)
    return Fit(images, taken(max(images, 1)), total)
