"""COCO figures against the published ones, pycocotools itself and hand-made cases."""

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table

from ldctl import metrics
from ldctl.data.table import pack
from ldctl.errors import DataError
from ldctl.samples import Dataset, Sample
from ldctl.types import Detections

GOLDEN = (0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564)


def no_pixels(sample: Sample) -> torch.Tensor:
    raise AssertionError("an evaluation reads no image")


def dataset(
    samples: list[Sample], classes: tuple[str, ...] = ("cat", "dog"), ids: tuple[int, ...] = (3, 18)
) -> Dataset:
    return Dataset(
        name="instances.json",
        classes=classes,
        category_id=ids,
        samples=pack(samples),
        read=no_pixels,
        fingerprint="",
    )


def sample(image_id: int, rows: list[tuple[float, float, float, float, int, bool]]) -> Sample:
    """Rows of left, top, right, bottom, label, is_crowd."""
    xyxy = np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4)
    return Sample(
        image_id=image_id,
        file=f"{image_id}.jpg",
        height=400,
        width=400,
        xyxy=xyxy,
        label=np.array([row[4] for row in rows], dtype=np.int64),
        area=(xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]),
        is_crowd=np.array([row[5] for row in rows], dtype=bool),
    )


def found(image_id: int, rows: list[tuple[float, float, float, float, int, float]]) -> Detections:
    """Rows of left, top, right, bottom, label, score."""
    return Detections(
        image_id=image_id,
        xyxy=torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4),
        score=torch.tensor([row[5] for row in rows]),
        label=torch.tensor([row[4] for row in rows], dtype=torch.int64),
    )


def from_coco(path: Path) -> Dataset:
    """Read an annotation file as directly as can be, categories reversed so that labels do not follow ids."""
    file = json.loads(path.read_text())
    categories = file["categories"][::-1]
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    samples = []
    for image in file["images"]:
        rows = [row for row in file["annotations"] if row["image_id"] == image["id"]]
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        samples.append(
            Sample(
                image_id=image["id"],
                file=image["file_name"],
                height=image["height"],
                width=image["width"],
                xyxy=np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1).astype(np.float32),
                label=np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
                area=np.array([row["area"] for row in rows], dtype=np.float32),
                is_crowd=np.array([row["iscrowd"] for row in rows], dtype=bool),
            )
        )
    return dataset(samples, tuple(c["name"] for c in categories), tuple(c["id"] for c in categories))


def direct(annotations: Path, results: Path) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def text(table: Table) -> str:
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_golden_figures_are_the_published_ones_and_pycocotools_own(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "data" / "eval_golden"
    annotations, results = folder / "instances_val2014_100.json", folder / "fakebbox100_results.json"
    data = from_coco(annotations)
    got = metrics.evaluate(data, metrics.read_coco_results(results, data))
    assert capsys.readouterr().out == ""
    assert tuple(round(value, 3) for value in got.figures().values()) == GOLDEN
    expected = direct(annotations, results)
    assert tuple(got.figures().values()) == tuple(expected.stats)
    precision = expected.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))[::-1]
    assert [-1 if math.isnan(value) else value for value in got.per_class.values()] == pytest.approx(
        list(precision), abs=1e-12
    )
    assert any(math.isnan(value) for value in got.per_class.values())


def test_golden_in_float32_as_a_detector_gives_it(shared: Path) -> None:
    folder = shared / "data" / "eval_golden"
    data = from_coco(folder / "instances_val2014_100.json")
    exact = metrics.read_coco_results(folder / "fakebbox100_results.json", data)
    single = [replace(entry, xyxy=entry.xyxy.float(), score=entry.score.float()) for entry in exact]
    assert metrics.evaluate(data, single).figures() == metrics.evaluate(data, exact).figures()


def test_figures_of_a_hand_made_case() -> None:
    # Two cats, one found exactly, one missed; one false alarm of lower score. 50 x 50 is medium, 120 x 120 large.
    data = dataset([sample(7, [(0, 0, 50, 50, 0, False)]), sample(900, [(10, 10, 130, 130, 0, False)])])
    entries = [found(900, [(200, 200, 300, 300, 0, 0.3)]), found(7, [(0, 0, 50, 50, 0, 0.9)])]
    got = metrics.evaluate(data, entries)
    half = 51 / 101  # precision 1 at the recall points 0, 0.01, ..., 0.5
    expected = {
        "ap": half, "ap50": half, "ap75": half, "ap_small": math.nan, "ap_medium": 1.0, "ap_large": 0.0,
        "ar1": 0.5, "ar10": 0.5, "ar100": 0.5, "ar_small": math.nan, "ar_medium": 1.0, "ar_large": 0.0,
    }  # fmt: skip
    assert got.figures() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert got.per_class == pytest.approx({"cat": half, "dog": math.nan}, abs=1e-12, nan_ok=True)
    loaded = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert loaded["ap_small"] is None
    assert loaded["ap_medium"] == got.ap_medium
    assert loaded["per_class"]["dog"] is None
    assert list(loaded) == [*expected, "per_class"]


