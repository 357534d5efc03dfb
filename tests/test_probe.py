"""Tests of the batch that fits: how it is searched for, that a run is the same with its number, and what is said."""

import os
import signal
import tomllib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import after_step
from runs import DATA, MODEL, TRAIN, distill_spec, plain_spec, records, same
from torch import Tensor

from ldctl import distributed, engine, probe
from ldctl.assemble import Setting, hire, make_job, open_data
from ldctl.data.augment import eval_view
from ldctl.data.loader import train_batches
from ldctl.data.table import pack
from ldctl.errors import Interrupted, SpecError, TrainingError
from ldctl.probe import Fit, Trial, extent_of, fit_on_line, largest, largest_batch, most_images, settle_batch
from ldctl.samples import Sample, Samples
from ldctl.spec import DistillSpec, RunSpec, load
from ldctl.step import Teaching
from ldctl.trainer import BEST_FILE

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_search_finds_the_largest_that_fits(most: int) -> None:
    for limit in range(most + 3):
        tried: list[int] = []

        def fits(images: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(images)
            return images <= limit

        assert largest(fits, most) == min(limit, most)
        assert max(tried) <= most
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1


def test_line_through_two_measurements() -> None:
    # 30 + 20 n at n images, and half of 540 is 270: 12 images
    assert fit_on_line(70, 110, 540, most=100) == Fit(12, 270, 540)
    assert fit_on_line(70, 110, 539, most=100) == Fit(11, 250, 539)
    assert fit_on_line(70, 110, 540, most=5) == Fit(5, 130, 540)
    assert fit_on_line(70, 110, 100, most=5) == Fit(1, 50, 100)
    assert fit_on_line(70, 110, 99, most=5).images == 0
    assert fit_on_line(70, 69, 140, most=5) == Fit(5, 70, 140)


def test_four_images_are_not_tried_where_they_may_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "available_bytes", lambda: 500)
    tried = []
    monkeypatch.setattr(probe, "peak_bytes", lambda _, images: tried.append(images) or {2: 120, 4: 200}[images])
    assert probe._largest_on_cpu(lambda _: None, 100, CPU) == Fit(5, 240, 500)
    monkeypatch.setattr(probe, "available_bytes", lambda: 470)
    assert probe._largest_on_cpu(lambda _: None, 100, CPU) == Fit(3, 180, 470)
    assert tried == [2, 4, 2]


def test_one_image_is_tried_where_no_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(probe, "peak_bytes", lambda _, images: tried.append(images) or 50)
    monkeypatch.setattr(probe, "available_bytes", lambda: 100)
    assert probe._largest_on_cpu(lambda _: None, 1, CPU) == Fit(1, 50, 100)
    monkeypatch.setattr(probe, "available_bytes", lambda: 99)
    assert probe._largest_on_cpu(lambda _: None, 1, CPU) == Fit(0, 50, 99)
    assert tried == [1, 1]


def test_peak_of_a_trial_is_measured() -> None:
    def trial(images: int) -> None:
        torch.ones(images, 2**24)  # 64 MB each

    for images in (2, 4, 2):  # larger peaks before do not count
        assert 64 * images - 8 <= probe.peak_bytes(trial, images) / 2**20 < 64 * images + 32


def test_an_epoch_keeps_ten_steps() -> None:
    assert [most_images(count) for count in (3, 10, 205, 100_000)] == [1, 1, 20, 256]


def auto(output: Path, **values: object) -> RunSpec:
    return plain_spec(output, **{"train__batch": "auto", "data__synthetic__train": 40, **values})


def saved_batch(folder: Path) -> object:
    return tomllib.loads((folder / "spec.toml").read_text())["train"]["batch"]


