"""Weights from and to other tools: detectors of mmdet become checkpoints, and checkpoints become mmdet's files."""

import io
from pathlib import Path

import torch
from pydantic import ValidationError

from ldctl import checkpoint, mmdet
from ldctl.assemble import load_detector
from ldctl.checkpoint import CheckpointMeta
from ldctl.data.names import COCO_CLASSES, VOC_CLASSES
from ldctl.errors import CheckpointError, SpecError
from ldctl.files import write_whole
from ldctl.models.detector import Detector, ModelSpec
from ldctl.models.resnet import ResNetSpec
from ldctl.trainer import shapes


def import_teacher(source: Path, target: Path, classes: str | None) -> str:
    """Convert a dense detector of mmdet; return what was found.

    Args:
        source: `.pth` file of mmdet 2 or 3.
        target: Checkpoint to write; must not exist.
        classes: Names separated by commas, or a text file with one a line; by default COCO's for 80 and VOC's for 20.

    Raises:
        CheckpointError: The file is no detector with edge distributions; every entry that does not fit is listed, and
            nothing is written.
        SpecError: The classes cannot be inferred, or their number is wrong.
        OutputError: The target exists or cannot be written.
    """
    checkpoint.check_new(target)
    if checkpoint.is_ours(source):
        raise CheckpointError(f"{source}: a checkpoint of ldctl already, which needs no import: use it as it is")
    state = mmdet.read_mmdet(source)
    tensors = mmdet.from_mmdet(state, source)
    found = mmdet.infer_mmdet(state, source)
    names = _class_names(classes, found.num_classes)
    values = {
        "backbone": {"depth": found.depth, "dcn": found.has_dcn},
        "head": {
            "kind": found.kind,
            "reg_max": found.reg_max,
            "num_convs": found.num_convs,
            "norm": "group" if found.has_norm else "none",
        },
        "channels": found.channels,
    }
    try:
        model = ModelSpec.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        raise CheckpointError(
            f"{source}: {'.'.join(map(str, fault['loc']))} {fault['input']} is out of range ({fault['msg']}): "
            "import a GFL detector within it"
        ) from error
    checkpoint.fit(tensors, shapes(Detector(model, found.num_classes)), source)
    meta = CheckpointMeta(model=model.model_dump(mode="json"), classes=names, short_side=800, long_side=1333)
    checkpoint.save(target, tensors, meta)
    resnet = f"ResNet-{found.depth}{'-DCN' * found.has_dcn}"
    return (
        f"{target}: {mmdet.NAMES[found.kind]} with {resnet}, {found.num_classes} classes, reg_max {found.reg_max}, "
        f"{found.channels} channels; {len(state)} entries read, none left over"
    )


def _class_names(given: str | None, number: int) -> tuple[str, ...]:
    """Return the names that the user gave, or those of the data set with so many classes."""
    if given is None:
        known = {len(COCO_CLASSES): COCO_CLASSES, len(VOC_CLASSES): VOC_CLASSES}
        if number not in known:
            raise SpecError(
                f"the file has {number} classes and does not name them: pass --classes a,b,c or a text file"
            )
        return known[number]
    text = given
    if "," not in given:  # else a list, which may be longer than a path can be
        try:
            text = Path(given).read_text(encoding="utf-8").replace("\n", ",")
        except (OSError, UnicodeDecodeError) as error:
            if number != 1 or not isinstance(error, FileNotFoundError):
                raise SpecError(
                    f"--classes {given}: no text file ({error}): pass a,b,c or a file of one name a line"
                ) from error
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(names) != number or len(set(names)) != number:
        raise SpecError(f"--classes gives {len(set(names))} different names, the file has {number} classes")
    return names


def export_mmdet(source: Path, target: Path | None) -> str:
    """Write a checkpoint as a file that mmdet's `load_checkpoint` reads; return what was written.

    Args:
        source: Checkpoint.
        target: `.pth` file to write; by default beside the checkpoint.

    Raises:
        OutputError: The target exists or cannot be written.
        CheckpointError: The detector's backbone is no ResNet.
    """
    target = target or source.with_suffix(".pth")
    checkpoint.check_new(target)
    detector, _ = load_detector(source)
    if not isinstance(detector.spec.backbone, ResNetSpec):
        raise CheckpointError(
            f"{source}: the backbone is {detector.backbone.title}, and mmdet's files are written for ResNets only: "
            "use --to onnx"
        )
    state = mmdet.to_mmdet(detector.state_dict(), detector.spec.head.kind)
    packed = io.BytesIO()
    torch.save({"meta": {}, "state_dict": state}, packed)
    write_whole(target, packed.getvalue())
    said = f"{target}: {len(state)} entries under mmdet's names"
    width = mmdet.stem_width(state)
    if width == mmdet.WIDTH:
        return said
    return (
        f"{said}; the backbone has {width / mmdet.WIDTH:g} times the usual width, so mmdet needs a config with "
        f"base_channels={width} in its backbone, and `ldctl teacher import` does not read it"
    )