def test_an_object_is_found_once() -> None:
    first, second = (0.0, 0.0, 50.0, 50.0, 0), (100.0, 100.0, 150.0, 150.0, 0)
    data = dataset([sample(1, [(*first, False), (*second, False)])])
    got = metrics.evaluate(data, [found(1, [(*first, 0.9), (*first, 0.8), (*second, 0.7)])])
    # Precision 1 at the recall points up to .5, then 2 of 3: the second find of the first object is a false alarm.
    assert got.ap == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-12)


def test_area_comes_from_the_annotation() -> None:
    # A box of 50 x 50 whose mask has 900 square pixels is a small object, though its box is not.
    row = replace(sample(1, [(0, 0, 50, 50, 0, False)]), area=np.array([900.0], dtype=np.float32))
    got = metrics.evaluate(dataset([row]), [found(1, [(0, 0, 50, 50, 0, 0.9)])])
    assert got.ap_small == pytest.approx(1.0)
    assert math.isnan(got.ap_medium)


def test_crowd_is_neither_missed_nor_a_false_alarm() -> None:
    rows = [(0.0, 0.0, 50.0, 50.0, 0, False), (100.0, 100.0, 300.0, 300.0, 0, True)]
    in_crowd = (120.0, 120.0, 160.0, 160.0, 0, 0.95)
    entries = [found(1, [in_crowd, (0, 0, 50, 50, 0, 0.9)])]
    assert metrics.evaluate(dataset([sample(1, rows)]), entries).ap == pytest.approx(1.0)
    not_crowd = [rows[0], (*rows[1][:5], False)]
    assert metrics.evaluate(dataset([sample(1, not_crowd)]), entries).ap < 0.5


@pytest.mark.parametrize("entries", [[], [found(1, [])]])
def test_nothing_found_is_zero(entries: list[Detections]) -> None:
    got = metrics.evaluate(dataset([sample(1, [(0, 0, 50, 50, 1, False)])]), entries)
    assert (got.ap, got.ap50, got.ar100, got.ap_medium) == (0.0, 0.0, 0.0, 0.0)
    assert got.per_class == pytest.approx({"cat": math.nan, "dog": 0.0}, nan_ok=True)


@pytest.mark.parametrize("samples", [[], [sample(1, [])], [sample(1, [(0, 0, 50, 50, 0, True)])]])
def test_no_object_to_find_is_undefined(samples: list[Sample]) -> None:
    entries = [found(row.image_id, [(0, 0, 50, 50, 0, 0.9)]) for row in samples]
    got = metrics.evaluate(dataset(samples), entries)
    assert all(math.isnan(value) for value in (*got.figures().values(), *got.per_class.values()))


def test_one_class() -> None:
    data = dataset([sample(5, [(0, 0, 50, 50, 0, False)])], ("cell",), (1,))
    got = metrics.evaluate(data, [found(5, [(0, 0, 50, 50, 0, 0.5)])])
    assert got.ap == pytest.approx(1.0)
    assert got.per_class == {"cell": got.ap}


def test_each_image_is_judged_once() -> None:
    data = dataset([sample(1, [(0, 0, 50, 50, 0, False)])])
    box = (0.0, 0.0, 50.0, 50.0, 0, 0.9)
    for entries in ([found(1, [box]), found(1, [box])], [found(2, [box])]):
        with pytest.raises(ValueError, match="two entries for one image, or an image that the data set does not hold"):
            metrics.evaluate(data, entries)


def test_results_have_category_ids_and_exact_scores() -> None:
    entries = [found(7, [(1.2345678, 2, 11, 22, 1, 0.1), (0, 0, 3, 4, 0, 0.05)]), found(8, [])]
    got = metrics.to_coco_results(dataset([sample(7, []), sample(8, [])]), entries)
    tenth, twentieth = float(np.float32(0.1)), float(np.float32(0.05))
    assert got == [
        {"image_id": 7, "category_id": 18, "bbox": [1.235, 2.0, 9.765, 20.0], "score": tenth},
        {"image_id": 7, "category_id": 3, "bbox": [0.0, 0.0, 3.0, 4.0], "score": twentieth},
    ]


