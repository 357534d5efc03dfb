"""Every shipped recipe loads, is complete, and says what it is and what to expect."""

import json
import tomllib
from pathlib import Path

import pytest

from ldctl import spec, toml
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


def test_the_papers_recipes_are_there() -> None:
    names = {path.stem for path in PRESETS}
    assert {"quickstart", "gfl-r101-coco-2x", "ld-r18-r101-coco", "ld-r50-r101-coco"} <= names
    assert names == set(spec.preset_names())


@pytest.mark.parametrize("path", [path for path in PRESETS if path.stem.startswith("ld-")], ids=lambda path: path.stem)
def test_recipes_of_the_released_code(path: Path) -> None:
    loaded = spec.load(DistillSpec, str(path), {}, [])
    terms = {term.name: term for term in loaded.distill.terms}
    assert {name: term.weight for name, term in terms.items()} == {"ld/main": 0.25, "ld/vlr": 0.0625, "kd/main": 10.0}
    assert {term.model_dump()["temperature"] for term in terms.values()} == {10.0, 2.0}
    assert (loaded.distill.vlr, loaded.distill.normalize) == ("reference", "synced")
    assert loaded.student.backbone.depth == int(path.stem.split("-")[1][1:])
