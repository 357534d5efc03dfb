"""Options that several commands share, and what they say in the words of a spec."""

import difflib
import re
from pathlib import Path
from typing import Annotated

import typer

from ldctl.errors import SpecError

DEPTHS = {"r18": 18, "r34": 34, "r50": 50, "r101": 101}  # short names of the ResNets, as in the papers
BACKBONES = "r18, r34, r50, r101, a network of torchvision, or timm:NAME"

Checkpoint = Annotated[Path, typer.Argument(help="A .safetensors that ldctl wrote.")]
Preset = Annotated[
    str | None, typer.Option("--preset", "-p", help="Name of a shipped preset, or a TOML file.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override any value of the spec.", show_default=False),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="Folder of a COCO, VOC or YOLO data set. [default: data/coco]", show_default=False
    ),
]
OwnData = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="Folder of a data set. [default: that of the checkpoint's run]", show_default=False
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="<path>", help="Folder of the run. [default: runs/NAME]", show_default=False
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU when there is one]", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(help="Initial weights, order, augmentation. [default: 0]", show_default=False)
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images. [default: 12]", show_default=False)]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="<int>|auto",
        help="Images per step; auto: what fits. [default: 16]",
        show_default=False,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(help="Backbone weights: imagenet, none, or a file. [default: imagenet]", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]


def backbone_flags(section: str, name: str | None) -> dict[str, object]:
    """Return what an option says of a backbone: a ResNet's depth, or another network in the place of the preset's."""
    if name is None:
        return {}
    if name in DEPTHS:
        return {f"{section}.backbone.depth": DEPTHS[name]}
    if re.fullmatch(r"r\d+", name, re.IGNORECASE):  # which no network of torchvision is called
        near = difflib.get_close_matches(name.lower(), DEPTHS, n=1)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise SpecError(f"no backbone '{name}': {hint} are {BACKBONES}")
    kind = "timm" if name.startswith("timm:") else "torchvision"
    return {f"{section}.backbone": {"kind": kind, "name": name.removeprefix("timm:")}}


def read_batch(text: str | None) -> int | str | None:
    """Return the images per step that an option names, or that they are to be found."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is neither a whole number nor auto.", param_hint="'--batch'") from error


def given(flags: dict[str, object]) -> dict[str, object]:
    """Return the options that were given."""
    return {key: value for key, value in flags.items() if value is not None}
