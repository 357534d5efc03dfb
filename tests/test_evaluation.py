"""How fast a detector is said to be: which images are timed, for how long, and what is printed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
import torch

from ldctl import evaluation, spec
from ldctl.data import open_dataset
from ldctl.data.table import pack
from ldctl.evaluation import Speed, measure_speed, print_speed
from ldctl.models import Detector, ModelSpec
from ldctl.samples import Dataset
from ldctl.spec import EvalSpec
from ldctl.types import Batch

SPEC = spec.load(EvalSpec, None, {"checkpoint": "x", "data": runs.DATA, "batch": 4}, [])


class Clock:
    """A clock that stands still but for the runs of a detector, each of which takes the next of some durations."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.seconds, self.shown = 0.0, iter(seconds), list[Batch]()

    def perf_counter(self) -> float:
        return self.now

    def find(self, _detector: Detector, batch: Batch, _postprocess: object) -> None:
        self.shown.append(batch)
        self.now += next(self.seconds)


def timed(monkeypatch: pytest.MonkeyPatch, seconds: list[float], dataset: Dataset) -> tuple[Clock, Speed]:
    clock = Clock(seconds)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(evaluation, "find", clock.find)
    detector = Detector(ModelSpec.model_validate(runs.MODEL), 4)
    return clock, measure_speed(detector, dataset, SPEC, torch.device("cpu"), 7.5)


def test_runs_are_timed_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [5.0, 1.0, 1.0, *(k / 1000 for k in range(1, 51))]  # 1 to 50 ms
    clock, speed = timed(monkeypatch, seconds, open_dataset(SPEC.data, "val"))
    assert len(clock.shown) == 53
    assert [len(batch.images) for batch in clock.shown] == [1] * 53
    assert [batch.image_id[0] for batch in clock.shown[:6]] == [0, 1, 2, 0, 1, 2]  # all three images in turn
    assert speed.latency_runs == 50
    assert speed.latency_median_ms == pytest.approx(25.5)
    assert speed.latency_p95_ms == pytest.approx(47.55)
    assert (speed.images_per_second, speed.batch) == (7.5, 4)


@pytest.mark.parametrize(("each", "shown", "counted"), [(0.5, 21, 18), (4.0, 3, 1), (60.0, 1, 1)])
def test_a_slow_detector_is_not_timed_for_long(
    monkeypatch: pytest.MonkeyPatch, each: float, shown: int, counted: int
) -> None:
    clock, speed = timed(monkeypatch, [each] * 60, open_dataset(SPEC.data, "val"))
    assert (len(clock.shown), speed.latency_runs) == (shown, counted)
    assert speed.latency_median_ms == speed.latency_p95_ms == each * 1000


def test_images_of_the_commonest_size_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(SPEC.data, "val")
    first = dataset.samples[0]
    others = [replace(first, image_id=k + 10, height=32) for k in range(25)]

    def read(sample: object) -> torch.Tensor:
        return torch.zeros(3, sample.height, sample.width, dtype=torch.uint8)

    clock, speed = timed(monkeypatch, [0.01] * 60, replace(dataset, samples=pack((first, *others)), read=read))
    assert (speed.latency_height_px, speed.latency_width_px) == (32, 64)
    assert [batch.image_id[0] for batch in clock.shown[:21]] == [*range(10, 30), 10]


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    print_speed(
        Speed(
            device="cpu, threads: 2",
            images_per_second=41.234,
            batch=8,
            latency_median_ms=23.456,
            latency_p95_ms=101.0,
            latency_runs=50,
            latency_height_px=800,
            latency_width_px=1088,
        )
    )
    assert capsys.readouterr().out == (
        """\
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━┓
┃ speed                             ┃          ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━┩
│ images/s, files to boxes, batch 8 │     41.2 │
│ latency, median                   │  23.5 ms │
│ latency, 95th percentile          │ 101.0 ms │
└───────────────────────────────────┴──────────┘
latency: network and boxes, batch 1, input 800 x 1088 px, 50 runs on cpu, threads: 2
"""
    )
