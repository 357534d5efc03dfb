"""Weights of dense detectors from and to mmdet 2 and 3, which name and shape them alike.

Read and written are GFL, and what forks of mmdet have of its kind: GFLv2, and ATSS, FCOS and RetinaNet with edge
distributions.

The backbone must be of mmdet's "pytorch" style, as in every GFL and LD configuration. A "caffe" backbone (FCOS
configurations) has the same names and shapes, yet another stride placement and other input statistics: nothing in a
file tells them apart, so such weights are taken without complaint and detect poorly.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import resnet

from ldctl.errors import CheckpointError
from ldctl.keys import key_faults

PROJECT = "bbox_head.integral.project"  # mmdet keeps the bins 0 .. reg_max as a buffer
NUM_LEVELS = 5
WIDTH = 64  # channels behind the first layer of a ResNet of full width
NUM_MAPS = 3  # backbone maps that the pyramid reads
OFFSETS = 18  # x and y of each input of a deformable 3x3 convolution; its second version has a mask, too: 27
BUILDERS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50, 101: resnet.resnet101}
# Which head it is: what users call it, and our names of its output layers.
NAMES = {"gfl": "GFL", "gflv2": "GFLv2", "atss": "ATSS", "fcos": "FCOS", "retina": "RetinaNet"}
OUTPUTS = {
    "gfl": {"gfl_cls": "cls", "gfl_reg": "edge"},
    "gflv2": {"gfl_cls": "cls", "gfl_reg": "edge", "reg_conf.0": "quality.0", "reg_conf.2": "quality.2"},
    "atss": {"atss_cls": "cls", "atss_reg": "edge", "atss_centerness": "quality"},
    "fcos": {"conv_cls": "cls", "conv_reg": "edge", "conv_centerness": "quality"},
    "retina": {"atss_cls": "cls", "atss_reg": "edge"},
}
NUM_PRIORS = {"retina": 9}  # prior boxes at a cell; the other heads have one. Source: RetinaNet (arXiv:1708.02002), 4.1
# Shapes of weights whose sizes are fixed. Source: GFLv2's configuration
QUALITY_SHAPES = {"reg_conf.0": (64, 20, 1, 1), "reg_conf.2": (1, 64, 1, 1)}
# GFLv2 has a channel for the background, which nothing reads: dropped on the way in, silent on the way out.
BACKGROUND_BIAS = -20.0
# Blocks of the third stage, and whether they are bottlenecks, tell the depth.
DEPTHS = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101}
WRAPPERS = ("student.", "architecture.", "teacher.", "module.", "model.", "detector.")

# What training files hold beside weights: the log of losses and numpy's numbers. None of it is of use here.
IGNORED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # how a HistoryBuffer refers to its own methods
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
)


@dataclass(frozen=True)
class Inferred:
    """What the shapes of a state dict say of the detector.

    Attributes:
        kind: Of the head, a key of `NAMES`.
        depth: Of the ResNet.
        num_classes: Classes, without background.
        reg_max: Largest bin of an edge distribution.
        channels: Width of pyramid and head.
        num_convs: Layers of each tower.
        has_norm: Group norm in those layers, and not a bias.
        has_dcn: Deformable convolutions in the last three stages of the backbone.
    """

    kind: str
    depth: int
    num_classes: int
    reg_max: int
    channels: int
    num_convs: int
    has_norm: bool
    has_dcn: bool


class _Ignored:
    """Stands for an object that is read and thrown away: takes anything, keeps and does nothing."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_mmdet(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file of mmdet 2, mmdet 3 or torchvision: under `state_dict`, or flat.

    Only tensors and plain values are unpickled. The objects that mmengine's training files hold beside them become
    inert stand-ins; no code that the file names is imported or run.

    Raises:
        CheckpointError: The file is missing, unreadable, or holds objects of other kinds.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: pass the .pth of a GFL detector of mmdet")
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in IGNORED]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _explain(path, str(error)) from error
    except Exception as error:  # damaged bytes can make the reader raise anything
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__}): download it again") from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no tensors, neither flat nor under state_dict: pass the .pth of a GFL detector")
    return dict(state)


