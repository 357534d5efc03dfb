"""A teacher that is paid for once: build the cache of its outputs, and hold a cache against the run that reads it."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ldctl import checkpoint
from ldctl.assemble import Setting, choose_device, compare_classes, load_detector, note, note_faults
from ldctl.assign import assign, assign_fcos
from ldctl.boxes import PAD_MULTIPLE, location_grid
from ldctl.checkpoint import CheckpointMeta
from ldctl.classes import ClassMatch
from ldctl.data import DataSpec, open_dataset
from ldctl.data.augment import fixed_view, place
from ldctl.data.cache_writer import CacheWriter, partial_path
from ldctl.data.check import inspect
from ldctl.data.loader import padded, view_batches, view_plan
from ldctl.data.teacher_cache import CacheHeader, Dtype, TeacherCache, ViewRows, open_cache, view_number
from ldctl.distill import KD, LD, BCKDBox, BinaryKD
from ldctl.errors import DataError, OutputError, SpecError
from ldctl.log import PassProgress
from ldctl.metrics import Metrics
from ldctl.models.detector import STRIDES, Detector
from ldctl.predict import to_device
from ldctl.regions import vlr_region
from ldctl.spec import DistillSpec
from ldctl.step import padded_hw
from ldctl.toml_text import literal
from ldctl.trainer import interrupts, stops
from ldctl.types import Batch, Dataset, Locations, Targets

SUFFIX = ".cache"
PROBED_VIEWS = 256  # of which the size of all is predicted
SPARE = 1.05  # how much more room than predicted there has to be
REGIONS = ("main", "vlr")  # which follow from the objects alone, and are small

# --- what can be learnt from a cache --------------------------------------------------------------------------------


def check_recipe(spec: DistillSpec) -> None:
    """Refuse a run that asks a teacher for more than a cache can hold; needs no file.

    Raises:
        SpecError: Names what it asks for, and what works instead.
    """
    fault = _fault_of_views(spec)
    if fault is None and spec.assistant:
        fault = "assistant: a cache holds what one teacher says: distil the assistant alone, and then cache that"
    for index, term in enumerate(spec.distill.terms):
        is_on_logits = isinstance(term, LD | KD | BinaryKD | BCKDBox)
        if fault is None and not (is_on_logits and term.region in REGIONS):
            mend = f"pass --set distill.terms.{index}.region=main" if is_on_logits else "leave the term out"
            fault = (
                f'distill.terms.{index}: "{term.kind}" looks at more than what the teacher says in the main region and '
                f"the VLR, which is what a cache holds: {mend}, or pass --preset ld-full or ld-main"
            )
    if fault:
        raise SpecError(fault)


def _fault_of_views(spec: DistillSpec) -> str | None:
    """Return why a cache cannot hold all views of the images, and what to change; none where it can."""
    data, (low, high) = spec.data, spec.data.short_side
    if low != high:
        return (
            f"data.short_side [{low}, {high}] is a range, which gives an image more views than a cache can hold: "
            f"pass --set data.short_side=[{high},{high}]"
        )
    if not data.canvas:
        return (
            "data.canvas is false, so that what a teacher says of an image depends on the others of its batch: "
            "pass --set data.canvas=true"
        )
    if spec.teacher.scale != 1:
        return f"teacher.scale {spec.teacher.scale:g} does not go with a cache: pass --set teacher.scale=1"
    if data.unlabelled is not None:
        return (
            "data.unlabelled: where to look in images without annotations only a teacher can say: pass --teacher FILE "
            "instead of a cache, or leave it out"
        )
    return None


def open_matching(spec: DistillSpec) -> TeacherCache:
    """Open the cache of a run, before any data is read.

    Raises:
        SpecError: The run asks for more than a cache can hold, or for something else than this one holds.
        CheckpointError: The cache is missing or damaged.
    """
    assert spec.teacher.cache is not None, "asked for where there is one"
    check_recipe(spec)
    path = Path(spec.teacher.cache)
    cache = open_cache(path)
    teacher = Path(spec.teacher.path or "")
    if teacher.is_file() and checkpoint.sha256(teacher) != cache.header.teacher_sha256:
        raise SpecError(
            f"{path}: is not of {teacher}: leave out --teacher, or make a cache of it with `ldctl teacher cache`"
        )
    differs = {key: value for key, value in _built_for(cache.header, spec).items() if value[0] != value[1]}
    if differs:
        said = "; ".join(f"{key} {literal(held)}, not {literal(asked)}" for key, (held, asked) in differs.items())
        mend = " ".join(f"--set {key}={literal(held).replace(' ', '')}" for key, (held, _) in differs.items())
        raise SpecError(f"{path}: was made for {said}: pass {mend}, or make another with `ldctl teacher cache`")
    return cache


def _built_for(header: CacheHeader, spec: DistillSpec) -> dict[str, tuple[object, object]]:
    """Return the keys on which views and regions depend: what a cache was made for, and what a run asks for."""
    data, distill = spec.data, spec.distill
    has_flips = set(flips(data)) <= set(header.flips)
    # heads other than FCOS's have one rule
    head = spec.student.head.kind
    kind = head if assignment(spec) == header.assignment else {"fcos": "fcos", "atss": "gfl"}[header.assignment]
    asked: dict[str, tuple[object, object]] = {
        "data.short_side": ([header.short_side] * 2, list(data.short_side)),
        "data.long_side": (header.long_side, data.long_side),
        "data.flip": (data.flip if has_flips else float(header.flips[0]), data.flip),
        "student.head.kind": (kind, head),
    }
    if any(term.region == "vlr" for term in distill.terms):
        asked |= {"distill.vlr": (header.vlr, distill.vlr), "distill.gamma": (header.gamma, distill.gamma)}
    return asked


def check_data(cache: TeacherCache, match: ClassMatch, dataset: Dataset) -> None:
    """Refuse a cache of other images or classes.

    Raises:
        DataError: They are not the same.
    """
    if not match.is_complete:
        raise DataError(_other_classes(cache.path, match))
    if cache.header.train_fingerprint != dataset.fingerprint:
        raise DataError(
            f"{cache.path}: is of other images or boxes than {dataset.name}: mend --data, or make a cache of these "
            "with `ldctl teacher cache`"
        )


def _other_classes(path: Path, match: ClassMatch) -> str:
    return (
        f"{path}: the data has the classes {', '.join(match.student)}, the teacher {', '.join(match.teacher)}: a cache "
        "needs the same: pass --teacher FILE without --cache, or say which are the same with "
        "--set 'teacher.classes={...}'"
    )


def recall(cache: TeacherCache, setting: Setting) -> dict[str, Metrics]:
    """Say what is known of a teacher that is not here; return its metrics by name, if they are of the same images."""
    header = cache.header
    is_same = header.metrics_fingerprint == setting.fingerprint and "ap" in header.metrics
    said = f"teacher: not loaded, all that it says is in {cache.path}"
    if "ap" in header.metrics:
        said += f"; its file says AP {header.metrics['ap']:.3f} for {'the same images' if is_same else 'others'}"
    note(said)
    return {"teacher": Metrics(**header.metrics, per_class={})} if is_same else {}


# --- building one ---------------------------------------------------------------------------------------------------


def cache_teacher(spec: DistillSpec, target: Path | None, dtype: Dtype, *, quiet: bool = False) -> str:
    """Write what a teacher says of all views of the training images, where terms of a run may look; go on if begun.

    Args:
        spec: The run that is to read it.
        target: The file; by default beside the teacher's.
        dtype: Of the logits.
        quiet: No progress display.

    Returns:
        What was written.

    Raises:
        SpecError: The run asks for what a cache cannot hold, or the teacher for a wider `dtype`.
        DataError: The data cannot be read, or has other classes than the teacher.
        OutputError: The file exists or cannot be written, or there is too little room.
        Interrupted: A signal asked to stop; what was done is kept.
    """
    assert spec.teacher.path is not None, "an argument of the command"
    check_recipe(spec)
    source = Path(spec.teacher.path)
    target = target or source.with_suffix(SUFFIX)
    checkpoint.check_new(target)
    device = choose_device(spec.device)
    loaded, meta = load_detector(source)
    teacher = loaded.eval().requires_grad_(False).to(device)
    inspection = inspect(open_dataset(spec.data, "train"))
    note_faults([str(fault) for fault in inspection.faults])
    dataset = inspection.dataset
    match = compare_classes(meta.classes, spec, dataset.classes)
    if not match.is_complete:
        raise DataError(_other_classes(source, match))
    bf16 = spec.train.bf16 and device.type == "cuda"
    header = header_of(spec, meta, checkpoint.sha256(source), dataset, dtype, bf16=bf16)
    note(predicted_size(spec, header, dataset, target))
    plan = view_plan(dataset, header.batch, header.flips)
    numbers = [[view_number(image, is_flipped) for image, is_flipped in batch] for batch in plan]
    with closing(CacheWriter(target, header, numbers)) as writer:
        todo = plan[writer.num_done :]
        num_done = header.num_views - sum(map(len, todo))
        if num_done:
            note(f"cache: {num_done} of {header.num_views} views are there already")
        batches = view_batches(dataset, spec.data, todo, batch_size=header.batch)
        progress = PassProgress("cache", "views", header.num_views, first=num_done, quiet=quiet)
        with interrupts() as stop, progress, closing(batches):
            for views, batch in zip(todo, batches, strict=True):
                rows = taught_rows(teacher, spec, header, to_device(batch, device))
                writer.append(rows[: len(views)])
                num_done += len(views)
                progress.update(num_done)
                if stop.received is not None:
                    raise stops()[stop.received](
                        f"cache: stopped after {num_done} of {header.num_views} views; repeat the command to go on"
                    )
        writer.finish()
    size = target.stat().st_size
    return f"{target}: {header.num_views} views, {_mb(size)}, {size / header.num_views / 1e3:.1f} kB each"


def header_of(
    spec: DistillSpec, meta: CheckpointMeta, sha256: str, dataset: Dataset, dtype: Dtype, *, bf16: bool
) -> CacheHeader:
    """Return what a cache of a teacher for a run says of itself.

    Args:
        spec: The run.
        meta: Of the teacher's file.
        sha256: Of the teacher's file.
        dataset: Training images.
        dtype: Of the logits.
        bf16: Whether the teacher computes in bfloat16.
    """
    head = meta.model["head"]
    return CacheHeader(
        teacher_sha256=sha256,
        model=meta.model,
        classes=meta.classes,
        metrics=meta.metrics,
        metrics_fingerprint=meta.data_fingerprint,
        train_fingerprint=dataset.fingerprint,
        num_images=len(dataset.samples),
        flips=flips(spec.data),
        short_side=spec.data.short_side[1],
        long_side=spec.data.long_side,
        assignment=assignment(spec),
        vlr=spec.distill.vlr,
        gamma=spec.distill.gamma,
        dtype=dtype,
        num_bins=head["reg_max"] + 1,
        has_quality=head["kind"] != "gfl",
        num_locations=sum(height * width for height, width in _level_sizes(spec.data)),
        batch=spec.train.batch // spec.train.accumulate,
        bf16=bf16,
        versions=checkpoint.package_versions(),
    )


@torch.no_grad()
def taught_rows(teacher: Detector, spec: DistillSpec, header: CacheHeader, batch: Batch) -> list[ViewRows]:
    """Return what the teacher says of each image of a batch, where terms may look.

    On one thread of a CPU an image's values were found not to depend on the other images of its batch, nor on their
    number from two on; those of an image that is alone in its batch are rounded otherwise.

    Raises:
        SpecError: A value is beyond the header's `dtype`.
    """
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=header.bf16):
        dense = teacher(teacher.normalize(batch.images, batch.size_hw))
    assert len(dense.locations.level) == header.num_locations, "the batch is a canvas"
    locations = location_grid(dense.locations.level_hw, STRIDES, batch.images.device, spec.student.head.location_offset)
    mask = may_be_looked_at(spec, locations, batch.targets, batch.size_hw)
    row = mask.flatten().nonzero().squeeze(1)
    ends = mask.sum(dim=1).cumsum(dim=0)[:-1].cpu().numpy()

    def split(value: Tensor) -> list[np.ndarray]:
        return np.split(value.cpu().numpy(), ends)

    def kept(value: Tensor) -> list[np.ndarray]:
        chosen = value.flatten(0, 1)[row].to(getattr(torch, header.dtype))
        if not chosen.isfinite().all():
            raise SpecError(
                f"--dtype {header.dtype}: the teacher's logits are beyond it: pass --dtype float32, or another teacher"
            )
        return split(chosen)

    location = split((row % header.num_locations).int())
    quality = kept(dense.quality) if dense.quality is not None else [None] * len(location)
    parts = zip(location, kept(dense.edge), kept(dense.cls), quality, strict=True)
    return [ViewRows(*part) for part in parts]


@torch.no_grad()
def may_be_looked_at(
    spec: DistillSpec, locations: Locations, targets: Targets, size_hw: Int[Tensor, "B 2"]
) -> Bool[Tensor, "B A"]:
    """Tell which locations are in the main region or in the VLR; follows from the objects alone.

    Args:
        spec: The student's head, whose rule assigns objects, and how the VLR is drawn.
        locations: The student's.
        targets: Objects.
        size_hw: Sizes of the images.
    """
    rule = assign_fcos if assignment(spec) == "fcos" else assign
    assigned = rule(locations, targets, padded_hw(size_hw), 1)  # which class is of no interest
    vlr = vlr_region(spec.distill, assigned, targets, locations)
    assert isinstance(vlr.row, Tensor), "some locations, not all"
    return assigned.is_positive.flatten().index_fill(0, vlr.row, True).view_as(assigned.is_positive)


def predicted_size(spec: DistillSpec, header: CacheHeader, dataset: Dataset, target: Path) -> str:
    """Return how large a cache is going to be, after assigning the objects of some of its views.

    Raises:
        OutputError: There is less room than that.
    """
    views = [view for batch in view_plan(dataset, header.batch, header.flips) for view in batch]
    probed = views[:: max(len(views) // PROBED_VIEWS, 1)]
    num_rows = sum(_count_rows(spec, dataset, *view) for view in probed)
    size = len(header.packed()) + header.num_views * (num_rows / len(probed) * header.row_bytes + 12)
    folder = next(path for path in target.absolute().parents if path.exists())
    begun = partial_path(target)
    free = shutil.disk_usage(folder).free + (begun.stat().st_blocks * 512 if begun.exists() else 0)
    said = f"{target}: {header.num_views} views, about {_mb(size)}, {size / header.num_views / 1e3:.1f} kB each"
    if free < size * SPARE:
        raise OutputError(f"{said}; only {_mb(free)} are free: free some space, or choose another --output")
    return f"{said}; {_mb(free)} are free"


def _count_rows(spec: DistillSpec, dataset: Dataset, index: int, is_flipped: bool) -> int:
    sample = dataset.samples[index]
    view = fixed_view(sample, spec.data, is_flipped)
    is_wide = sample.width > sample.height
    sizes = _level_sizes(spec.data, is_wide=is_wide)
    locations = location_grid(sizes, STRIDES, torch.device("cpu"), spec.student.head.location_offset)
    targets = padded([place(sample, view)], 1)
    return int(may_be_looked_at(spec, locations, targets, torch.tensor([[view.height, view.width]])).sum())


def _level_sizes(data: DataSpec, *, is_wide: bool = True) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of each pyramid level on a canvas."""
    sides = [-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in (data.short_side[1], data.long_side)]
    height, width = sides if is_wide else reversed(sides)
    return tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)


def flips(data: DataSpec) -> tuple[bool, ...]:
    """Return whether views are mirrored: never, always, or either."""
    return {0.0: (False,), 1.0: (True,)}.get(data.flip, (False, True))


def assignment(spec: DistillSpec) -> Literal["atss", "fcos"]:
    """Return the rule by which the student's head assigns objects."""
    return "fcos" if spec.student.head.kind == "fcos" else "atss"


def _mb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
