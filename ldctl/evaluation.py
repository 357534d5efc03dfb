"""`ldctl eval`: the figures of a detector, and how fast it is."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ldctl import distributed
from ldctl.assemble import choose_device, load_detector, note_faults
from ldctl.checkpoint import CheckpointMeta
from ldctl.data import in_class_order, open_dataset
from ldctl.data.check import inspect
from ldctl.data.loader import eval_batches
from ldctl.errors import DataError, OutputError
from ldctl.files import write_whole
from ldctl.metrics import (
    Metrics,
    metrics_table,
    per_class_table,
    read_coco_results,
    to_coco_results,
)
from ldctl.metrics import evaluate as evaluate_detections
from ldctl.models.detector import Detector
from ldctl.predict import find, predict, to_device
from ldctl.samples import Dataset
from ldctl.spec import EvalSpec

LEAST_WIDTH = 60  # columns of the tables: in fewer, rich leaves cells empty; a terminal wraps the lines

# Of the latency: images that are held in memory and shown in turn, runs before and while it is measured, and when to
# stop although there were fewer.
LATENCY_IMAGES, WARM_UP_RUNS, TIMED_RUNS, LATENCY_SECONDS = 20, 3, 50, 10.0


@dataclass(frozen=True)
class Speed:
    """How fast a detector is.

    Attributes:
        device: Where it ran.
        images_per_second: Of the whole pass over the data set, from the files to final boxes.
        batch: Images at once in that pass.
        latency_median_ms: One image at a time, from pixels on the device to final boxes: network and postprocessing.
        latency_p95_ms: 95th percentile of the same.
        latency_runs: Images that were timed.
        latency_height_px: Size of the network's input in these runs; their images have the commonest size of the set.
        latency_width_px: As `latency_height_px`.
    """

    device: str
    images_per_second: float
    batch: int
    latency_median_ms: float
    latency_p95_ms: float
    latency_runs: int
    latency_height_px: int
    latency_width_px: int


@dataclass(frozen=True)
class Evaluation:
    """What `ldctl eval` finds.

    Attributes:
        metrics: The COCO figures.
        speed: None where saved detections were evaluated.
    """

    metrics: Metrics
    speed: Speed | None

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON holds it: the figures, `per_class`, and `speed` where it is known."""
        figures: dict[str, object] = {**self.metrics.to_json()}
        return figures | {"speed": asdict(self.speed)} if self.speed else figures


def evaluate(
    spec: EvalSpec, *, detections: Path | None = None, save_detections: Path | None = None, quiet: bool = False
) -> Evaluation:
    """Evaluate a checkpoint, or detections that were saved before.

    Args:
        spec: Checkpoint, data, thresholds.
        detections: COCO results to evaluate instead of running the detector.
        save_detections: Where to write the detections as COCO results.
        quiet: No progress display.
    """
    if save_detections and save_detections.exists():
        raise OutputError(f"{save_detections}: exists already: pass another --save-detections")
    device = choose_device(spec.device)
    detector, meta = load_detector(Path(spec.checkpoint))
    inspection = inspect(open_dataset(spec.data, "val"))
    note_faults([str(fault) for fault in inspection.faults])
    dataset = match_classes(meta, inspection.dataset, Path(spec.checkpoint))
    speed = None
    if detections:
        found = read_coco_results(detections, dataset)
    else:
        detector.to(device).eval()
        with Console(stderr=True, quiet=quiet).status("") as status:
            start = time.perf_counter()
            found = predict(
                detector,
                dataset,
                spec.data,
                spec.postprocess,
                batch_size=spec.batch,
                device=device,
                on_batch=lambda done, total: status.update(f"image {done} of {total}"),
            )
            images_per_second = len(found) / (time.perf_counter() - start)
            status.update("latency")
            speed = measure_speed(detector, dataset, spec, device, images_per_second)
    if save_detections:
        write_whole(save_detections, json.dumps(to_coco_results(dataset, found)).encode())
    return Evaluation(evaluate_detections(dataset, found), speed)


