"""A teacher that is paid for once: its cache teaches exactly what it would, and nothing else passes for it."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from datasets import box, write_coco, write_image
from jobs import after_step
from safetensors.torch import load_file

from ldctl import cacheable, caching, checkpoint, engine, spec
from ldctl.caching import cache_teacher
from ldctl.data.cache_writer import CacheWriter, partial_path
from ldctl.data.teacher_cache import Dtype, ViewRows, open_cache
from ldctl.errors import CheckpointError, DataError, Interrupted, MissingError, OutputError, SpecError, Terminated
from ldctl.spec import DistillSpec

SIZES = [(64, 96), (96, 64), (64, 64), (64, 90), (80, 64), (64, 96), (64, 80), (90, 64), (64, 96)]  # height, width
LD_FULL = [{"kind": "ld"}, {"kind": "ld", "region": "vlr", "weight": 0.0625}, {"kind": "kd"}]
LATER = [
    {"kind": "bckd_box", "region": "vlr"},
    {"kind": "binary_kd", "region": "main"},
    {"kind": "kd", "region": "vlr"},
    {"kind": "bckd_box", "region": "main", "weight": 2.0},
]
COMMON = {"data__canvas": True, "data__short_side": [64, 64], "data__long_side": 96, "train__eval_every": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine wide, tall and square images with one to three boxes each, in COCO form."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for index, (height, width) in enumerate(SIZES):
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for _ in range(1 + index % 3):
            side = rng.uniform(12, 50, 2)
            corner = rng.uniform(0, 1, 2) * (np.array([width, height]) - side)
            xywh = [float(value) for value in (*corner, *side)]
            boxes.append(box(len(boxes), index, xywh, category=int(rng.integers(1, 3))))
    classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for split, count in (("train", len(SIZES)), ("val", 2)):
        known = [each for each in boxes if each["image_id"] < count]
        write_coco(root, {"images": images[:count], "annotations": known, "categories": classes}, split, num_images=0)
        for index, (height, width) in enumerate(SIZES[:count]):
            write_image(root / f"{split}2017" / f"{index}.png", width, height, seed=index)
    return root


def on(data: Path, **values: object) -> dict[str, object]:
    """Return the values of a run on the data."""
    return {"data__format": "coco", "data__path": str(data), **COMMON, **values}


def teacher_of(data: Path, folder: Path, **values: object) -> Path:
    """Train a detector that says something of its own at each location."""
    optim = {"kind": "adamw", "lr": 0.003, "base_batch": 4, "clip_norm": 10.0}
    engine.train_teacher(runs.plain_spec(folder, **on(data, train__epochs=3, train__optim=optim, **values)), quiet=True)
    return folder / "last.safetensors"


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_of(data, tmp_path_factory.mktemp("teacher") / "run")


def distill_spec(output: Path, data: Path, **values: object) -> DistillSpec:
    """Return the spec of a tiny run of which `teacher__path` or `teacher__cache` says who teaches."""
    flags = {"output": str(output), "device": "cpu", "student": runs.MODEL, "data": runs.DATA, "train": runs.TRAIN}
    flags |= {"distill.terms": LD_FULL}
    return spec.load(DistillSpec, None, deepcopy(flags) | runs.dotted(on(data, **values)), [])


def make(target: Path, data: Path, teacher: Path, dtype: Dtype = "float32", **values: object) -> Path:
    cache_teacher(distill_spec(target, data, teacher__path=str(teacher), **values), target, dtype, quiet=True)
    return target


@pytest.fixture(scope="module")
def cache(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cache") / "t.cache", data, teacher)


def same_run(found: Path, expected: Path) -> None:
    """Compare losses and weights of two runs, bit by bit."""
    assert runs.records(found) == runs.records(expected)
    for name in ("best.safetensors", "last.safetensors", "state.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        wrong = [key for key, value in theirs.items() if not torch.equal(value, ours[key])]
        assert not wrong, f"{name}: {wrong}"


# --- the same as the live teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "of_teacher"),
    [
        ({"train__log_every": 1}, {}),
        ({"train__log_every": 1, "distill__vlr": "reference", "train__accumulate": 2, "distill__terms": LATER}, {}),
        ({"distill__terms": LATER, "train__batch": 3}, {"model__head__kind": "gflv2"}),
        ({"distill__terms": LATER, "student__head__kind": "fcos"}, {"model__head__kind": "atss"}),
        ({"student__head__kind": "fcos", "train__batch": 1}, {"model__head__kind": "fcos"}),
        ({"student__head__kind": "retina"}, {"model__head__kind": "retina"}),
    ],
    ids=["ld-full", "reference-parts", "quality", "offset", "alone", "nine-boxes"],
)
def test_a_cache_in_float32_teaches_what_its_teacher_does(
    data: Path, teacher: Path, tmp_path: Path, changed: dict[str, Any], of_teacher: dict[str, Any]
) -> None:
    """Every recorded loss and every weight, bit by bit, after two epochs."""
    if of_teacher:
        teacher = teacher_of(data, tmp_path / "teacher", **of_teacher)
    made = make(tmp_path / "t.cache", data, teacher, **changed)
    for name, source in (("live", {"teacher__path": str(teacher)}), ("cached", {"teacher__cache": str(made)})):
        engine.distill(distill_spec(tmp_path / name, data, **source, **changed), quiet=True)
    same_run(tmp_path / "cached", tmp_path / "live")
    ours, theirs = (checkpoint.load_meta(tmp_path / name / "best.safetensors") for name in ("cached", "live"))
    assert ours.teacher_sha256 == theirs.teacher_sha256 == checkpoint.sha256(teacher)


def test_a_cache_in_float16_is_near(data: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    """Of a loss at the first step 1e-3 at most; later the two students part."""
    half = make(tmp_path / "half.cache", data, teacher, "float16")
    assert 0.5 * cache.stat().st_size < half.stat().st_size < 0.55 * cache.stat().st_size + 4000
    for name, source in (("half", half), ("whole", cache)):
        changed = {"train__log_every": 1, "train__epochs": 1}
        engine.distill(distill_spec(tmp_path / name, data, teacher__cache=str(source), **changed), quiet=True)
    first, exact = (runs.trace(tmp_path / name)[0] for name in ("half", "whole"))
    worst = max(abs(value - exact[name]) / exact[name] for name, value in first.items())
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert 0 < worst < 1e-3


def test_a_run_from_a_cache_is_resumed_exactly(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch; workers load the rest, from where the cache was moved to."""
    whole = distill_spec(tmp_path / "whole", data, teacher__cache=str(cache))
    engine.distill(whole, quiet=True)
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            engine.distill(distill_spec(tmp_path / "run", data, teacher__cache=str(cache)), quiet=True)
    moved = shutil.copy(cache, tmp_path / "moved.cache")
    rest = {"teacher__cache": str(moved), "data__workers": 1}
    engine.distill(distill_spec(tmp_path / "run", data, **rest), resume=True, quiet=True)
    same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_with_its_own_cache_only(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make(tmp_path / "half.cache", data, teacher, "float16")
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated):
            engine.distill(distill_spec(tmp_path / "run", data, teacher__cache=str(cache)), quiet=True)
    with pytest.raises(CheckpointError, match="was started with other images, boxes or another teacher's file"):
        engine.distill(distill_spec(tmp_path / "run", data, teacher__cache=str(half)), resume=True, quiet=True)


