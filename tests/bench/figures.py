"""What benchmarks share: timing in turns, peak memory, and results as lines of JSON.

`pytest -m bench -s tests/bench` prints a line for each result, with its ratio to a baseline measured in the same run:
other work on the machine moves times, and ratios less.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ldctl.types import Targets

SHARED = Path(__file__).parents[3] / "shared"
MMDET = os.environ.get("MMDET_PYTHON", "")  # the interpreter of an environment with mmdet, to be timed in the same run


def report(**record: object) -> None:
    """Print a result."""
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}))


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each work, done in turns so that what else the machine does falls on all alike.

    The first round, which warms up, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with some threads; the tests use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_mb(work: Callable[[], object]) -> float:
    """Return how much memory a work takes at most, beyond what the process holds before it; on Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _resident_mb("VmRSS")
    work()
    return _resident_mb("VmHWM") - before


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def coco_like(num_images: int, num_objects: int, height: int, width: int, num_classes: int) -> Targets:
    """Return objects of all sizes, evenly spread over their logarithm, as mmdet's benchmark draws them."""
    rng = np.random.RandomState(0)
    boxes, labels = [], []
    for _ in range(num_images):
        center = rng.uniform(0, 1, (num_objects, 2)) * [width, height]
        side = np.exp(rng.uniform(np.log(12), np.log(0.8 * min(height, width)), (num_objects, 2)))
        box = np.concatenate((np.maximum(center - side / 2, 0), np.minimum(center + side / 2, [width, height])), axis=1)
        box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 4)
        boxes.append(torch.from_numpy(box.astype(np.float32)))
        labels.append(torch.from_numpy(rng.randint(0, num_classes, num_objects)))
    return Targets(torch.stack(boxes), torch.stack(labels), torch.ones(num_images, num_objects, dtype=torch.bool))


def mmdet_ms(*arguments: str) -> dict[str, float]:
    """Return the milliseconds that mmdet's own benchmark measures for each part; empty where there is no mmdet."""
    script = SHARED / "bench_mmdet" / "bench_ref.py"
    if not MMDET or not script.exists():
        return {}
    done = subprocess.run([MMDET, script, *arguments], capture_output=True, text=True, check=True, cwd=script.parent)
    rows = (line.rsplit("median", 1) for line in done.stdout.splitlines() if " median " in line)
    return {name.strip(): float(rest.split()[0]) for name, rest in rows}
