"""Small data sets on disk for the tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ldctl.data.images import read_sample
from ldctl.data.table import fingerprint, pack
from ldctl.samples import Dataset, Sample


def write_image(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return path


def box(number: int, image_id: int, xywh: list[object], category: object = 1, **more: object) -> dict[str, object]:
    area = 100.0
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": xywh,
        "area": area,
        "iscrowd": 0,
    } | more


def coco_document(num_images: int = 3) -> dict[str, list[object]]:
    """64 x 48 images `0.jpg`, `1.jpg`, ... with ids from 10, one box each; categories 1 and 7."""
    return {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(num_images)],
        "annotations": [box(100 + i, 10 + i, [4 + i, 5, 20, 10], category=(1, 7)[i % 2]) for i in range(num_images)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}],
    }


def write_coco(root: Path, document: object, split: str = "train", num_images: int = 3) -> Path:
    """Write images and an annotation file in COCO's own layout."""
    for index in range(num_images):
        write_image(root / f"{split}2017" / f"{index}.jpg", seed=index)
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def image_dataset(root: Path, sizes_hw: list[tuple[int, int]], objects: int = 2) -> Dataset:
    """Images of given sizes, image `i` with `i % (objects + 1)` boxes and one crowd."""
    samples = []
    for index, (height, width) in enumerate(sizes_hw):
        file = write_image(root / f"{index}.png", width, height, seed=index)
        count = index % (objects + 1) + 1
        corner = np.arange(count, dtype=np.float32)[:, None] * 3
        xyxy = np.concatenate((corner, corner, corner + 10, corner + 12), axis=1)
        is_crowd = np.arange(count) == count - 1
        label = np.arange(count) % 2
        samples.append(
            Sample(1000 + index, str(file), height, width, xyxy, label, np.full(count, 120, np.float32), is_crowd)
        )
    classes, ids = ("a", "b"), (1, 2)
    packed = pack(samples)
    return Dataset("test", classes, ids, packed, read_sample, fingerprint(classes, ids, packed))