def test_a_run_is_the_same_as_with_the_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine.train_teacher(auto(tmp_path / "auto", train__epochs=1), quiet=True)
    said = capsys.readouterr().err
    assert "teacher: batch 4 fits in 0." in said
    assert " GB, the most that is tried for 40 images; learning rate 0.0025 by the linear rule\n" in said
    assert saved_batch(tmp_path / "auto") == 4
    by_hand = plain_spec(tmp_path / "hand", train__batch=4, data__synthetic__train=40, train__epochs=1)
    engine.train_teacher(by_hand, quiet=True)
    same(tmp_path / "auto", tmp_path / "hand")


@pytest.mark.parametrize("flags", [{}, {"train.batch": "auto"}])
def test_a_resumed_run_keeps_its_number(
    tmp_path: Path, flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"output": str(tmp_path / "run"), **flags}
    engine.train_teacher(auto(tmp_path / "run", train__epochs=1), quiet=True)
    monkeypatch.setattr(probe, "largest", lambda *_: pytest.fail("tried out again"))
    resumed = engine.teacher_spec(None, given, [], resume=True)
    assert resumed.train.batch == 4
    engine.train_teacher(resumed, resume=True, quiet=True)


def test_each_part_of_a_distillation_has_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = {**TRAIN, "batch": "auto", "epochs": 1}
    flags = {
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {**DATA, "synthetic": {"train": 20, "val": 3, "size": 64}},
        "train": train,
        "teacher": {"model": MODEL, "train": train},
        "assistant": {"model": MODEL},
        "student": MODEL,
        "compare": True,
    }
    spec = load(DistillSpec, None, deepcopy(flags), [])
    engine.distill(spec, quiet=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "by the linear rule" in line]
    assert [line.partition(":")[0] for line in said] == ["teacher", "assistant", "student"], "plain takes the student's"
    for part in ("", "teacher", "assistant", "plain"):
        assert saved_batch(tmp_path / "run" / part) == 2
    engine.distill(engine.distill_spec(None, flags, [], resume=True), resume=True, quiet=True)
    assert "by the linear rule" not in capsys.readouterr().err


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize(
    "shown", [("output",), ("output", "device", "data", "train", "teacher", "assistant", "student")]
)
def test_an_assistant_keeps_a_batch_of_its_own(
    teacher_file: Path, tmp_path: Path, shown: tuple[str, ...], is_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes more memory than the student; the run is interrupted before its first step, or after it."""
    flags: dict[str, object] = {
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {**DATA, "synthetic": {"train": 40, "val": 3, "size": 64}},
        "train": {**TRAIN, "batch": "auto", "epochs": 1},
        "teacher": {"path": str(teacher_file)},
        "assistant": {"model": {**MODEL, "head": {"num_convs": 2}}},
        "student": MODEL,
    }

    def fit(trial: Trial, most: int, _: torch.device) -> Fit:
        return Fit(min(most, 2 if trial.model.head.num_convs == 2 else 4), 1, 2)

    def stop(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(probe, "_largest_on_cpu", fit)
        if is_begun:
            after_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        else:
            patch.setattr(engine, "examine", stop)
        with pytest.raises(Interrupted):
            engine.distill(load(DistillSpec, None, deepcopy(flags), []), quiet=True)
    monkeypatch.setattr(probe, "largest", lambda *_: pytest.fail("tried out again"))
    resumed = engine.distill_spec(None, {key: flags[key] for key in shown}, [], resume=True)
    engine.distill(resumed, resume=True, quiet=True)
    assert (saved_batch(tmp_path / "run"), saved_batch(tmp_path / "run/assistant")) == (4, 2)
    steps = {folder: records(tmp_path / folder)[-1]["step"] for folder in ("run", "run/assistant")}
    assert steps == {"run": 10, "run/assistant": 20}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    engine.train_teacher(plain_spec(folder / "run", train__epochs=1), quiet=True)
    return folder / "run" / BEST_FILE


def test_a_trial_is_laid_out_as_the_run_and_walks_the_data_once(
    teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = distill_spec(tmp_path, teacher_file, train__batch="auto", train__epochs=3)
    setting = setting_of(spec)
    teaching = hire(teacher_file, spec.distill, CPU)
    trial = Trial(spec, spec.student, setting, teaching, has_buckets=False)
    monkeypatch.setattr(Samples, "__getitem__", lambda *_: pytest.fail("looks at images again"))
    trial(1)
    tried = trial.job(6, 2)
    job = make_job(spec, "student", tmp_path, spec.student, setting, teaching)
    strides = {name: value.stride() for name, value in tried.detector.state_dict().items()}
    assert strides == {name: value.stride() for name, value in job.detector.state_dict().items()}
    assert strides["head.cls.weight"][1] == 1, "channels last"
    assert tried.train == job.train.model_copy(update={"batch": 6, "accumulate": 2})
    shared = ("teaching", "data", "postprocess", "train_set", "val_set", "device")
    assert all(getattr(tried, name) is getattr(job, name) for name in shared)


def setting_of(spec: RunSpec) -> Setting:
    return open_data(spec.data, CPU, quiet=True)


def everything(teaching: Teaching) -> list[Tensor]:
    """The teacher, its modes and gradients, and the state of the random numbers."""
    weights = [value.clone() for value in teaching.teacher.state_dict().values()]
    modes = torch.tensor([module.training for module in teaching.teacher.modules()])
    grads = torch.tensor([p.grad is not None or p.requires_grad for p in teaching.teacher.parameters()])
    return [*weights, modes, grads, torch.random.get_rng_state()]


def test_nothing_of_the_run_moves(teacher_file: Path, tmp_path: Path) -> None:
    terms = [{"kind": "ld"}, {"kind": "crosskd_cls"}, {"kind": "pkd"}]
    spec = distill_spec(tmp_path, teacher_file, train__batch="auto", distill={"cut": 1, "terms": terms}, train__ema={})
    setting = setting_of(spec)
    teaching = hire(teacher_file, spec.distill, CPU)
    job = make_job(spec, "student", tmp_path, spec.student, setting, teaching)
    student = {name: value.clone() for name, value in job.detector.state_dict().items()}
    before = everything(teaching)
    settled = settle_batch(spec, "student", spec.student, setting, teaching)
    assert settled.train.batch == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(teaching), strict=True))
    assert all(torch.equal(value, student[name]) for name, value in job.detector.state_dict().items())
    assert spec.train.batch == "auto"


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_no_batch_of_a_run_is_larger(scale: float, tmp_path: Path) -> None:
    spec = plain_spec(tmp_path, data__synthetic__train=24, data__short_side=[64, 96], data__long_side=160)
    train_set = setting_of(spec).train_set
    tried = largest_batch(extent_of(train_set, spec.data), 3, scale, CPU)
    assert tried.images.shape[0] == len(tried.image_id) == 3
    seen = tried.for_teacher or tried
    widest = fullest = 0
    for epoch in range(3):
        for batch in train_batches(train_set, spec.data, batch_size=3, seed=0, epoch=epoch, teacher_scale=scale):
            other = batch.for_teacher or batch
            assert all(a <= b for a, b in zip(batch.images.shape, tried.images.shape, strict=True))
            assert all(a <= b for a, b in zip(other.images.shape, seen.images.shape, strict=True))
            widest = max(widest, batch.images.shape[-1])
            fullest = max(fullest, batch.targets.is_object.shape[1])
    assert fullest == tried.targets.is_object.shape[1]
    assert widest == tried.images.shape[-1]


def test_extent_is_that_of_a_walk_over_all_images(tmp_path: Path) -> None:
    """Of some images of a table only, one of them twice; the most objects are crowds, which do not count."""
    spec = plain_spec(tmp_path, data__short_side=[64, 96], data__long_side=160)
    generator = np.random.default_rng(0)

    def sample(number: int, height: int, width: int, num_objects: int, num_crowds: int) -> Sample:
        xyxy = np.array([[1, 1, height / 2, width / 2]] * num_objects, dtype=np.float32)
        is_crowd = np.arange(num_objects) < num_crowds
        return Sample(
            number, f"{number}", height, width, xyxy, generator.integers(3, size=num_objects), xyxy[:, 2], is_crowd
        )

    sizes = [(50, 90, 3, 0), (400, 80, 9, 8), (70, 60, 4, 1), (30, 400, 4, 0), (90, 80, 40, 0)]
    samples = pack(sample(number, *size) for number, size in enumerate(sizes)).take(np.array([3, 1, 0, 0, 2]))
    dataset = replace(setting_of(spec).train_set, samples=samples)
    views = [eval_view(one, spec.data) for one in samples]
    found = extent_of(dataset, spec.data)
    assert (found.height, found.width) == (max(view.height for view in views), max(view.width for view in views))
    assert (found.height, found.width) == (160, 160)
    assert np.array_equal(found.fullest.label, samples[0].label), "4 objects; 9 with 8 crowds are 1"
    assert not found.has_unlabelled


def test_ranks_agree_on_the_least(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = auto(tmp_path, train__accumulate=2, data__synthetic__train=240)
    setting = setting_of(spec)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda _: [5, 3])
    asked = []
    monkeypatch.setattr(probe, "_largest_on_cpu", lambda _trial, most, _device: asked.append(most) or Fit(5, 1, 2))
    assert settle_batch(spec, "teacher", spec.model, setting).train.batch == 12, "3 images x 2 ranks x 2 micro-batches"
    assert asked == [6], "24 images of 240, on 2 ranks, in 2 micro-batches"


def test_alone_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with distributed.alone():
        assert distributed.world_size() == 1
    assert distributed.world_size() == 4


def test_says_when_nothing_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = auto(tmp_path)
    setting = setting_of(spec)
    monkeypatch.setattr(probe, "available_bytes", lambda: 2**16)
    with pytest.raises(TrainingError) as caught:
        settle_batch(spec, "teacher", spec.model, setting)
    assert str(caught.value) == (
        "teacher: not even one image fits in 0.0 GB: lower data.short_side and data.long_side, "
        "or take a smaller detector"
    )
    monkeypatch.undo()

    def unknown() -> int:
        raise OSError

    monkeypatch.setattr(probe, "available_bytes", unknown)
    with pytest.raises(SpecError) as refused:
        settle_batch(spec, "teacher", spec.model, setting)
    assert str(refused.value) == (
        'train.batch is "auto", but this system does not tell how much memory a step takes: pass a number'
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 13),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 13),
        (None, 9),
    ],
)
def test_search_on_a_gpu(error: RuntimeError | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out beyond 13 images; each takes 10, so that 9 are what 0.9 of 100 holds."""
    peak = 0

    def trial(images: int) -> None:
        nonlocal peak
        peak = images * (10 if error is None else 1)
        if error is not None and images > 13:
            raise error

    emptied = []
    monkeypatch.setattr(probe.gc, "collect", lambda: 0)  # which takes long among the objects of a test run
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    found = probe._largest_on_gpu(trial, 64, CPU)
    assert found == Fit(expected, expected * (10 if error is None else 1), 100)
    assert len(emptied) > 4

    def broken(_: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        probe._largest_on_gpu(broken, 64, CPU)


@pytest.mark.gpu
def test_what_was_found_on_a_gpu_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(2**31, free) / total)  # 2 GB, so that memory is what decides
    large = {"data__short_side": [512, 512], "data__long_side": 512, "data__synthetic__train": 2000}
    try:
        engine.train_teacher(auto(tmp_path / "run", device="cuda", train__epochs=1, **large), quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "by the linear rule" in capsys.readouterr().err
    assert 1 <= int(str(saved_batch(tmp_path / "run"))) <= 200
