"""What the README says can be done as it says."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import coco_document, write_coco
from typer.testing import CliRunner

from ldctl import checkpoint, errors, mmdet
from ldctl.checkpoint import CheckpointMeta
from ldctl.cli import app
from ldctl.models import Detector, ModelSpec, ResNetSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]
COMMANDS = [line.removeprefix("ldctl ") for line in LINES if line.startswith("ldctl ")]
TRAINS = ("distill", "teacher train", "teacher cache")
# what `eval` and `export` read, which the commands before them wrote
NAMED = sorted({command.split()[1] for command in COMMANDS if command.startswith(("eval", "export"))})


def test_there_are_two_set_up_commands_and_ci_runs_the_second() -> None:
    quickstart, tests = (line for line in LINES if line.startswith("python3 -m venv"))
    assert quickstart.endswith("ldctl distill --preset quickstart")
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that holds what the README's commands name, in miniature."""
    folder = tmp_path_factory.mktemp("readme")
    classes = ("cat", "dog")
    write_coco(folder / "data" / "coco", coco_document(), "val")
    torch.manual_seed(0)
    full = Detector(ModelSpec(backbone=ResNetSpec(depth=18)), 80)
    torch.save({"meta": {}, "state_dict": mmdet.to_mmdet(full.state_dict(), "gfl")}, folder / "published.pth")
    model = ModelSpec(backbone=ResNetSpec(depth=18, width=0.125, init="none"), channels=32)
    meta = CheckpointMeta(model=model.model_dump(mode="json"), classes=classes, short_side=64, long_side=96)
    for name in NAMED:
        checkpoint.save(folder / name, Detector(model, len(classes)).state_dict(), meta)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    arguments = shlex.split(command, comments=True)
    if command.startswith("teacher import"):
        (workplace / "published.pth").rename(arguments[2])
    if command.startswith(TRAINS):
        arguments.append("--dry-run")
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.output
    assert result.output.strip()


def test_every_exit_code_is_in_the_table() -> None:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    table = README[README.index("## Exit codes") :].split("\n## ")[0]
    listed = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, flags=re.MULTILINE) for code in row.split(",")
    }
    assert listed == {cls.exit_code for cls in classes} | {0, 2}


def test_every_module_is_in_the_architecture_table() -> None:
    table = README[README.index("## Architecture") :].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)/?`", table))
    modules = {
        path.stem for path in (ROOT / "ldctl").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__"} <= named


def test_every_preset_is_named() -> None:
    for preset in (ROOT / "presets").glob("*.toml"):
        names = preset.stem, preset.stem.removeprefix("small-")
        assert any(f"`{name}`" in README or f"--preset {name}" in README for name in names), preset
