"""COCO average precision of plain detections, the COCO results format, and the tables that show both."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from rich.table import Table
from torch import Tensor

from ldctl.curves import Boxes, Curves, Task, compare
from ldctl.errors import DataError
from ldctl.samples import Dataset, Sample
from ldctl.types import Detections

# Decimals of a pixel: corners in float32 do not give back the width that a file states; rounded to a
# thousandth they do.
DECIMALS = 3

TITLES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar1": "AR, 1 detection",
    "ar10": "AR, 10 detections",
    "ar100": "AR, 100 detections",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}


@dataclass(frozen=True)
class Metrics:
    """The 12 COCO figures, each in [0, 1]; NaN where undefined: no object to find (pycocotools says -1).

    `ap` and the recalls `ar*` are means over the classes that have objects and over the IoU thresholds .50:.05:.95;
    small is below 32^2 square pixels of annotated area, large is above 96^2. JSON gets null for NaN.

    Attributes:
        ap: Average precision, at most 100 detections per image, as all below but `ar1` and `ar10`.
        ap50: AP at IoU 0.5.
        ap75: AP at IoU 0.75.
        ap_small: AP of small objects.
        ap_medium: AP of medium objects.
        ap_large: AP of large objects.
        ar1: Average recall with the best detection of each image and class.
        ar10: Average recall with the 10 best.
        ar100: Average recall with the 100 best.
        ar_small: `ar100` of small objects.
        ar_medium: `ar100` of medium objects.
        ar_large: `ar100` of large objects.
        per_class: `ap` of each class, in the order of the data set's classes.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Return the 12 figures by name, in the order of COCO's summary; NaN where undefined."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "per_class"}

    def to_json(self) -> dict[str, float | dict[str, float | None] | None]:
        """Return everything as JSON holds it: the figures, and `per_class` with them; null where undefined."""
        per_class = {name: _or_null(value) for name, value in self.per_class.items()}
        return {name: _or_null(value) for name, value in self.figures().items()} | {"per_class": per_class}


def evaluate(dataset: Dataset, detections: Sequence[Detections]) -> Metrics:
    """Compare detections with the objects of a data set, by COCO's rules.

    Crowds are neither objects to find nor false alarms to punish. An image without an entry counts as one where nothing
    was found. What is evaluated is what `to_coco_results` writes, so that a results file gives the same figures.

    Args:
        dataset: The images and their objects.
        detections: At most one entry per image, in any order.

    Returns:
        The figures; 0 where objects exist and nothing is found.

    Raises:
        ValueError: Two entries for one image, or an entry for an image that `dataset` does not hold.
    """
    curves = compare(to_task(dataset, detections))
    categories = sorted(dataset.category_id)
    precision = curves.precision[..., 0, -1]
    per_class = {
        name: mean_of_defined(precision[:, :, categories.index(category)])
        for name, category in zip(dataset.classes, dataset.category_id, strict=True)
    }
    return Metrics(**figures(curves), per_class=per_class)


def to_task(dataset: Dataset, detections: Sequence[Detections]) -> Task:
    """Lay out objects and detections as arrays.

    Raises:
        ValueError: Two entries for one image, or an entry for an image that `dataset` does not hold.
    """
    samples = list(dataset.samples)
    image_index = {image_id: index for index, image_id in enumerate(sorted({sample.image_id for sample in samples}))}
    given = [found.image_id for found in detections]
    if len(given) != len(set(given)) or not image_index.keys() >= set(given):
        raise ValueError("detections: two entries for one image, or an image that the data set does not hold")
    category_index = np.argsort(np.argsort(dataset.category_id))

    def boxes(entries: Sequence[Sample | Detections]) -> Boxes:
        counts = [len(entry.label) for entry in entries]
        label = _join([entry.label for entry in entries], np.zeros(0, dtype=np.int64))
        return Boxes(
            image=np.repeat(np.array([image_index[entry.image_id] for entry in entries], dtype=np.int64), counts),
            category=category_index[label],
            xywh=_xywh(_join([entry.xyxy for entry in entries], np.zeros((0, 4)))),
        )

    return Task(
        num_images=len(image_index),
        num_categories=len(dataset.category_id),
        objects=boxes(samples),
        area=_join([sample.area for sample in samples], np.zeros(0)),
        is_crowd=_join([sample.is_crowd for sample in samples], np.zeros(0, dtype=np.bool_)),
        found=boxes(detections),
        score=_join([found.score for found in detections], np.zeros(0)),
    )


def figures(curves: Curves) -> dict[str, float]:
    """Return the 12 figures of COCO's summary by name."""
    precision, recall = curves.precision, curves.recall
    areas, limits = {"small": 1, "medium": 2, "large": 3}, {1: 0, 10: 1, 100: 2}
    parts = {"ap": precision[..., 0, -1], "ap50": precision[0, ..., 0, -1], "ap75": precision[5, ..., 0, -1]}
    parts |= {f"ap_{name}": precision[..., area, -1] for name, area in areas.items()}
    parts |= {f"ar{count}": recall[..., 0, limit] for count, limit in limits.items()}
    parts |= {f"ar_{name}": recall[..., area, -1] for name, area in areas.items()}
    return {name: mean_of_defined(part) for name, part in parts.items()}


