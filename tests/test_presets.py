"""Every shipped recipe loads, is complete, and says what it is and what to expect."""

import json
import tomllib
from pathlib import Path

import pytest

from ldctl import preset_files, spec, toml
from ldctl.distill import KD, LD
from ldctl.spec import DistillSpec, TeacherSpec

PRESETS = sorted((Path(__file__).parents[1] / "presets").glob("*.toml"))


def kind(path: Path) -> type[TeacherSpec] | type[DistillSpec]:
    sections = tomllib.loads(path.read_text())
    return DistillSpec if {"teacher", "student", "distill"} & set(sections) else TeacherSpec


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:count])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_and_its_resolved_text_too(path: Path, tmp_path: Path) -> None:
    loaded = spec.load(kind(path), path.stem, {}, [])
    (tmp_path / "resolved.toml").write_text(toml.dumps(loaded))
    assert spec.load(kind(path), str(tmp_path / "resolved.toml"), {}, []) == loaded
    assert loaded.output in (None, f"runs/{path.stem}")
    if isinstance(loaded, DistillSpec) and loaded.teacher.model:
        assert loaded.teacher.model.head.reg_max == loaded.student.head.reg_max


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_says_only_what_differs_from_the_defaults(path: Path) -> None:
    """But for lists and the generated set, which stand whole, and for the depth, which a preset is named after."""
    text, cls = path.read_text(), kind(path)
    loaded = spec.load(cls, str(path), {}, [])

    def leaves(values: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for key, value in values.items():
            found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
        return found

    for key in leaves(tomllib.loads(text)):
        if key.endswith((".depth", "terms", "output")) or key.startswith(("teacher.", "data.synthetic.")):
            continue
        *sections, last = key.split(".")
        values = tomllib.loads(text)
        place = values
        for section in sections:
            place = place[section]
        del place[last]
        try:
            without = cls.model_validate_json(json.dumps(values))
        except ValueError:
            continue  # needed by another key
        assert without != loaded, f"{key} is the default"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("said", ["AP", "easured", "ardware", "ours|inutes", "emory"])
def test_header_says(path: Path, said: str) -> None:
    """Purpose and expected AP with its source; hardware, hours and memory; whether this project measured them."""
    assert any(word in header(path) for word in said.split("|"))


LD_MAIN = {"ld/main": 0.25}
LD_FULL = {**LD_MAIN, "ld/vlr": 0.0625, "kd/main": 10.0}
LD_VOC = {**LD_MAIN, "ld/vlr": 0.0625, "kd/vlr": 10.0}
CROSSKD = {"crosskd_cls/all": 1.0, "crosskd_box/all": 4.0}
RECIPES = {
    "ld-main": LD_MAIN,
    "ld-full": LD_FULL,
    "ld-full-gi": {**LD_FULL, "imitation/gi": 2.0},
    "self-ld": LD_MAIN,
    "mmdet-ld": LD_MAIN,
    "bckd": {"binary_kd/all": 1.0, "bckd_box/all": 4.0},
    "pkd": {"pkd/features": 10.0},
    "crosskd": CROSSKD,
    "crosskd-pkd": {**CROSSKD, "pkd/features": 6.0},
}  # terms and weights of the published rows
VOC = {"ld-main-voc": LD_MAIN, "ld-full-voc": LD_VOC, "ld-full-gi-voc": {**LD_VOC, "imitation/gi": 2.0}}


def test_every_recipe_is_there_at_both_sizes() -> None:
    others = {"quickstart", "small", "small-teacher", "gfl-r101-coco-2x", "gfl-r101-voc"}
    assert {path.stem for path in PRESETS} == {*RECIPES, *(f"small-{name}" for name in RECIPES), *VOC, *others}
    assert {path.stem for path in PRESETS} == set(preset_files.preset_names())


@pytest.mark.parametrize("name", [*RECIPES, *(f"small-{name}" for name in RECIPES), *VOC])
def test_recipes_of_the_published_tables(name: str) -> None:
    loaded = spec.load(DistillSpec, name, {}, [])
    weights = {term.name: term.weight for term in loaded.distill.terms}
    assert weights == (RECIPES | VOC)[name.removeprefix("small-")]
    for term in loaded.distill.terms:
        if isinstance(term, LD | KD):
            assert term.temperature == (10.0 if isinstance(term, LD) else 2.0)
    assert loaded.distill.normalize == ("reference" if "mmdet" in name else "synced")
    assert loaded.distill.vlr == ("reference" if "full" in name else "diou")
    assert loaded.fault_of_heads(loaded.student) is None
