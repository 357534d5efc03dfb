"""The largest batch that fits: tried out before a run, on a detector and an optimizer that are thrown away."""

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ldctl import distributed
from ldctl.assemble import Setting, note
from ldctl.boxes import PAD_MULTIPLE
from ldctl.checkpoint import CheckpointMeta
from ldctl.data import DataSpec
from ldctl.data.augment import canvas, eval_view, place
from ldctl.errors import SpecError, TrainingError
from ldctl.models.detector import Detector, ModelSpec
from ldctl.optim import scaled_lr
from ldctl.samples import Dataset
from ldctl.spec import AUTO, DistillSpec, RunSpec, TeacherSpec, TrainSpec
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

    def __call__(self, images: int) -> None:
        """Take two steps: the second one with the optimizer's state in memory, and both as at the start of an epoch."""
        parts = min(self.spec.train.accumulate, 2)  # the second finds the first one's gradients in memory
        train = self.spec.train.model_copy(update={"batch": images * parts, "accumulate": parts})
        trainer = Trainer(self._job(train))
        trainer.wrapped.train()
        batch = largest_batch(
            self.setting.train_set,
            self.spec.data,
            images * parts,
            self.teaching.scale if self.teaching else 1.0,
            self.setting.device,
        )
        buckets = [torch.zeros_like(p) for p in trainer.learner.parameters() if p.requires_grad and self.has_buckets]
        for _ in range(2):
            trainer.take_step(batch)  # the run's own step, micro-batches and all
        del buckets

    def _job(self, train: TrainSpec) -> Job:
        """Return a job of its own detector, with random weights."""

        def meta(_: dict[str, float]) -> CheckpointMeta:
            raise AssertionError("nothing of a trial is saved")

        return Job(
            name="trial",
            folder=Path(os.devnull),
            detector=Detector(self.model, len(self.setting.train_set.classes)).to(self.setting.device),
            teaching=self.teaching,
            train=train,
            data=self.spec.data,
            postprocess=self.spec.postprocess,
            train_set=self.setting.train_set,
            val_set=self.setting.val_set,
            meta=meta,
            device=self.setting.device,
            quiet=True,
        )


def largest_batch(dataset: Dataset, spec: DataSpec, images: int, teacher_scale: float, device: torch.device) -> Batch:
    """Return a batch that takes as much memory as any of a data set can.

    Its height is that of the highest image, its width that of the widest one, as in batches of both orientations, or
    it is a canvas; the objects are those of the image with the most.

    Args:
        dataset: What to train on.
        spec: Sizes.
        images: How many.
        teacher_scale: See `train_batches`.
        device: Where to put it.
    """
    views = [eval_view(sample, spec) for sample in dataset.samples]
    fullest = max(range(len(views)), key=lambda index: int((~dataset.samples[index].is_crowd).sum()))
    held = [canvas(dataset.samples[fullest], spec)] if spec.canvas else views
    multiple = round(PAD_MULTIPLE / min(teacher_scale, 1.0))
    height, width = (
        -(-side // multiple) * multiple for side in (max(v.height for v in held), max(v.width for v in held))
    )
    objects = place(dataset.samples[fullest], views[fullest])
    xyxy, label = torch.from_numpy(objects.xyxy), torch.from_numpy(objects.label)

    def repeated(value: Tensor) -> Tensor:
        return value.expand(images, *value.shape).to(device)

    def noise(scale: float) -> Tensor:
        return torch.randint(
            256, (images, 3, int(height * scale), int(width * scale)), dtype=torch.uint8, device=device
        )

    size_hw = repeated(torch.tensor([height, width]))
    is_annotated = all(sample.is_labelled for sample in dataset.samples)
    return Batch(
        images=noise(1.0),
        size_hw=size_hw,
        original_hw=size_hw,
        image_id=tuple(range(images)),
        targets=Targets(repeated(xyxy), repeated(label), repeated(torch.ones(len(label), dtype=torch.bool))),
        for_teacher=None
        if teacher_scale == 1
        else Scaled(noise(teacher_scale), (size_hw * teacher_scale).to(size_hw.dtype)),
        is_labelled=None if is_annotated else torch.arange(images, device=device) % 2 == 0,
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
    """Measure what two images and four take, and draw a line through both.

    A process that takes too much is killed without a word, so that nothing larger is tried out; nor are four images
    where they might not fit: they take at most twice as much as two.

    Raises:
        SpecError: The system does not tell what is taken and what is free, as all but Linux.
    """
    try:
        total = available_bytes()
        two = peak_bytes(trial, 2)
        four = peak_bytes(trial, 4) if 2 * two <= CPU_SHARE * total else 2 * two
    except OSError as error:
        raise SpecError(
            'train.batch is "auto", but this system does not tell how much memory a step takes: pass a number'
        ) from error
    return fit_on_line(two, four, total, most)


def peak_bytes(trial: Callable[[int], None], images: int) -> int:
    """Return by how much a trial raises this process's memory.

    Raises:
        OSError: The system does not say.
    """
    return_free_memory()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew. Source: Linux, proc(5)
    trial(images)
    return max(resident_bytes("VmHWM") - before, 0)


def return_free_memory() -> None:
    """Give what was freed back to the system, as far as the C library can: else a step that takes it again is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


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


def resident_bytes(key: str) -> int:
    """Return what the kernel says of this process's memory: `VmRSS` now, `VmHWM` at most since the peak was reset.

    Raises:
        OSError: It does not say.
    """
    return _kilobytes(Path("/proc/self/status"), key)


def available_bytes() -> int:
    """Return the memory that this process can still have: its part, among the ranks of this machine, of what is free.

    Raises:
        OSError: The system does not say.
    """
    free = [_kilobytes(Path("/proc/meminfo"), "MemAvailable")]
    group = Path("/sys/fs/cgroup")  # of a container
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        free.append(int(text) - int((group / "memory.current").read_text()))
    return max(min(free), 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _kilobytes(path: Path, key: str) -> int:
    """Return the value of `key: value kB` in a file of the kernel's, in bytes."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{path} has no {key}")