def mean_of_defined(values: Float64[np.ndarray, "*S"]) -> float:
    """Return the mean of those values that are not -1; NaN where all are."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def to_coco_results(dataset: Dataset, detections: Sequence[Detections]) -> list[dict[str, Any]]:
    """Turn detections into the list that a COCO results file holds.

    Returns:
        One object per box: `image_id`, `category_id` of the annotation file, `bbox` as left, top, width, height in
        pixels of the stored image to a thousandth, and `score` in full: rounding would tie scores and so move AP.
    """
    results = []
    for found in detections:
        xywh = _xywh(found.xyxy.cpu().numpy()).tolist()
        for bbox, score, label in zip(xywh, found.score.tolist(), found.label.tolist(), strict=True):
            category = dataset.category_id[label]
            results.append({"image_id": found.image_id, "category_id": category, "bbox": bbox, "score": score})
    return results


def read_coco_results(path: Path, dataset: Dataset) -> list[Detections]:
    """Read a COCO results file.

    Returns:
        One entry for each image of the data set in its order, best box first; empty where the file has nothing.

    Raises:
        DataError: The file is missing, no list of results, or speaks of an image or category that `dataset` has not.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a COCO results JSON file") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); write the results file again") from error
    if not isinstance(results, list):
        raise DataError(
            f"{path}: holds a JSON {type(results).__name__}, not a list; give a file of results, not of annotations"
        )
    label_of = {category: label for label, category in enumerate(dataset.category_id)}
    rows: dict[int, list[tuple[list[float], float, int]]] = {sample.image_id: [] for sample in dataset.samples}
    for index, result in enumerate(results):
        fault = _result_fault(result, rows.keys(), label_of.keys(), dataset.name)
        if fault:
            raise DataError(f"{path}: result {index} {fault}")
        left, top, width, height = map(float, result["bbox"])
        row = ([left, top, left + width, top + height], float(result["score"]), label_of[result["category_id"]])
        rows[result["image_id"]].append(row)
    return [_from_rows(image_id, image_rows) for image_id, image_rows in rows.items()]


def metrics_table(metrics: Mapping[str, Metrics]) -> Table:
    """Lay out the 12 figures, a column for each entry, `-` where undefined."""
    table = Table("metric")
    for name in metrics:
        table.add_column(name, justify="right")
    for figure, title in TITLES.items():
        table.add_row(title, *(_cell(getattr(entry, figure)) for entry in metrics.values()))
    return table


def per_class_table(metrics: Mapping[str, Metrics]) -> Table:
    """Lay out the AP of every class, a column for each entry (all of the same classes), `-` where undefined."""
    table = Table("class")
    for name in metrics:
        table.add_column(name, justify="right")
    for label in next(iter(metrics.values())).per_class:
        table.add_row(label, *(_cell(entry.per_class[label]) for entry in metrics.values()))
    return table


def _join(parts: Sequence[Tensor | np.ndarray], none: np.ndarray) -> np.ndarray:
    """Return all parts in one array, of the type of an empty one."""
    arrays = [part.cpu().numpy() if isinstance(part, Tensor) else part for part in parts]
    return np.concatenate((none, *arrays), dtype=none.dtype)


def _xywh(xyxy: Float[np.ndarray, "N 4"]) -> Float64[np.ndarray, "N 4"]:
    """Return left, top, width, height of every box, rounded to `DECIMALS`."""
    wide = xyxy.astype(np.float64)
    return np.concatenate((wide[:, :2], wide[:, 2:] - wide[:, :2]), axis=1).round(DECIMALS)


def _result_fault(result: object, images: Collection[int], categories: Collection[int], name: str) -> str | None:
    """Return what is wrong with an entry of a results file, or None."""
    if not isinstance(result, dict):
        return f"is a JSON {type(result).__name__}, not an object; write the results file again"
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in result]
    if missing:
        return f"lacks {', '.join(missing)}; a result has image_id, category_id, bbox and score"
    bbox = result["bbox"]
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_finite, bbox))):
        return f"has bbox {json.dumps(bbox)}; it must be four finite numbers: left, top, width, height"
    if not _is_finite(result["score"]):
        return f"has score {json.dumps(result['score'])}; it must be a finite number"
    for key, known in (("image_id", images), ("category_id", categories)):
        if not isinstance(result[key], int) or result[key] not in known:
            return f"has {key} {json.dumps(result[key])}, which {name} does not hold; give the data set it was made on"
    return None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _from_rows(image_id: int, rows: list[tuple[list[float], float, int]]) -> Detections:
    """Return the detections of one image, best first; double precision, since files hold more digits than float32."""
    rows = sorted(rows, key=lambda row: -row[1])
    return Detections(
        image_id=image_id,
        xyxy=torch.tensor([row[0] for row in rows], dtype=torch.float64).reshape(-1, 4),
        score=torch.tensor([row[1] for row in rows], dtype=torch.float64),
        label=torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
