"""GFL weights from and to mmdet."""

import itertools
import json
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from ldctl.errors import CheckpointError
from ldctl.mmdet import Inferred, from_mmdet, infer_mmdet, read_mmdet, to_mmdet
from ldctl.models import Detector, HeadSpec, ModelSpec, ResNetSpec

HERE = Path("gfl.pth")


def shapes(shared: Path, depth: int, entry: str = "gfl") -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((shared / f"oracle/mmdet_keys_r{depth}.json").read_text())[entry]
    return found


@pytest.fixture(scope="session")
def state(shared: Path) -> dict[str, Tensor]:
    """Return a reference state dict, ResNet-18; not to be changed."""
    return oracle.weights(shapes(shared, 18), 18)


class HistoryBuffer:
    """Pickles as mmengine's does: numpy arrays, and a dictionary of its own methods."""

    def __init__(self) -> None:
        self._log_history = np.array([1.0, 2.0])
        self._count_history = np.array([1, 1])

    def mean(self) -> float:
        return float(np.mean(self._log_history))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"statistics_methods": {"mean": HistoryBuffer.mean}}


def container(kind: str, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> object:
    """Wrap weights as mmdet 2, mmdet 3 or torchvision save them."""
    meta = {"mmdet_version": "2.0.0", "config": "model = dict()", "CLASSES": ("person",), "epoch": 12, "seed": None}
    weights = OrderedDict(state)
    if kind == "mmdet2":
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}
        return {"meta": meta, "state_dict": weights, "optimizer": optimizer}
    if kind == "mmdet2-published":
        return {"meta": meta, "state_dict": weights}
    if kind == "mmdet3":
        module = ModuleType("mmengine.logging.history_buffer")
        module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
        monkeypatch.setattr(HistoryBuffer.mean, "__module__", module.__name__)
        for name in ("mmengine", "mmengine.logging"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        hub = {
            "log_scalars": OrderedDict({"train/loss": HistoryBuffer()}),
            "runtime_info": OrderedDict({"iter": 3, "best": np.float32(0.4), "ids": np.array([1, 2])}),
            "resumed_keys": OrderedDict({"iter": True}),
        }
        return {
            "meta": meta | {"seed": np.int64(1)}, "state_dict": weights, "message_hub": hub, "optimizer": {},
            "param_schedulers": [{"last_step": 1}],
        }  # fmt: skip
    return weights


KINDS = ("mmdet2", "mmdet2-published", "mmdet3", "flat")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_containers(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, kind: str, is_zip: bool
) -> None:
    path = tmp_path / "gfl.pth"
    with monkeypatch.context() as patch:
        torch.save(container(kind, state, patch), path, _use_new_zipfile_serialization=is_zip)
    assert "mmengine" not in sys.modules
    read = read_mmdet(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


DEPTHS = [(18, False), (34, False), (50, False), (101, False), (50, True), (101, True)]


@pytest.mark.parametrize(("depth", "dcn"), DEPTHS)
def test_names_and_shapes_are_mmdets(shared: Path, depth: int, dcn: bool) -> None:
    with torch.device("meta"):
        detector = Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init="none", dcn=dcn)), 80)
    theirs = to_mmdet(detector.state_dict(), "gfl")
    kind = "gfl_dcn" if dcn else "gfl"
    assert {name: list(value.shape) for name, value in theirs.items()} == shapes(shared, depth, kind)