def test_results_file_round_trip(tmp_path: Path) -> None:
    data = dataset([sample(7, [(0, 0, 50, 50, 0, False)]), sample(9, [])])
    entries = [found(7, [(0, 0, 50, 50, 0, 0.3), (1, 1, 9, 9, 1, 0.7)])]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(metrics.to_coco_results(data, entries)))
    first, second = metrics.read_coco_results(path, data)
    assert (first.image_id, second.image_id) == (7, 9)
    assert first.xyxy.tolist() == [[1, 1, 9, 9], [0, 0, 50, 50]]  # best first
    assert first.label.tolist() == [1, 0]
    assert first.score.float().tolist() == [entries[0].score[1].item(), entries[0].score[0].item()]
    assert (second.xyxy.shape, second.score.shape, second.label.shape) == ((0, 4), (0,), (0,))
    assert metrics.evaluate(data, [first, second]).figures() == pytest.approx(
        metrics.evaluate(data, entries).figures(), nan_ok=True
    )


GOOD = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2)); write the "
         "results file again"),
        ("{}", "holds a JSON dict, not a list; give a file of results, not of annotations"),
        (json.dumps([GOOD, 5]), "result 1 is a JSON int, not an object; write the results file again"),
        (json.dumps([{"image_id": 7, "bbox": []}]),
         "result 0 lacks category_id, score; a result has image_id, category_id, bbox and score"),
        (json.dumps([GOOD | {"bbox": [0, 0, 5]}]),
         "result 0 has bbox [0, 0, 5]; it must be four finite numbers: left, top, width, height"),
        (json.dumps([GOOD | {"bbox": [0, 0, 5, math.nan]}]),
         "result 0 has bbox [0, 0, 5, NaN]; it must be four finite numbers: left, top, width, height"),
        (json.dumps([GOOD | {"score": "0.5"}]), 'result 0 has score "0.5"; it must be a finite number'),
        (json.dumps([GOOD, GOOD, GOOD | {"image_id": 8}]),
         "result 2 has image_id 8, which instances.json does not hold; give the data set it was made on"),
        (json.dumps([GOOD | {"category_id": 1}]),
         "result 0 has category_id 1, which instances.json does not hold; give the data set it was made on"),
        (json.dumps([GOOD | {"category_id": [3]}]),
         "result 0 has category_id [3], which instances.json does not hold; give the data set it was made on"),
    ],
)  # fmt: skip
def test_broken_results_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        metrics.read_coco_results(path, dataset([sample(7, [])]))
    assert str(caught.value) == f"{path}: {message}"


def test_missing_results_file(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(DataError) as caught:
        metrics.read_coco_results(path, dataset([]))
    assert str(caught.value) == f"{path}: cannot be read (No such file or directory); give a COCO results JSON file"


def figures(ap: float) -> metrics.Metrics:
    names = list(metrics.TITLES)
    values = {name: ap + index / 100 for index, name in enumerate(names)} | {"ap_large": math.nan}
    return metrics.Metrics(**values, per_class={"cat": ap, "dog": math.nan})


def test_metrics_table() -> None:
    assert text(metrics.metrics_table({"plain": figures(0.3), "distilled": figures(0.4)})) == (
        """\
┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━┓
┃ metric             ┃ plain ┃ distilled ┃
┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━┩
│ AP                 │ 0.300 │     0.400 │
│ AP50               │ 0.310 │     0.410 │
│ AP75               │ 0.320 │     0.420 │
│ AP small           │ 0.330 │     0.430 │
│ AP medium          │ 0.340 │     0.440 │
│ AP large           │     - │         - │
│ AR, 1 detection    │ 0.360 │     0.460 │
│ AR, 10 detections  │ 0.370 │     0.470 │
│ AR, 100 detections │ 0.380 │     0.480 │
│ AR small           │ 0.390 │     0.490 │
│ AR medium          │ 0.400 │     0.500 │
│ AR large           │ 0.410 │     0.510 │
└────────────────────┴───────┴───────────┘"""
    )


def test_per_class_table() -> None:
    assert text(metrics.per_class_table({"student": figures(0.25)})) == (
        """\
┏━━━━━━━┳━━━━━━━━━┓
┃ class ┃ student ┃
┡━━━━━━━╇━━━━━━━━━┩
│ cat   │   0.250 │
│ dog   │       - │
└───────┴─────────┘"""
    )