def infer_mmdet(state: Mapping[str, Tensor], path: Path) -> Inferred:
    """Tell the detector from its names and shapes.

    Raises:
        CheckpointError: It is wrapped in another module, or not a detector with edge distributions and a plain ResNet.
    """
    _refuse_kin(state, path)
    kind = _kind(state, path)
    blocks = _count(state, "backbone.layer3.")
    is_bottleneck = "backbone.layer3.0.conv3.weight" in state
    depth = DEPTHS.get((blocks, is_bottleneck))
    if depth is None:
        raise CheckpointError(
            f"{path}: no ResNet of 18, 34, 50 or 101 layers ({blocks} blocks in backbone.layer3): "
            "import a GFL detector with such a backbone"
        )
    width = stem_width(state) / WIDTH
    if width != 1:
        raise CheckpointError(
            f"{path}: the backbone has {width:g} times the width of a ResNet-{depth}, as ldctl's narrow students, and "
            "cannot be imported: use the .safetensors that the file was exported from"
        )
    names = [f"bbox_head.{name}.weight" for name in OUTPUTS[kind]][:2]
    cls, edge = (state[name] for name in names)
    num_priors = NUM_PRIORS.get(kind, 1)
    num_edges = 4 * num_priors
    has_bins = edge.ndim == 4 and edge.shape[0] % num_edges == 0 and edge.shape[0] >= 2 * num_edges
    if cls.ndim != 4 or cls.shape[0] % num_priors or not has_bins:
        raise CheckpointError(
            f"{path}: {names[0]} {list(cls.shape)} and {names[1]} {list(edge.shape)} are "
            f"no output layers of {NAMES[kind]}: import a GFL detector"
        )
    return Inferred(
        kind=kind,
        depth=depth,
        num_classes=cls.shape[0] // num_priors - (kind == "gflv2"),
        reg_max=edge.shape[0] // num_edges - 1,
        channels=cls.shape[1],
        num_convs=_count(state, "bbox_head.cls_convs."),
        has_norm="bbox_head.cls_convs.0.gn.weight" in state or "bbox_head.cls_convs.0.conv.bias" not in state,
        has_dcn=any(name.startswith("backbone.") and ".conv_offset." in name for name in state),
    )