@pytest.mark.parametrize(("depth", "dcn"), DEPTHS)
def test_there_and_back_is_the_identity(shared: Path, depth: int, dcn: bool) -> None:
    state = oracle.weights(shapes(shared, depth, "gfl_dcn" if dcn else "gfl"), depth, "round")
    assert infer_mmdet(state, HERE).has_dcn == dcn
    ours = from_mmdet(state, HERE)
    detector = Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init="none", dcn=dcn)), 80)
    detector.load_state_dict(ours)
    back = to_mmdet(detector.state_dict(), "gfl")
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value)
        assert back[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("depth", "num_classes", "reg_max", "channels", "num_convs"),
    [(18, 80, 16, 256, 4), (34, 1, 16, 64, 2), (50, 20, 8, 128, 4), (101, 3, 1, 32, 1)],
)
def test_what_shapes_tell(depth: int, num_classes: int, reg_max: int, channels: int, num_convs: int) -> None:
    spec = ModelSpec(
        backbone=ResNetSpec.model_validate({"depth": depth, "init": "none"}),
        head=HeadSpec(reg_max=reg_max, num_convs=num_convs),
        channels=channels,
    )
    ours = Detector(spec, num_classes).state_dict()
    theirs = to_mmdet(ours, "gfl")
    assert infer_mmdet(theirs, HERE) == Inferred(
        "gfl", depth, num_classes, reg_max, channels, num_convs, has_norm=True, has_dcn=False
    )
    assert from_mmdet(theirs, HERE).keys() == ours.keys()


def gflv2_shapes(shared: Path) -> dict[str, list[int]]:
    head: dict[str, list[int]] = json.loads((shared / "oracle/fork_keys_gflv2_head.json").read_text())
    return {name: shape for name, shape in shapes(shared, 18).items() if not name.startswith("bbox_head.")} | head


def test_gflv2_there_and_back(shared: Path) -> None:
    """The identity but for the background's channel, which is nothing and comes back silent."""
    layout = gflv2_shapes(shared)
    state = oracle.weights(layout, 18, "round")
    ours = from_mmdet(state, HERE)
    assert infer_mmdet(state, HERE) == Inferred("gflv2", 18, 80, 16, 256, 4, has_norm=True, has_dcn=False)
    detector = Detector(ModelSpec(backbone=ResNetSpec(depth=18, init="none"), head=HeadSpec(kind="gflv2")), 80)
    detector.load_state_dict(ours)
    back = to_mmdet(detector.state_dict(), "gflv2")
    assert {name: list(value.shape) for name, value in back.items()} == layout
    for name, value in state.items():
        is_cls = name.startswith("bbox_head.gfl_cls.")
        assert torch.equal(back[name][:80], value[:80]) if is_cls else torch.equal(back[name], value)
    assert not back["bbox_head.gfl_cls.weight"][80].any()
    assert back["bbox_head.gfl_cls.bias"][80].sigmoid() < 1e-8
    assert all(torch.equal(value, ours[name]) for name, value in from_mmdet(back, HERE).items())


def test_gflv2_that_does_not_fit(shared: Path) -> None:
    state = oracle.weights(gflv2_shapes(shared), 18)
    del state["bbox_head.reg_conf.2.bias"]
    state["bbox_head.reg_conf.0.weight"] = torch.zeros(64, 16, 1, 1)
    assert fault(state) == (
        "gfl.pth: 2 entries do not fit a GFLv2 detector with ResNet-18: nothing imported\n"
        "missing: bbox_head.reg_conf.2.bias [1]\n"
        "shape: bbox_head.reg_conf.0.weight is [64, 16, 1, 1], GFLv2's is [64, 20, 1, 1]"
    )


def centerness_shapes(shared: Path, kind: str, num_bins: int = 17) -> dict[str, list[int]]:
    """Return the layout of the released LD code's heads with centerness: GFL's but for the names of the outputs."""
    cls, edge, centerness = LAYERS[kind]
    renamed = {"bbox_head.gfl_cls": f"bbox_head.{cls}", "bbox_head.gfl_reg": f"bbox_head.{edge}"}
    layout = {}
    for name, shape in shapes(shared, 18).items():
        module, _, part = name.rpartition(".")
        layout[f"{renamed.get(module, module)}.{part}"] = shape
    layout[f"bbox_head.{edge}.weight"], layout[f"bbox_head.{edge}.bias"] = [4 * num_bins, 256, 3, 3], [4 * num_bins]
    layout["bbox_head.integral.project"] = [num_bins]
    return layout | {f"bbox_head.{centerness}.weight": [1, 256, 3, 3], f"bbox_head.{centerness}.bias": [1]}