def test_what_is_said_and_compared(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ap = checkpoint.load_meta(teacher).metrics["ap"]
    both = {"teacher__cache": str(cache), "teacher__path": str(teacher)}
    results = engine.distill(distill_spec(tmp_path / "run", data, **both, compare=True, train__epochs=1), quiet=True)
    assert list(results) == ["teacher", "plain", "student"]
    assert results["teacher"].ap == ap
    said = f"teacher: not loaded, all that it says is in {cache}; its file says AP {ap:.3f} for the same images"
    assert said in capfd.readouterr().err.splitlines()
    plain = runs.plain_spec(tmp_path / "alone", **on(data, train__epochs=1))
    engine.train_teacher(plain, quiet=True)
    weights = load_file(tmp_path / "run/plain/last.safetensors")
    assert all(
        torch.equal(weights[name], value) for name, value in load_file(tmp_path / "alone/last.safetensors").items()
    )


# --- building -------------------------------------------------------------------------------------------------------


def test_sizes_are_predicted_and_reached(
    data: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5.5e9))
    run = distill_spec(tmp_path, data, teacher__path=str(teacher))
    said = cache_teacher(run, tmp_path / "t.cache", "float16", quiet=True)
    size = (tmp_path / "t.cache").stat().st_size
    expected = f"{size / 1e6:.1f} MB, {size / 18 / 1e3:.1f} kB each"  # exact, for all views were looked at
    assert capfd.readouterr().err == f"{tmp_path}/t.cache: 18 views, about {expected}; 5.5 GB are free\n"
    assert said == f"{tmp_path}/t.cache: 18 views, {expected}"