def from_mmdet(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename the weights of a dense detector of mmdet to ours, as float32.

    Raises:
        CheckpointError: It is no such detector, its bins are not 0 .. reg_max, a weight is not finite, or entries are
            missing, unexpected or of another shape; the first are listed, one a line.
    """
    inferred = infer_mmdet(state, path)
    expected = {name: shape for name, shape in _expected(inferred).items() if name != PROJECT or name in state}
    called = NAMES[inferred.kind]
    verdict = f"do not fit a {called} detector with ResNet-{inferred.depth}: nothing imported"
    faults = key_faults({name: value.shape for name, value in state.items()}, expected, f"{called}'s", verdict)
    if faults:
        raise CheckpointError(f"{path}: {faults}")
    _check_values(state, path)
    names = _names(inferred.kind, inferred.num_convs, has_norm=inferred.has_norm)
    tensors = {
        names.get(name, name): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name != PROJECT
    }
    if inferred.kind == "gflv2":
        tensors |= {name: tensors[name][:-1].clone() for name in ("head.cls.weight", "head.cls.bias")}
    return tensors


def stem_width(state: Mapping[str, Tensor]) -> int:
    """Return the channels of the backbone's first layer, `WIDTH` where the file does not have it."""
    first = state.get("backbone.conv1.weight")
    return WIDTH if first is None or first.ndim == 0 else first.shape[0]


def to_mmdet(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Rename our weights to those of mmdet's detector, and add its buffer of bins.

    Args:
        tensors: Our weights.
        kind: Of the head.
    """
    if kind == "gflv2":
        weight, bias = tensors["head.cls.weight"], tensors["head.cls.bias"]
        background = {
            "head.cls.weight": torch.cat((weight, torch.zeros_like(weight[:1]))),
            "head.cls.bias": torch.cat((bias, torch.full_like(bias[:1], BACKGROUND_BIAS))),
        }
        tensors = {**tensors, **background}
    has_norm = "head.cls_tower.0.norm.weight" in tensors
    names = _names(kind, _count(tensors, "head.cls_tower."), has_norm=has_norm)
    names = {ours: theirs for theirs, ours in names.items()}
    num_bins = tensors["head.edge.weight"].shape[0] // (4 * NUM_PRIORS.get(kind, 1))
    state = {names.get(name, name): value for name, value in tensors.items()}
    return state | {PROJECT: torch.arange(num_bins, dtype=torch.float32)}


def _names(kind: str, num_convs: int, *, has_norm: bool) -> dict[str, str]:
    """Map mmdet's names of pyramid and head to ours; the backbone's are the same."""
    modules = {f"neck.lateral_convs.{i}.conv": f"fpn.lateral.{i}" for i in range(NUM_MAPS)}
    modules |= {f"neck.fpn_convs.{i}.conv": f"fpn.output.{i}" for i in range(NUM_LEVELS)}
    modules |= {f"bbox_head.{theirs}": f"head.{ours}" for theirs, ours in OUTPUTS[kind].items()}
    num_scales = 0 if kind == "retina" else NUM_LEVELS
    names = {f"bbox_head.scales.{i}.scale": f"head.scales.{i}" for i in range(num_scales)}
    for i in range(num_convs):
        for theirs, ours in (("cls_convs", "cls_tower"), ("reg_convs", "edge_tower")):
            if has_norm:
                names[f"bbox_head.{theirs}.{i}.conv.weight"] = f"head.{ours}.{i}.conv.weight"
                modules[f"bbox_head.{theirs}.{i}.gn"] = f"head.{ours}.{i}.norm"
            else:
                modules[f"bbox_head.{theirs}.{i}.conv"] = f"head.{ours}.{i}.conv"
    for theirs, ours in modules.items():
        names |= {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}
    return names


def _expected(inferred: Inferred) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every entry of mmdet's detector."""
    with torch.device("meta"):
        backbone = BUILDERS[inferred.depth]().state_dict()
    shapes = {f"backbone.{name}": tuple(value.shape) for name, value in backbone.items() if not name.startswith("fc.")}
    if inferred.has_dcn:
        deformable = [name for name in shapes if re.fullmatch(r"backbone\.layer[234]\.\d+\.conv2\.weight", name)]
        for name in deformable:
            prefix = name.removesuffix("weight") + "conv_offset."
            shapes |= {f"{prefix}weight": (OFFSETS, *shapes[name][1:]), f"{prefix}bias": (OFFSETS,)}
    channels, last = inferred.channels, backbone["fc.weight"].shape[1]
    for name in _names(inferred.kind, inferred.num_convs, has_norm=inferred.has_norm):
        if name.endswith(".scale"):
            shapes[name] = ()
        elif name.endswith(("gn.weight", "bias")):
            shapes[name] = (channels,)
        else:
            shapes[name] = (channels, channels, 3, 3)
    for i in range(NUM_MAPS):
        shapes[f"neck.lateral_convs.{i}.conv.weight"] = (channels, last >> (NUM_MAPS - 1 - i), 1, 1)
    if inferred.kind == "retina":  # the map of stride 64 is made from the backbone's
        shapes[f"neck.fpn_convs.{NUM_MAPS}.conv.weight"] = (channels, last, 3, 3)
    num_priors, num_bins = NUM_PRIORS.get(inferred.kind, 1), inferred.reg_max + 1
    num_scores = inferred.num_classes + (inferred.kind == "gflv2")
    outputs = {"cls": num_priors * num_scores, "edge": num_priors * 4 * num_bins, "quality": 1}
    for layer, ours in OUTPUTS[inferred.kind].items():
        shape = QUALITY_SHAPES.get(layer) or (outputs[ours], channels, 3, 3)
        shapes[f"bbox_head.{layer}.weight"] = shape
        shapes[f"bbox_head.{layer}.bias"] = shape[:1]
    return shapes | {PROJECT: (num_bins,)}


def _count(names: Iterable[str], prefix: str) -> int:
    """Return one more than the largest index that follows the prefix."""
    heads = (name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix))
    return max((int(head) + 1 for head in heads if head.isdecimal()), default=0)


def _refuse_kin(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what is recognizably something else, by its name."""
    wrapper = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in state)), None)
    if wrapper is not None:
        raise CheckpointError(
            f"{path}: names start with '{wrapper}', the detector is inside another module: strip it: "
            f"python -c \"import torch; s = torch.load('{path.name}', map_location='cpu')['state_dict']; "
            f"s = {{k[{len(wrapper)}:]: v for k, v in s.items() if k.startswith('{wrapper}')}}; "
            "torch.save({'state_dict': s}, 'stripped.pth')\", and import stripped.pth"
        )


def _kind(state: Mapping[str, Tensor], path: Path) -> str:
    """Return which head it is, by the names of its output layers."""
    telling = {"gflv2": "reg_conf", "atss": "atss_centerness", "fcos": "conv_centerness", "retina": "atss_cls"}
    found = (kind for kind, layer in telling.items() if any(name.startswith(f"bbox_head.{layer}.") for name in state))
    kind = next(found, "gfl")
    _refuse_plain_boxes(state, path, "bbox_head.retina_reg.weight", "retina")  # as it is called in mmdet itself
    wanted = [f"bbox_head.{layer}.weight" for layer in OUTPUTS[kind]][:2]
    if missing := [name for name in wanted if name not in state]:
        *others, last = NAMES.values()
        raise CheckpointError(
            f"{path}: no {missing[0]}: not a detector of mmdet with a head of {', '.join(others)} or {last}: import one"
        )
    _refuse_plain_boxes(state, path, wanted[1], kind)
    return kind


def _refuse_plain_boxes(state: Mapping[str, Tensor], path: Path, name: str, kind: str) -> None:
    """Refuse an output layer with one number for each edge, as the published heads have that GFL's kin are made of."""
    if name in state and state[name].shape[:1] == (4 * NUM_PRIORS.get(kind, 1),):
        raise CheckpointError(
            f"{path}: {name} has {state[name].shape[0]} channels: the head predicts boxes without edge distributions, "
            "which localization distillation is about: import one that has them, or train it: "
            f"ldctl teacher train --set model.head.kind={kind}"
        )


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse bins other than 0 .. reg_max, and weights that are not finite."""
    project = state.get(PROJECT)
    if project is not None and not torch.equal(project.float(), torch.arange(len(project), dtype=torch.float32)):
        raise CheckpointError(
            f"{path}: {PROJECT} is not 0, 1, .. {len(project) - 1}: bins that are unevenly spaced cannot be imported"
        )
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(broken)} of {len(state)} entries, first in {broken[0]}: "
            "training had diverged; use an earlier file"
        )


def _explain(path: Path, message: str) -> CheckpointError:
    """Say what a refused pickle holds and how to get the weights out of it."""
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return CheckpointError(f"{path}: not a file of PyTorch, or a damaged one: pass the .pth of a GFL detector")
    return CheckpointError(
        f"{path}: holds {found[1]}, which could run code and is not read: if you trust the file, strip it where it was "
        f"trained: python -c \"import torch; s = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"torch.save({{'state_dict': s['state_dict']}}, 'stripped.pth')\", and import stripped.pth"
    )
