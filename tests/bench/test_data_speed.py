"""How fast images arrive: `pytest -m bench -s tests/bench/test_data_speed.py` prints one line of JSON per result."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import report
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ldctl.data import DataSpec, open_dataset
from ldctl.data.augment import View, place, resize_size, show, train_view
from ldctl.data.check import inspect
from ldctl.data.images import read_sample
from ldctl.data.loader import epoch_order, train_batches
from ldctl.data.table import pack
from ldctl.samples import Dataset, Sample

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
COCO_IMAGES, COCO_BOXES, COCO_CLASSES = 118_287, 860_001, 80
WORKERS, BATCH, ROUNDS, MOST_OBJECTS = 2, 8, 3, 100
SPEC = DataSpec(path=str(BCCD), format="coco", workers=WORKERS)  # 800 x 1333, flipped half of the time

OPEN = """
import json, resource, sys, time
from pathlib import Path
from ldctl.data import DataSpec, open_dataset

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

spec, before, start = DataSpec(path=sys.argv[1]), resident(), time.perf_counter()
dataset = open_dataset(spec, "train")
seconds = time.perf_counter() - start
print(json.dumps([seconds, resident() - before, len(dataset.samples), dataset.fingerprint]))
"""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def jpeg(path: Path, height: int, width: int, seed: int = 0) -> Path:
    """Write a picture with about as many bytes as a photo of its size: coarse shapes and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (height, width, 1))
    pixels = (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    return path


def generated(folder: Path, count: int, height: int, width: int) -> Dataset:
    """Return JPEGs with seven boxes each."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        corner = rng.uniform(0, (width / 2, height / 2), (7, 2))
        xyxy = np.concatenate((corner, corner + rng.uniform(16, height / 2, (7, 2))), axis=1).astype(np.float32)
        file = jpeg(folder / f"{index}.jpg", height, width, seed=index)
        label, area = rng.integers(0, 3, 7), np.ones(7, np.float32)
        samples.append(Sample(index, str(file), height, width, xyxy, label, area, np.zeros(7, np.bool_)))
    return Dataset("generated", ("a", "b", "c"), (1, 2, 3), pack(samples), read_sample, "")


class Naive(TorchDataset[dict[str, Tensor]]):
    """The same views as many loaders make them: decoded by Pillow, floats from the start, a dictionary per image."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.dataset.samples[index]
        view = train_view(sample, SPEC, 0, 0, index)
        pixels = torch.from_numpy(np.array(Image.open(sample.file).convert("RGB"))).permute(2, 0, 1).float() / 255
        size = (view.height, view.width)
        resized = torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
        image = torch.zeros(3, *(-(-side // 32) * 32 for side in size))
        image[:, : view.height, : view.width] = resized.flip(-1) if view.is_flipped else resized
        objects = place(sample, view)
        count = len(objects.label)
        boxes, labels = torch.zeros(MOST_OBJECTS, 4), torch.zeros(MOST_OBJECTS, dtype=torch.int64)
        boxes[:count], labels[:count] = torch.from_numpy(objects.xyxy), torch.from_numpy(objects.label)
        return {
            "image": image,
            "boxes": boxes,
            "labels": labels,
            "count": torch.tensor(count),
            "size": torch.tensor([view.height, view.width]),
            "image_id": torch.tensor(sample.image_id),
        }


def pace(epoch: Callable[[], Iterable[object]], num_images: int) -> tuple[float, float]:
    """Return images per second and milliseconds of CPU time per image, workers included."""
    start, used = time.perf_counter(), cpu_seconds()
    for _ in epoch():
        pass
    return num_images / (time.perf_counter() - start), (cpu_seconds() - used) / num_images * 1000


@pytest.mark.bench
def test_loader_against_a_naive_one(tmp_path: Path) -> None:
    dataset = open_dataset(SPEC, "train") if BCCD.is_dir() else generated(tmp_path, 128, 480, 640)
    samples = dataset.samples
    samples = samples.take((samples.height == 480) & (samples.width == 640))  # the naive one needs them of one size
    dataset = replace(dataset, samples=samples[: len(samples) // BATCH * BATCH])
    order = epoch_order(dataset, BATCH, 0, 0).ravel().tolist()

    def ours() -> Iterable[object]:
        return train_batches(dataset, SPEC, batch_size=BATCH, seed=0, epoch=0)

    def naive() -> Iterable[object]:
        return DataLoader(Naive(dataset), batch_size=BATCH, sampler=order, num_workers=WORKERS)

    found: dict[str, list[tuple[float, float]]] = {"ours": [], "naive": []}
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on both alike
        found["ours"].append(pace(ours, len(order)))
        found["naive"].append(pace(naive, len(order)))
    rate, cpu = ({n: statistics.median(r[i] for r in rounds) for n, rounds in found.items()} for i in (0, 1))
    report(
        bench="loader",
        images=len(order),
        photos=BCCD.is_dir(),
        workers=WORKERS,
        images_per_second=rate["ours"],
        naive_images_per_second=rate["naive"],
        cpu_ms_per_image=cpu["ours"],
        naive_cpu_ms_per_image=cpu["naive"],
        times_less_cpu=cpu["naive"] / cpu["ours"],
    )
    assert cpu["naive"] > 2 * cpu["ours"]


@pytest.mark.bench
def test_large_photos(tmp_path: Path) -> None:
    """12 megapixels, shown at 800 x 1067: decoded as before by Pillow, in full, and at half the size."""
    height, width = 3000, 4000
    samples = list(generated(tmp_path, 3, height, width).samples)
    view = View(*resize_size(height, width, 800, 1333), is_flipped=False)
    ways: dict[str, Callable[[Sample], Tensor]] = {
        "pillow": lambda one: torch.from_numpy(np.array(Image.open(one.file))).permute(2, 0, 1).contiguous(),
        "full": read_sample,
        "scaled": lambda one: read_sample(one, (view.height, view.width)),
    }
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            start = time.process_time()
            for one in samples:
                show(way(one), view)
            used[name].append((time.process_time() - start) / len(samples) * 1000)
    ms = {name: min(values) for name, values in used.items()}
    report(bench="12 megapixels", **{f"{name}_ms": value for name, value in ms.items()})
    assert ms["pillow"] > 1.4 * ms["full"]
    assert ms["full"] > 1.2 * ms["scaled"]


@pytest.mark.bench
def test_checking_images_again(tmp_path: Path) -> None:
    count = 2000
    first = generated(tmp_path, 1, 480, 640).samples[0]
    content = Path(first.file).read_bytes()
    samples = [replace(first, image_id=i, file=str(tmp_path / f"x{i}.jpg")) for i in range(count)]
    for sample in samples:
        Path(sample.file).write_bytes(content)
    dataset = Dataset("many", ("a", "b", "c"), (1, 2, 3), pack(samples), read_sample, "", checked=tmp_path / "memory")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        assert inspect(dataset).faults == ()
        seconds.append(time.process_time() - start)
    first_time, again = seconds[0] / count, min(seconds[1:]) / count
    report(bench="check", cpu_us_per_image=first_time * 1e6, cpu_us_per_image_again=again * 1e6)
    assert first_time > 3 * again


def write_coco_sized(root: Path) -> None:
    """Write annotations like COCO's train split in number and bytes: of each field what COCO has, outlines included."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(600_000, COCO_IMAGES, replace=False))
    size = rng.integers(300, 641, (COCO_IMAGES, 2))
    image = rng.integers(0, COCO_IMAGES, COCO_BOXES)
    side = np.maximum(rng.random((COCO_BOXES, 2)) ** 2 * 0.9 * size[image], 2)
    corner = rng.random((COCO_BOXES, 2)) * (size[image] - side)
    category, is_crowd = rng.integers(1, COCO_CLASSES + 1, COCO_BOXES), rng.random(COCO_BOXES) < 0.012
    (root / "train2017").mkdir()
    (root / "train2017" / f"{ids[0]:012d}.jpg").touch()
    (root / "annotations").mkdir()
    with (root / "annotations" / "instances_train2017.json").open("w") as file:
        file.write('{"images": [')
        file.write(
            ", ".join(
                f'{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": "http://images.example/{i:012d}.jpg", '
                f'"height": {h}, "width": {w}, "date_captured": "2013-11-14 17:02:52", "id": {i}}}'
                for i, (w, h) in zip(ids.tolist(), size.tolist(), strict=True)
            )
        )
        file.write('], "annotations": [')
        rows = zip(
            ids[image].tolist(), corner.tolist(), side.tolist(), category.tolist(), is_crowd.tolist(), strict=True
        )
        file.write(
            ", ".join(
                f'{{"segmentation": [[{", ".join([f"{x:.2f}, {y:.2f}"] * 20)}]], "area": {w * h * 0.7:.4f}, "iscrowd": '
                f'{crowd:d}, "image_id": {of}, "bbox": [{x:.2f}, {y:.2f}, {w:.2f}, {h:.2f}], "category_id": {label}, '
                f'"id": {number}}}'
                for number, (of, (x, y), (w, h), label, crowd) in enumerate(rows, start=1)
            )
        )
        classes = ", ".join(f'{{"id": {i}, "name": "class {i}"}}' for i in range(1, COCO_CLASSES + 1))
        file.write(f'], "categories": [{classes}]}}')


@pytest.mark.bench
def test_opening_a_coco_sized_file(tmp_path: Path) -> None:
    """The first process builds the index, the others map it: half a second and 100 MB are the promise."""
    write_coco_sized(tmp_path)

    def opened() -> tuple[float, float, int, str]:
        done = subprocess.run([sys.executable, "-c", OPEN, tmp_path], capture_output=True, text=True, check=True)
        seconds, grown, images, mark = json.loads(done.stdout)
        return seconds, grown / 1e6, images, mark

    first, *again = [opened() for _ in range(1 + ROUNDS)]
    seconds, grown = (max(run[i] for run in again) for i in (0, 1))
    file = tmp_path / "annotations" / "instances_train2017.json"
    report(
        bench="open",
        images=COCO_IMAGES,
        boxes=COCO_BOXES,
        annotations_mb=file.stat().st_size / 1e6,
        index_mb=file.with_name(f"{file.name}.train.ldctl").stat().st_size / 1e6,
        first_s=first[0],
        first_mb=first[1],
        again_s=seconds,
        again_mb=grown,
    )
    assert {run[2:] for run in again} == {first[2:]}
    assert seconds <= 0.5
    assert grown <= 100