LAYERS = {
    "atss": ("atss_cls", "atss_reg", "atss_centerness"),
    "fcos": ("conv_cls", "conv_reg", "conv_centerness"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_heads_with_centerness_there_and_back(shared: Path, kind: str) -> None:
    state = oracle.weights(centerness_shapes(shared, kind), 18, "round")
    assert infer_mmdet(state, HERE) == Inferred(kind, 18, 80, 16, 256, 4, has_norm=True, has_dcn=False)
    head = HeadSpec.model_validate({"kind": kind})
    detector = Detector(ModelSpec(backbone=ResNetSpec(depth=18, init="none"), head=head), 80)
    detector.load_state_dict(from_mmdet(state, HERE))
    assert torch.equal(detector.head.quality.weight, state[f"bbox_head.{LAYERS[kind][2]}.weight"])
    back = to_mmdet(detector.state_dict(), kind)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", LAYERS)
def test_boxes_without_distributions_are_refused(shared: Path, kind: str) -> None:
    state = oracle.weights(centerness_shapes(shared, kind, num_bins=1), 18)
    assert fault(state) == (
        f"gfl.pth: bbox_head.{LAYERS[kind][1]}.weight has 4 channels: the head predicts boxes without edge "
        "distributions, which localization distillation is about: import one that has them, or train it: "
        f"ldctl teacher train --set model.head.kind={kind}"
    )


def retina_shapes(shared: Path, *, has_norm: bool) -> dict[str, list[int]]:
    """Return the layout of the released LD code's RetinaNet: nine prior boxes, no scales, the top from the input."""
    others = (".gn.", ".scales.", "bbox_head.gfl_")
    layout = {name: x for name, x in shapes(shared, 18).items() if not any(other in name for other in others)}
    for tower, layer in itertools.product(("cls_convs", "reg_convs"), range(4)):
        for part in ("gn.weight", "gn.bias") if has_norm else ("conv.bias",):
            layout[f"bbox_head.{tower}.{layer}.{part}"] = [256]
    for name, channels in (("atss_cls", 9 * 80), ("atss_reg", 9 * 4 * 17)):
        layout |= {f"bbox_head.{name}.weight": [channels, 256, 3, 3], f"bbox_head.{name}.bias": [channels]}
    return layout | {"neck.fpn_convs.3.conv.weight": [256, 512, 3, 3]}


@pytest.mark.parametrize("has_norm", [True, False])
def test_retina_there_and_back(shared: Path, has_norm: bool) -> None:
    layout = retina_shapes(shared, has_norm=has_norm)
    state = oracle.weights(layout, 18, "round")
    assert infer_mmdet(state, HERE) == Inferred("retina", 18, 80, 16, 256, 4, has_norm=has_norm, has_dcn=False)
    head = HeadSpec(kind="retina", norm="group" if has_norm else "none")
    detector = Detector(ModelSpec(backbone=ResNetSpec(depth=18, init="none"), head=head), 80)
    detector.load_state_dict(from_mmdet(state, HERE))
    assert torch.equal(detector.fpn.output[3].weight, state["neck.fpn_convs.3.conv.weight"])
    back = to_mmdet(detector.state_dict(), "retina")
    assert {name: list(value.shape) for name, value in back.items()} == layout
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_retina_that_does_not_fit(shared: Path) -> None:
    """A pyramid that was made for another head, and towers with a norm and a bias."""
    state = oracle.weights(retina_shapes(shared, has_norm=True), 18)
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(256, 256, 3, 3)
    state["bbox_head.cls_convs.0.conv.bias"] = torch.zeros(256)
    assert fault(state) == (
        "gfl.pth: 2 entries do not fit a RetinaNet detector with ResNet-18: nothing imported\n"
        "unexpected: bbox_head.cls_convs.0.conv.bias [256]\n"
        "shape: neck.fpn_convs.3.conv.weight is [256, 256, 3, 3], RetinaNet's is [256, 512, 3, 3]"
    )


@pytest.mark.parametrize("names", [("retina_cls", "retina_reg"), ("atss_cls", "atss_reg")])
def test_retina_without_distributions_is_refused(shared: Path, names: tuple[str, str]) -> None:
    """Whether the names are those of mmdet itself, or of its fork."""
    state = oracle.weights(retina_shapes(shared, has_norm=False), 18)
    for theirs, ours, channels in zip(("atss_cls", "atss_reg"), names, (720, 36), strict=True):
        del state[f"bbox_head.{theirs}.weight"]
        state[f"bbox_head.{ours}.weight"] = torch.zeros(channels, 256, 3, 3)
    assert fault(state) == (
        f"gfl.pth: bbox_head.{names[1]}.weight has 36 channels: the head predicts boxes without edge distributions, "
        "which localization distillation is about: import one that has them, or train it: "
        "ldctl teacher train --set model.head.kind=retina"
    )


def test_bins_may_be_left_out_and_halves_become_floats(state: dict[str, Tensor]) -> None:
    changed = {name: value for name, value in state.items() if name != "bbox_head.integral.project"}
    changed["backbone.conv1.weight"] = state["backbone.conv1.weight"].half()
    ours = from_mmdet(changed, HERE)
    assert ours["backbone.conv1.weight"].dtype == torch.float32
    assert torch.equal(ours["backbone.conv1.weight"], state["backbone.conv1.weight"].half().float())


def fault(state: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as error:
        from_mmdet(state, HERE)
    return str(error.value)


def test_every_entry_that_does_not_fit_is_listed(state: dict[str, Tensor]) -> None:
    changed = dict(state)
    changed["bbox_head.odd"] = torch.zeros(2)
    del changed["backbone.layer2.0.bn1.weight"], changed["bbox_head.scales.4.scale"]
    changed["neck.lateral_convs.0.conv.weight"] = torch.zeros(256, 64, 1, 1)
    changed["bbox_head.gfl_reg.bias"] = torch.zeros(1)
    assert fault(changed) == (
        "gfl.pth: 5 entries do not fit a GFL detector with ResNet-18: nothing imported\n"
        "missing: backbone.layer2.0.bn1.weight [128]\n"
        "missing: bbox_head.scales.4.scale []\n"
        "unexpected: bbox_head.odd [2]\n"
        "shape: neck.lateral_convs.0.conv.weight is [256, 64, 1, 1], GFL's is [256, 128, 1, 1]\n"
        "shape: bbox_head.gfl_reg.bias is [1], GFL's is [68]"
    )


def test_no_more_than_twenty_entries_are_listed(state: dict[str, Tensor]) -> None:
    lines = fault(state | {f"odd.{index}": torch.zeros(2) for index in range(23)}).splitlines()
    assert lines[0] == "gfl.pth: 23 entries do not fit a GFL detector with ResNet-18: nothing imported"
    assert lines[20:] == ["unexpected: odd.19 [2]", "and 3 more"]


def test_a_narrow_backbone_is_one_line() -> None:
    narrow = Detector(ModelSpec(backbone=ResNetSpec(depth=18, width=0.125, init="none"), channels=32), 3)
    assert fault(to_mmdet(narrow.state_dict(), "gfl")) == (
        "gfl.pth: the backbone has 0.125 times the width of a ResNet-18, as ldctl's narrow students, and cannot be "
        "imported: use the .safetensors that the file was exported from"
    )


def test_bins_of_another_spacing(state: dict[str, Tensor]) -> None:
    assert fault(state | {"bbox_head.integral.project": torch.linspace(0, 8, 17)}) == (
        "gfl.pth: bbox_head.integral.project is not 0, 1, .. 16: bins that are unevenly spaced cannot be imported"
    )


def test_weights_that_are_not_finite(state: dict[str, Tensor]) -> None:
    changed = state | {"bbox_head.gfl_cls.bias": torch.full((80,), float("nan"))}
    assert fault(changed) == (
        f"gfl.pth: NaN or infinite weights in 1 of {len(state)} entries, first in bbox_head.gfl_cls.bias: "
        "training had diverged; use an earlier file"
    )


@pytest.mark.parametrize("prefix", ["student.", "architecture."])
def test_wrapped_detectors(state: dict[str, Tensor], prefix: str) -> None:
    assert fault({prefix + name: value for name, value in state.items()}) == (
        f"gfl.pth: names start with '{prefix}', the detector is inside another module: strip it: "
        "python -c \"import torch; s = torch.load('gfl.pth', map_location='cpu')['state_dict']; "
        f"s = {{k[{len(prefix)}:]: v for k, v in s.items() if k.startswith('{prefix}')}}; "
        "torch.save({'state_dict': s}, 'stripped.pth')\", and import stripped.pth"
    )


def test_other_detectors(shared: Path, state: dict[str, Tensor]) -> None:
    assert fault({"backbone.conv1.weight": torch.zeros(1), "rpn_head.rpn_conv.weight": torch.zeros(1)}) == (
        "gfl.pth: no bbox_head.gfl_cls.weight: not a detector of mmdet with a head of GFL, GFLv2, ATSS, FCOS or "
        "RetinaNet: import one"
    )
    second = {name: torch.zeros(shape) for name, shape in shapes(shared, 50, "gfl_dcnv2").items()}
    second["bbox_head.integral.project"] = torch.arange(17.0)
    lines = fault(second).splitlines()
    assert lines[0] == "gfl.pth: 26 entries do not fit a GFL detector with ResNet-50: nothing imported"
    assert lines[1] == "shape: backbone.layer2.0.conv2.conv_offset.weight is [27, 128, 3, 3], GFL's is [18, 128, 3, 3]"
    assert fault(state | {"backbone.layer3.35.conv1.weight": torch.zeros(1)}) == (
        "gfl.pth: no ResNet of 18, 34, 50 or 101 layers (36 blocks in backbone.layer3): "
        "import a GFL detector with such a backbone"
    )
    assert fault(state | {"bbox_head.gfl_reg.weight": torch.zeros(70, 256, 3, 3)}) == (
        "gfl.pth: bbox_head.gfl_cls.weight [80, 256, 3, 3] and bbox_head.gfl_reg.weight [70, 256, 3, 3] are "
        "no output layers of GFL: import a GFL detector"
    )


class Runs:
    """Leaves a mark if it is unpickled in earnest."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(Path("unpickled").absolute()),)


def read_fault(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_mmdet(path)
    return str(error.value)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "gfl.pth"
    torch.save({"state_dict": {}, "meta": Runs()}, path)
    message = read_fault(path)
    assert not Path("unpickled").exists()
    assert "which could run code and is not read" in message
    torch.save({"state_dict": {}, "meta": Path("config.py")}, path)
    kind = f"{type(Path()).__module__}.{type(Path()).__qualname__}"
    assert read_fault(path) == (
        f"{path}: holds {kind}, which could run code and is not read: if you trust the file, strip it where it was "
        "trained: python -c \"import torch; s = torch.load('gfl.pth', map_location='cpu', weights_only=False); "
        "torch.save({'state_dict': s['state_dict']}, 'stripped.pth')\", and import stripped.pth"
    )


def test_getattr_of_a_file_is_inert(tmp_path: Path) -> None:
    """The stand-in for `getattr` must not become a way to reach anything."""

    class Reaches:
        def __reduce__(self) -> tuple[object, tuple[object, str]]:
            return getattr, (torch.nn.Parameter, "__init__")

    path = tmp_path / "gfl.pth"
    torch.save({"weight": Reaches()}, path)
    assert read_fault(path) == f"{path}: no tensors, neither flat nor under state_dict: pass the .pth of a GFL detector"


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {"state_dict": {}}, {"epoch": 3}])
def test_files_without_weights(tmp_path: Path, content: object) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    assert read_fault(path) == f"{path}: no tensors, neither flat nor under state_dict: pass the .pth of a GFL detector"


def test_files_that_cannot_be_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "gfl.pth"
    assert read_fault(path) == f"{path}: no such file: pass the .pth of a GFL detector of mmdet"
    torch.save({"state_dict": state}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert read_fault(path) == f"{path}: truncated or damaged (RuntimeError): download it again"
    for content in (b"", b"hello", b"<html>not found</html>"):
        path.write_bytes(content)
        assert read_fault(path).startswith(f"{path}: ")
        assert "\n" not in read_fault(path)
