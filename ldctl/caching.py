"""A teacher that is paid for once: build the cache of what it says."""

import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ldctl import checkpoint
from ldctl.assemble import Setting, choose_device, compare_classes, frozen, load_detector, note, note_faults
from ldctl.assign import RULES
from ldctl.boxes import location_grid
from ldctl.cacheable import (
    READS_CLASSES,
    READS_EDGES,
    check_recipe,
    flips,
    level_sizes,
    num_locations,
    other_classes,
    regions_read,
)
from ldctl.checkpoint import CheckpointMeta
from ldctl.data import open_dataset
from ldctl.data.augment import fixed_view
from ldctl.data.augment import place as place_objects
from ldctl.data.cache_writer import CacheWriter, partial_path
from ldctl.data.check import inspect
from ldctl.data.loader import padded, view_batches, view_plan
from ldctl.data.teacher_cache import (
    ENTRY,
    CacheHeader,
    Dtype,
    TeacherCache,
    ViewRows,
    open_cache,
    view_number,
)
from ldctl.errors import CheckpointError, DataError, MissingError, OutputError, SpecError
from ldctl.log import PassProgress
from ldctl.metrics import Metrics
from ldctl.models.detector import STRIDES, Detector
from ldctl.predict import to_device
from ldctl.regions import meet, vlr_weights
from ldctl.samples import Dataset
from ldctl.spec import AUTO, DistillSpec
from ldctl.step import padded_hw
from ldctl.trainer import interrupts, stops
from ldctl.types import Batch, Locations, Targets

