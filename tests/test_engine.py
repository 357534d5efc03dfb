"""What a distillation run says of its teacher and of what the student gained."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from ldctl import checkpoint, engine
from ldctl.errors import CheckpointError, OutputError, TrainingError
from ldctl.metrics import Metrics
from ldctl.run_folder import check_output, open_folder
from ldctl.trainer import BEST_FILE

FIGURES = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RECALLS = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


def metrics(ap: float) -> Metrics:
    return Metrics(ap=ap, **dict.fromkeys(FIGURES + RECALLS, math.nan), per_class={})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    engine.train_teacher(runs.plain_spec(folder, train__epochs=1), quiet=True)
    return folder / "best.safetensors"


def said_of(teacher: Path, folder: Path, ap: float, monkeypatch: pytest.MonkeyPatch, **values: object) -> str:
    """Return what a run says of its teacher before the first step, which is where this run ends."""

    def stop(*_: object) -> None:
        raise RuntimeError("the first step")

    said: list[str] = []
    monkeypatch.setattr(engine, "evaluate_detections", lambda *_: metrics(ap))
    monkeypatch.setattr(engine, "note", said.append)
    monkeypatch.setattr(engine, "run", stop)
    with pytest.raises(RuntimeError, match="the first step"):
        engine.distill(runs.distill_spec(folder, teacher, **values), quiet=True)
    (line,) = (line for line in said if line.startswith("teacher:"))
    return line


def recorded(teacher: Path, ap: float) -> Path:
    """Copy a teacher whose file says another AP."""
    loaded = checkpoint.load(teacher)
    meta = loaded.meta.model_copy(update={"metrics": {**loaded.meta.metrics, "ap": ap}})
    target = teacher.with_name(f"{ap}.safetensors")
    if not target.exists():
        checkpoint.save(target, loaded.tensors, meta)
    return target


@pytest.mark.parametrize(
    ("ap", "changed", "expected"),
    [
        (0.4, {}, "teacher: AP 0.400 on these images, its file says 0.400 for the same images"),
        (
            0.35,
            {},
            "teacher: AP 0.350 on these images, its file says 0.400 for the same images: it was evaluated at another "
            "input size or by another version, or its weights were changed",
        ),
        (0.35, {"data__synthetic__seed": 1}, "teacher: AP 0.350 on these images, its file says 0.400 for others"),
        (
            0.005,
            {"data__synthetic__seed": 1},
            "teacher: AP 0.005 on these images, its file says 0.400 for others: it finds next to nothing here, so "
            "there is little to learn from it: check its classes and input size",
        ),
    ],
)
def test_teacher_is_examined_before_the_first_step(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ap: float, changed: dict[str, object], expected: str
) -> None:
    assert said_of(recorded(teacher, 0.4), tmp_path / "run", ap, monkeypatch, **changed) == expected


def test_examined_teacher_has_the_ap_of_its_own_run(teacher: Path, tmp_path: Path) -> None:
    spec = runs.distill_spec(tmp_path / "run", teacher, train__epochs=1)
    results = engine.distill(spec, quiet=True)
    assert math.isclose(results["teacher"].ap, checkpoint.load_meta(teacher).metrics["ap"], abs_tol=1e-9)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (
            {"student": 0.5},
            "student: AP 0.500; whether the teacher helped is not known: --compare also trains a plain student",
        ),
        ({"student": 0.5, "plain": 0.48}, "student: AP 0.500, +0.020 against the plain student"),
        (
            {"student": 0.5, "plain": 0.52},
            "student: AP 0.500, -0.020 against the plain student: look at the shares of the gradient, train longer, or "
            "take a better teacher",
        ),
    ],
)
def test_last_line_says_how_the_student_stands(results: dict[str, float], expected: str) -> None:
    assert engine.verdict({name: metrics(ap) for name, ap in results.items()}) == expected


def test_shares_of_the_gradient_are_recorded_once_per_epoch(teacher: Path, tmp_path: Path) -> None:
    engine.distill(runs.distill_spec(tmp_path / "run", teacher), quiet=True)
    found = [record for record in runs.records(tmp_path / "run") if record["phase"] == "gradient"]
    assert [(record["epoch"], record["step"]) for record in found] == [(1, 1), (2, 4)]
    for record in found:
        shares = {key: value for key, value in record.items() if key not in ("phase", "epoch", "step")}
        assert list(shares) == ["qfl", "giou", "dfl", "ld/main", "ld/vlr", "binary_kd/all"]
        assert math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6)
        assert all(share > 0 for share in shares.values())


def test_an_assistant_learns_from_the_teacher_and_teaches_the_student(teacher: Path, tmp_path: Path) -> None:
    assistant = {"model": runs.MODEL, "train": {**runs.TRAIN, "epochs": 1}}
    spec = runs.distill_spec(tmp_path / "run", teacher, assistant=assistant, train__epochs=1)
    results = engine.distill(spec, quiet=True)
    assert list(results) == ["teacher", "assistant", "student"]
    between, last = (
        checkpoint.load_meta(tmp_path / "run" / name) for name in ("assistant/best.safetensors", BEST_FILE)
    )
    assert between.teacher_sha256 == checkpoint.sha256(teacher)
    assert last.teacher_sha256 == checkpoint.sha256(tmp_path / "run/assistant/best.safetensors")
    again = engine.distill(spec, resume=True, quiet=True)
    assert {name: one.ap for name, one in again.items()} == {name: one.ap for name, one in results.items()}


def test_initial_weights_are_looked_for_before_anything_is_trained(teacher: Path, tmp_path: Path) -> None:
    spec = runs.distill_spec(tmp_path / "run", teacher, student__backbone__init=str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file"):
        engine.distill(spec, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_teacher_from_the_future(
    teacher: Path, tmp_path: Path, is_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model, in its file or in the header of its cache, has a key that this version does not know."""
    loaded = checkpoint.load(teacher)
    meta = loaded.meta.model_copy(update={"model": {**loaded.meta.model, "decoder": "new"}})
    path = tmp_path / ("t.cache" if is_cached else "t.safetensors")
    values = {}
    if is_cached:
        monkeypatch.setattr(engine, "open_matching", lambda _: SimpleNamespace(path=path, header=meta))
        values = {"teacher__cache": str(path)}
    else:
        checkpoint.save(path, loaded.tensors, meta)
    spec = runs.distill_spec(tmp_path / "run", path, **values)
    with pytest.raises(CheckpointError) as caught:
        engine.distill(spec, quiet=True)
    assert str(caught.value) == f"{path}: holds a model that this version cannot build: update ldctl"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_took_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """Between the check and the start the data are read, which takes a while."""
    spec = runs.plain_spec(tmp_path / "run", train__epochs=1)
    folder = check_output(spec, resume=False)
    engine.train_teacher(spec, quiet=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="holds a run already"):
        open_folder(spec, folder, (), resume=False)
    open_folder(spec, folder, (), resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_gradient_that_is_not_finite_stops_the_run(teacher: Path, tmp_path: Path) -> None:
    spec = runs.distill_spec(tmp_path / "run", teacher, distill__terms=[{"kind": "ld", "weight": 1e38}])
    with pytest.raises(TrainingError, match=r"^student: the gradient of ld/main is not finite at step 1: "):
        engine.distill(spec, quiet=True)


def test_a_teachers_ap_is_held_against_its_own_on_the_same_images_to_evaluate_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the student trains on."""
    ap = checkpoint.load_meta(teacher).metrics["ap"]
    said = said_of(teacher, tmp_path / "run", ap, monkeypatch, data__synthetic__train=9)
    assert f"its file says {ap:.3f} for the same images" in said