def measure_speed(
    detector: Detector, dataset: Dataset, spec: EvalSpec, device: torch.device, images_per_second: float
) -> Speed:
    """Time a detector at batch 1 on images of the data set's commonest size, for ten seconds at most and one image.

    Args:
        detector: On `device`, in evaluation mode.
        dataset: At least one image.
        spec: How to load the images, and thresholds.
        device: Where to compute.
        images_per_second: Of the whole pass.
    """
    sizes = list(zip(dataset.samples.height.tolist(), dataset.samples.width.tolist(), strict=True))
    commonest = Counter(sizes).most_common(1)[0][0]
    alike = np.array([row for row, size in enumerate(sizes) if size == commonest][:LATENCY_IMAGES])
    part = replace(dataset, samples=dataset.samples.take(alike))
    loading = spec.data.model_copy(update={"workers": 0})
    batches = [to_device(batch, device) for batch in eval_batches(part, loading, batch_size=1)]
    seconds: list[float] = []
    end = time.perf_counter() + LATENCY_SECONDS
    for batch in islice(cycle(batches), WARM_UP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        find(detector, batch, spec.postprocess)  # its boxes are on the CPU: the device has nothing left to do
        seconds.append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    timed = seconds[min(WARM_UP_RUNS, len(seconds) - 1) :]
    median, p95 = np.percentile(timed, (50, 95)) * 1000
    height, width = batches[0].images.shape[-2:]
    return Speed(
        device=_title(device),
        images_per_second=images_per_second,
        batch=spec.batch,
        latency_median_ms=float(median),
        latency_p95_ms=float(p95),
        latency_runs=len(timed),
        latency_height_px=height,
        latency_width_px=width,
    )


def match_classes(meta: CheckpointMeta, dataset: Dataset, path: Path) -> Dataset:
    """Return the data set with its classes in the detector's order.

    Raises:
        DataError: They are not the same classes; names what differs.
    """
    missing = [name for name in dataset.classes if name not in meta.classes]
    extra = [name for name in meta.classes if name not in dataset.classes]
    if not missing and not extra:
        return in_class_order(dataset, meta.classes)
    said = [f"it lacks {_list(missing)}"] * bool(missing) + [f"the data has no {_list(extra)}"] * bool(extra)
    difference = ", ".join(said)
    raise DataError(
        f"{path}: knows {len(meta.classes)} classes, {dataset.name} has {len(dataset.classes)}: {difference}: "
        "use a detector that was trained on these classes"
    )


def print_metrics(results: Mapping[str, Metrics], *, per_class: bool = False) -> None:
    """Print the figures of some detectors side by side on stdout."""
    if not distributed.is_main():
        return
    console = _console()
    console.print(metrics_table(results))
    if per_class:
        console.print(per_class_table(results))


def print_speed(speed: Speed) -> None:
    """Print how fast a detector is on stdout."""
    console = _console()
    console.print(speed_table(speed))
    console.print(
        f"latency: network and boxes, batch 1, input {speed.latency_height_px} x {speed.latency_width_px} px, "
        f"{speed.latency_runs} runs on {speed.device}",
        soft_wrap=True,
    )


def speed_table(speed: Speed) -> Table:
    """Lay out the figures of speed."""
    table = Table("speed")
    table.add_column("", justify="right")
    table.add_row(f"images/s, files to boxes, batch {speed.batch}", f"{speed.images_per_second:.1f}")
    table.add_row("latency, median", f"{speed.latency_median_ms:.1f} ms")
    table.add_row("latency, 95th percentile", f"{speed.latency_p95_ms:.1f} ms")
    return table


def _console() -> Console:
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    return console


def _title(device: torch.device) -> str:
    """Return what to call a device: a GPU by its name, a CPU with the number of its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