SUFFIX = ".cache"
PROBED_VIEWS = 256  # of which the size of all is predicted
SPARE = 1.05  # how much more room than predicted there has to be


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
        MissingError: The system is Windows.
        SpecError: The run asks for what a cache cannot hold, or the teacher for a wider `dtype`.
        DataError: The data cannot be read, or has other classes than the teacher.
        OutputError: The file exists or cannot be written, or there is too little room.
        Interrupted: A signal asked to stop; what was done is kept.
    """
    assert spec.teacher.path is not None, "an argument of the command"
    if sys.platform == "win32":  # which has neither the locks nor the renaming of open files that a writer needs
        raise MissingError("teacher cache: needs Linux or macOS: make the file there, or do without --cache")
    check_recipe(spec)
    if spec.train.batch == AUTO:
        raise SpecError('train.batch is "auto": pass --batch with the number that the run is going to have')
    source = Path(spec.teacher.path)
    target = target or source.with_suffix(SUFFIX)
    check_unbuilt(target)
    device = choose_device(spec.device)
    loaded, meta = load_detector(source)
    teacher = frozen(loaded, device)
    inspection = inspect(open_dataset(spec.data, "train"))
    note_faults([str(fault) for fault in inspection.faults])
    dataset = inspection.dataset
    match = compare_classes(meta.classes, spec, dataset.classes)
    if not match.is_complete:
        raise DataError(other_classes(source, match))
    fault = spec.fault_of_heads(teacher.spec)
    if fault is not None:
        raise SpecError(f"{source}: {fault}")
    bf16 = spec.train.bf16 and device.type == "cuda"
    header = header_of(spec, teacher, meta, dataset, dtype, bf16=bf16)
    note(predicted_size(spec, header, dataset, target))
    build(spec, teacher, header, dataset, target, device=device, quiet=quiet)
    size = target.stat().st_size
    return f"{target}: {header.num_views} views, {_mb(size)}, {size / header.num_views / 1e3:.1f} kB each"


def check_unbuilt(target: Path) -> None:
    """Refuse to overwrite a file, and say of a cache that it can be used.

    Raises:
        OutputError: It exists.
    """
    try:
        open_cache(target)
    except CheckpointError:
        checkpoint.check_new(target)
    else:
        raise OutputError(
            f"{target}: a finished cache already: pass it to `ldctl distill --cache` as it is, or another --output"
        )


def build(
    spec: DistillSpec,
    teacher: Detector,
    header: CacheHeader,
    dataset: Dataset,
    target: Path,
    *,
    device: torch.device,
    quiet: bool,
) -> None:
    """Write the cache, or the rest of it.

    Args:
        spec: The run that is to read it.
        teacher: On the device.
        header: What the cache says of itself.
        dataset: Training images.
        target: The file.
        device: Where to compute.
        quiet: No progress display.

    Raises:
        OutputError: See `CacheWriter`.
        Interrupted: A signal asked to stop; what was done is kept.
    """
    plan = view_plan(dataset, header.batch, header.flips)
    numbers = [[view_number(image, is_flipped) for image, is_flipped in batch] for batch in plan]
    with interrupts() as stop, closing(CacheWriter(target, header, numbers)) as writer:
        todo = plan[writer.num_done :]
        num_done = header.num_views - sum(map(len, todo))
        if num_done:
            note(f"cache: {num_done} of {header.num_views} views are there already")
        progress = PassProgress("cache", "views", header.num_views, first=num_done, quiet=quiet)
        batches = view_batches(dataset, spec.data, todo, batch_size=header.batch)
        with progress, closing(batches):
            for views, batch in zip(todo, batches, strict=True):
                rows = taught_rows(teacher, spec, header, to_device(batch, device))
                writer.append(rows[: len(views)])
                num_done += len(views)
                progress.update(num_done)
                if stop.received is not None and num_done < header.num_views:
                    raise stops()[stop.received](
                        f"cache: stopped after {num_done} of {header.num_views} views; repeat the command to go on"
                    )
        writer.finish()


def header_of(
    spec: DistillSpec, teacher: Detector, meta: CheckpointMeta, dataset: Dataset, dtype: Dtype, *, bf16: bool
) -> CacheHeader:
    """Return what a cache of a teacher for a run says of itself.

    Args:
        spec: The run.
        teacher: The teacher.
        meta: Of its file.
        dataset: Training images.
        dtype: Of the logits.
        bf16: Whether the teacher computes in bfloat16.
    """
    return CacheHeader(
        teacher_sha256=checkpoint.sha256(Path(spec.teacher.path or "")),
        model=meta.model,
        classes=meta.classes,
        metrics=meta.metrics,
        metrics_fingerprint=meta.val_fingerprint,
        train_fingerprint=dataset.fingerprint,
        num_images=len(dataset.samples),
        flips=flips(spec.data),
        short_side=spec.data.short_side[1],
        long_side=spec.data.long_side,
        scaled_jpeg=spec.data.scaled_jpeg,
        assignment=spec.student.head.traits.assignment,
        edge_regions=regions_read(spec, READS_EDGES),
        cls_regions=regions_read(spec, READS_CLASSES),
        vlr=spec.distill.vlr,
        gamma=spec.distill.gamma,
        dtype=dtype,
        num_bins=teacher.head.num_bins,
        has_quality=teacher.head.quality is not None,
        location_offset=teacher.head.location_offset,
        num_locations=num_locations(spec),
        batch=spec.train.batch_size // spec.train.accumulate,
        bf16=bf16,
        versions=checkpoint.package_versions(),
    )


@torch.no_grad()
def taught_rows(teacher: Detector, spec: DistillSpec, header: CacheHeader, batch: Batch) -> list[ViewRows]:
    """Return what the teacher says of each image of a batch, where terms may look.

    On one and two threads of a CPU an image's values were found not to depend on the other images of its batch, nor on
    their number from two on; those of an image that is alone in its batch are rounded otherwise.

    Raises:
        SpecError: A value is beyond the header's `dtype`.
    """
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=header.bf16):
        dense = teacher(teacher.normalize(batch.images, batch.size_hw))
    assert len(dense.locations.level) == header.num_locations, "the batch is a canvas"
    locations = students_locations(spec, dense.locations.level_hw, batch.images.device)
    masks = regions_told(spec, header, locations, batch.targets, batch.size_hw)

    def told(mask: Bool[Tensor, "B A"], *values: Tensor) -> list[list[np.ndarray]]:
        row = mask.flatten().nonzero().squeeze(1)
        ends = mask.sum(dim=1).cumsum(dim=0)[:-1].cpu().numpy()
        chosen = [value.flatten(0, 1)[row].to(getattr(torch, header.dtype)) for value in values]
        if not all(bool(value.isfinite().all()) for value in chosen):
            mend = "pass --dtype float32" if header.dtype == "float16" else "cache another teacher"
            raise SpecError(f"--dtype {header.dtype}: the teacher says what is not finite in it: {mend}")
        return [np.split(part.cpu().numpy(), ends) for part in ((row % header.num_locations).int(), *chosen)]

    edges = told(masks[0], dense.edge)
    classes = told(masks[1], dense.cls, *(() if dense.quality is None else (dense.quality,)))
    without = () if header.has_quality else ([None] * len(batch.image_id),)
    return [ViewRows(*parts) for parts in zip(*edges, *classes, *without, strict=True)]


@torch.no_grad()
def regions_told(
    spec: DistillSpec, header: CacheHeader, locations: Locations, targets: Targets, size_hw: Int[Tensor, "B 2"]
) -> tuple[Bool[Tensor, "B A"], Bool[Tensor, "B A"]]:
    """Tell at which locations a cache tells edges and classes; follows from the objects alone.

    Args:
        spec: The student's head, whose rule assigns objects, and how the VLR is drawn.
        header: In which regions.
        locations: The student's.
        targets: Objects.
        size_hw: Sizes of the images.
    """
    rule = RULES[spec.student.head.traits.assignment]
    assigned = rule(locations, targets, padded_hw(size_hw), 1)  # which class is of no interest
    met = meet(("vlr",), spec.distill, assigned, targets, locations)
    masks = {"main": assigned.is_positive, "vlr": vlr_weights(spec.distill, met, assigned, targets, locations) > 0}
    nowhere = torch.zeros_like(assigned.is_positive)
    edge, cls = (
        torch.stack([nowhere, *(masks[name] for name in regions)]).any(dim=0) & assigned.is_valid
        for regions in (header.edge_regions, header.cls_regions)
    )
    return edge, cls


def predicted_size(spec: DistillSpec, header: CacheHeader, dataset: Dataset, target: Path) -> str:
    """Return how large a cache is going to be, after assigning the objects of some of its views.

    Raises:
        OutputError: There is less room than that.
    """
    views = [view for batch in view_plan(dataset, header.batch, header.flips) for view in batch]
    probed = views[:: max(len(views) // PROBED_VIEWS, 1)]
    records = sum(_record_bytes(spec, header, dataset, *view) for view in probed)
    size = len(header.packed()) + header.num_views * (records / len(probed) + ENTRY.itemsize)
    folder = next(path for path in target.absolute().parents if path.exists())
    begun = partial_path(target)
    free = shutil.disk_usage(folder).free + (begun.stat().st_blocks * 512 if begun.exists() else 0)
    said = f"{target}: {header.num_views} views, about {_mb(size)}, {size / header.num_views / 1e3:.1f} kB each"
    if free < size * SPARE:
        raise OutputError(f"{said}; only {_mb(free)} are free: free some space, or choose another --output")
    return f"{said}; {_mb(free)} are free"


def _record_bytes(spec: DistillSpec, header: CacheHeader, dataset: Dataset, index: int, is_flipped: bool) -> int:
    """Return the size of a view's record; reads no pixels."""
    sample = dataset.samples[index]
    view = fixed_view(sample, spec.data, is_flipped)
    is_wide = sample.width > sample.height
    sizes = level_sizes(spec.data, is_wide=is_wide)
    locations = students_locations(spec, sizes, torch.device("cpu"))
    targets = padded([place_objects(sample, view)], 1)
    edge, cls = regions_told(spec, header, locations, targets, torch.tensor([[view.height, view.width]]))
    return header.record_bytes(int(edge.sum()), int(cls.sum()))


def students_locations(spec: DistillSpec, sizes_hw: tuple[tuple[int, int], ...], device: torch.device) -> Locations:
    """Return the locations of a student that need not be built."""
    head = spec.student.head
    return location_grid(sizes_hw, STRIDES, device, head.location_offset, head.prior_wh)


def _mb(size: int | float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def recorded_metrics(cache: TeacherCache, setting: Setting) -> dict[str, Metrics]:
    """Say what is known of a teacher that is not here; return its metrics by name, if they are of the same images."""
    header = cache.header
    is_same = header.metrics_fingerprint == setting.val_set.fingerprint and "ap" in header.metrics
    said = f"teacher: not loaded, all that it says is in {cache.path}"
    if "ap" in header.metrics:
        said += f"; its file says AP {header.metrics['ap']:.3f} for {'the same images' if is_same else 'others'}"
    note(said)
    return {"teacher": Metrics(**header.metrics, per_class={})} if is_same else {}