def test_too_little_room(data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e5))
    with pytest.raises(OutputError) as caught:
        make(tmp_path / "t.cache", data, teacher)
    assert str(caught.value).startswith(f"{tmp_path}/t.cache: 18 views, about ")
    assert str(caught.value).endswith("; only 0.1 MB are free: free some space, or choose another --output")
    assert list(tmp_path.iterdir()) == []


def test_only_what_the_recipe_looks_at_is_kept(data: Path, teacher: Path, tmp_path: Path) -> None:
    alone = open_cache(make(tmp_path / "a.cache", data, teacher, distill__terms=[{"kind": "ld"}]))
    assert (alone.header.edge_regions, alone.header.cls_regions) == (("main",), ())
    classes = open_cache(make(tmp_path / "b.cache", data, teacher, distill__terms=[{"kind": "kd", "region": "vlr"}]))
    assert (classes.header.edge_regions, classes.header.cls_regions) == ((), ("vlr",))
    assert alone.num_edge.sum() > 0 == alone.num_cls.sum()
    assert classes.num_cls.sum() > 0 == classes.num_edge.sum()


def test_a_batch_that_is_tried_out(data: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    """Without the teacher, which is not there; but a cache is built with the number of images of the run."""
    run = distill_spec(tmp_path / "run", data, teacher__cache=str(cache), train__batch="auto", train__epochs=1)
    assert "student" in engine.distill(run, quiet=True)
    with pytest.raises(SpecError) as caught:
        make(tmp_path / "t.cache", data, teacher, train__batch="auto")
    assert str(caught.value) == 'train.batch is "auto": pass --batch with the number that the run is going to have'


def slow_builder(pause: float) -> None:
    original = CacheWriter.append

    def slow(self: CacheWriter, batch: Sequence[ViewRows]) -> None:
        original(self, batch)
        time.sleep(pause)

    CacheWriter.append = slow  # type: ignore[method-assign]


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_builds_end_in_the_same_file(data: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.cache"

    def build() -> None:
        slow_builder(0.05)
        make(target, data, teacher)

    rng, kills = random.Random(0), 0
    for _ in range(4):
        process = runs.start(build)
        wait_for(partial_path(target).exists)
        time.sleep(rng.uniform(0.0, 0.15))
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills
    if not target.exists():
        make(target, data, teacher)
    assert target.read_bytes() == cache.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_build_that_can_go_on(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    line = f"teacher cache {teacher} --data {data} -o {tmp_path}/t.cache --dtype float32 --device cpu --batch 4 -q"
    sizes = "data.short_side=[64,64] data.long_side=96 data.workers=0"
    terms = 'distill.terms=[{kind="ld"},{kind="ld",region="vlr"},{kind="kd"}]'
    arguments = [*line.split(), *(part for value in (*sizes.split(), terms) for part in ("--set", value))]
    process = runs.start(runs.command, arguments, tmp_path / "log", lambda: slow_builder(0.2))
    wait_for(partial_path(tmp_path / "t.cache").exists)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: cache: stopped after ")
    assert last.endswith(" of 18 views; repeat the command to go on")
    process = runs.start(runs.command, arguments, tmp_path / "log")
    process.join(60)
    assert process.exitcode == 0
    assert "views are there already" in (tmp_path / "log").read_text()
    assert (tmp_path / "t.cache").read_bytes() == cache.read_bytes()


def test_a_signal_during_the_last_batch_changes_nothing(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CacheWriter.append

    def interrupted(self: CacheWriter, batch: Sequence[ViewRows]) -> None:
        original(self, batch)
        if self.num_done == len(self._ends):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CacheWriter, "append", interrupted)
    make(tmp_path / "t.cache", data, teacher)
    assert (tmp_path / "t.cache").read_bytes() == cache.read_bytes()


def test_windows(data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(MissingError) as caught:
        make(tmp_path / "t.cache", data, teacher)
    assert str(caught.value) == "teacher cache: needs Linux or macOS: make the file there, or do without --cache"


def test_what_float16_cannot_hold(data: Path, teacher: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(teacher)
    loud = {name: value * (1e6 if name == "head.edge.bias" else 1) for name, value in loaded.tensors.items()}
    loud["head.edge.bias"] = loud["head.edge.bias"] + 1e6
    checkpoint.save(tmp_path / "loud.safetensors", loud, loaded.meta)
    with pytest.raises(SpecError) as caught:
        make(tmp_path / "t.cache", data, tmp_path / "loud.safetensors", "float16")
    assert str(caught.value) == ("--dtype float16: the teacher says what is not finite in it: pass --dtype float32")
    make(tmp_path / "u.cache", data, tmp_path / "loud.safetensors", "float32")


# --- what is refused ------------------------------------------------------------------------------------------------

ELSEWHERE = (
    "looks at more than what the teacher says in the main region and the VLR, which is what a cache holds: {}, or pass "
    "--preset ld-full or ld-main (small-ld-full or small-ld-main for small data)"
)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "scales": (
        {"data__short_side": [64, 80]},
        "data.short_side [64, 80] is a range, which gives an image more views than a cache can hold: pass "
        "--set data.short_side=[80,80]",
    ),
    "canvas": (
        {"data__canvas": False},
        "data.canvas is false, so that what a teacher says of an image depends on the others of its batch: pass "
        "--set data.canvas=true",
    ),
    "scale": ({"teacher__scale": 2.0}, "teacher.scale 2 does not go with a cache: pass --set teacher.scale=1"),
    "unlabelled": (
        {"data__unlabelled": "photos"},
        "data.unlabelled: where to look in images without annotations only a teacher can say: pass --teacher FILE "
        "instead of a cache, or leave it out",
    ),
    "assistant": (
        {"assistant": {"model": runs.MODEL}},
        "assistant: a cache holds what one teacher says: distil the assistant alone, and then cache that",
    ),
    "all locations": (
        {"distill__terms": [{"kind": "ld"}, {"kind": "binary_kd"}]},
        'distill.terms.1: "binary_kd" ' + ELSEWHERE.format("pass --set distill.terms.1.region=main"),
    ),
    "features": (
        {"distill__terms": [{"kind": "pkd"}]},
        'distill.terms.0: "pkd" ' + ELSEWHERE.format("leave the term out"),
    ),
    "features in the main region": (
        {"distill__terms": [{"kind": "imitation", "region": "main"}]},
        'distill.terms.0: "imitation" ' + ELSEWHERE.format("leave the term out"),
    ),
    "towers": (
        {"distill__terms": [{"kind": "crosskd_cls"}], "distill__cut": 1},
        'distill.terms.0: "crosskd_cls" ' + ELSEWHERE.format("leave the term out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cache_holds_is_refused_before_any_file_is_read(tmp_path: Path, name: str) -> None:
    changed, message = REFUSED[name]
    nowhere = tmp_path / "none"
    for key, command in (("path", lambda run: cache_teacher(run, None, "float16")), ("cache", engine.distill)):
        run = distill_spec(tmp_path / "run", nowhere, **{f"teacher__{key}": str(nowhere)}, **changed)
        with pytest.raises(SpecError) as caught:
            command(run)
        assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


MADE_FOR: dict[str, tuple[dict[str, object], str]] = {
    "sizes": (
        {"data__short_side": [48, 48], "data__long_side": 72},
        "was made for data.short_side [64, 64], not [48, 48]; data.long_side 96, not 72: pass "
        "--set data.short_side=[64,64] --set data.long_side=96, or make another with `ldctl teacher cache`",
    ),
    "VLR": (
        {"distill__vlr": "reference", "distill__gamma": 0.5},
        'was made for distill.vlr "diou", not "reference"; distill.gamma 0.25, not 0.5: pass --set distill.vlr="diou" '
        "--set distill.gamma=0.25, or make another with `ldctl teacher cache`",
    ),
    "decoding": (
        {"data__scaled_jpeg": True},
        "was made for data.scaled_jpeg false, not true: pass --set data.scaled_jpeg=false, or make another with "
        "`ldctl teacher cache`",
    ),
    "head": (
        {"student__head__kind": "fcos", "distill__terms": [{"kind": "kd"}]},
        'was made for student.head.kind "gfl", not "fcos": pass --set student.head.kind="gfl", or make another with '
        "`ldctl teacher cache`",
    ),
    "regions": (
        {"distill__terms": [{"kind": "ld"}, {"kind": "bckd_box", "region": "vlr"}]},
        'tells no classes in the region of distill.terms.1 ("bckd_box", "vlr"), since it was made for a recipe that '
        "needs none: make another with `ldctl teacher cache` and this recipe, or leave the term out",
    ),
}


@pytest.mark.parametrize("name", MADE_FOR)
def test_a_cache_that_was_made_for_something_else(cache: Path, tmp_path: Path, name: str) -> None:
    """Before any data is read: there is none."""
    changed, message = MADE_FOR[name]
    with pytest.raises(SpecError) as caught:
        engine.distill(distill_spec(tmp_path / "run", tmp_path / "none", teacher__cache=str(cache), **changed))
    assert str(caught.value) == f"{cache}: {message}"
    assert list(tmp_path.iterdir()) == []


def test_another_grid(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an ldctl whose pyramid has a level more: of 64 x 96 pixels, one location more."""
    assert open_cache(cache).header.num_locations == 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1
    monkeypatch.setattr(cacheable, "STRIDES", cacheable.STRIDES[:-1])
    with pytest.raises(CheckpointError) as caught:
        engine.distill(distill_spec(tmp_path / "run", tmp_path / "none", teacher__cache=str(cache)), quiet=True)
    assert str(caught.value) == (
        f"{cache}: has 129 locations in a view, and this ldctl 128: make another with `ldctl teacher cache`"
    )


def test_what_makes_no_difference_is_not_refused(data: Path, cache: Path, tmp_path: Path) -> None:
    """Another VLR where none is looked at, fewer views, part of the recipe, another batch."""
    changed = {"distill__vlr": "reference", "data__flip": 0.0, "distill__terms": [{"kind": "ld"}], "train__batch": 2}
    run = distill_spec(tmp_path / "run", data, teacher__cache=str(cache), train__epochs=1, **changed)
    assert "student" in engine.distill(run, quiet=True)


def test_views_that_are_not_there(data: Path, teacher: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "t.cache", data, teacher, data__flip=0.0)
    with pytest.raises(SpecError) as caught:
        engine.distill(distill_spec(tmp_path / "run", data, teacher__cache=str(made)), quiet=True)
    assert str(caught.value) == (
        f"{made}: was made for data.flip 0.0, not 0.5: pass --set data.flip=0.0, or make another with "
        "`ldctl teacher cache`"
    )


def test_another_teacher(data: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    other = teacher.with_name("best.safetensors")
    other = Path(shutil.copy(other, tmp_path / "other.safetensors"))
    loaded = checkpoint.load(other)
    checkpoint.save(other, loaded.tensors, loaded.meta.model_copy(update={"created": "another day"}))
    both = {"teacher__cache": str(cache), "teacher__path": str(other)}
    with pytest.raises(SpecError) as caught:
        engine.distill(distill_spec(tmp_path / "run", data, **both), quiet=True)
    assert str(caught.value) == (
        f"{cache}: is not of {other}: leave out --teacher, or make a cache of it with `ldctl teacher cache`"
    )


def test_other_images_or_classes(data: Path, cache: Path, tmp_path: Path) -> None:
    def refusal(change: Callable[[str], str]) -> str:
        shutil.copytree(data, tmp_path / "data")
        for path in (tmp_path / "data/annotations").iterdir():
            path.write_text(change(path.read_text()))
        run = {"teacher__cache": str(cache), "distill__terms": [{"kind": "ld"}]}
        with pytest.raises(DataError) as caught:
            engine.distill(distill_spec(tmp_path / "run", tmp_path / "data", **run), quiet=True)
        shutil.rmtree(tmp_path / "data")
        return str(caught.value)

    assert refusal(lambda text: text.replace('"area": 100.0', '"area": 101.0')) == (
        f"{cache}: is of other images or boxes than {tmp_path}/data/annotations/instances_train2017.json: mend --data, "
        "or make a cache of these with `ldctl teacher cache`"
    )
    assert refusal(lambda text: text.replace('"cat"', '"cow"')) == (
        f"{cache}: the data has the classes cow, dog, the teacher cat, dog: a cache needs the same: pass --teacher "
        "FILE without --cache, or say which are the same with --set 'teacher.classes={...}'"
    )


def test_a_damaged_view_stops_training_with_a_message(data: Path, cache: Path, tmp_path: Path) -> None:
    """Found by a worker, in the middle of the run."""
    damaged = Path(shutil.copy(cache, tmp_path / "damaged.cache"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    run = distill_spec(tmp_path / "run", data, teacher__cache=str(damaged), data__workers=1)
    with pytest.raises(CheckpointError, match=r"damaged .* is not what was written"):
        engine.distill(run, quiet=True)


def test_without_a_preset_terms_look_where_a_cache_tells_something() -> None:
    flags = {"teacher.cache": "t.cache", "data.canvas": True}
    terms = [
        engine.distill_spec(None, flags, [], resume=False).distill.terms,
        engine.cache_spec(None, {"teacher.path": "t.safetensors", "data.canvas": True}, []).distill.terms,
    ]
    assert terms[0] == terms[1]
    assert [term.name for term in terms[0]] == ["ld/main", "ld/vlr", "binary_kd/main"]
    live = engine.distill_spec(None, {"teacher.path": "t.safetensors"}, [], resume=False).distill.terms
    assert live[:2] == terms[0][:2]
    assert live[2].weight == terms[0][2].weight
    caching.check_recipe(engine.distill_spec(None, flags, [], resume=False))
    own = engine.distill_spec(None, flags, ["distill.terms.0.weight=0.5"], resume=False).distill.terms
    assert own[0].weight == 0.5
