"""Backbones of torchvision and timm: their maps, weights, input statistics, and what is refused."""

import json
from pathlib import Path
from urllib.error import URLError

import onnxruntime
import pytest
import test_export
import torch
import torchvision
from pydantic import ValidationError
from safetensors.torch import save_file
from scenes import random_targets
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from ldctl import engine
from ldctl import spec as specs
from ldctl.assemble import hire, load_detector
from ldctl.checkpoint import CheckpointMeta, save
from ldctl.distill import LD
from ldctl.distillation import DistillationSpec
from ldctl.errors import CheckpointError, ExportError, MissingError, SpecError
from ldctl.export import OnnxExporter, Parity
from ldctl.losses import LossSpec
from ldctl.models import Detector, ModelSpec, ResNetSpec, TimmSpec, TorchvisionSpec, build_backbone, initialize
from ldctl.models import timm_net as own_timm
from ldctl.models.torchvision_net import layout_of
from ldctl.spec import DistillSpec, TeacherSpec
from ldctl.step import Learner, training_losses
from ldctl.types import Batch

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# one small network of each family, and the channels of its maps
FAMILIES = {
    "convnext_tiny": (192, 384, 768),
    "densenet121": (512, 1024, 1024),
    "efficientnet_b0": (40, 112, 1280),
    "mnasnet0_5": (24, 48, 1280),
    "mobilenet_v2": (32, 96, 1280),
    "mobilenet_v3_small": (24, 48, 576),
    "regnet_y_400mf": (104, 208, 440),
    "resnext50_32x4d": (512, 1024, 2048),
    "shufflenet_v2_x0_5": (48, 96, 1024),
    "swin_t": (192, 384, 768),
    "vgg11_bn": (512, 512, 512),
    "wide_resnet50_2": (512, 1024, 2048),
}


def vision(name: str, **values: object) -> TorchvisionSpec:
    return TorchvisionSpec.model_validate({"name": name, "init": "none", **values})


def model(backbone: object) -> ModelSpec:
    return ModelSpec.model_validate({"backbone": backbone, "head": {"num_convs": 1}, "channels": 32})


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_every_family(name: str) -> None:
    """Torchvision's own extractor, another way to the same maps, gives the same numbers."""
    backbone = build_backbone(vision(name)).eval()
    theirs = torchvision.models.get_model(name, weights=None).eval()
    own = backbone.state_dict()
    for key, value in theirs.state_dict().items():
        value.copy_(own.get(key, value))
    images = torch.randn(1, 3, 256, 288)
    with torch.no_grad():
        maps = backbone(images)
        expected = create_feature_extractor(theirs, {path: path for path in layout_of(name).maps})(images)
    assert backbone.out_channels == FAMILIES[name]
    for ours, stride, other in zip(maps, (8, 16, 32), expected.values(), strict=True):
        assert ours.shape == (1, backbone.out_channels[(8, 16, 32).index(stride)], 256 // stride, 288 // stride)
        assert torch.allclose(ours, other if other.shape == ours.shape else other.permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_torchvisions(name: str) -> None:
    backbone = build_backbone(vision(name))
    own = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    assert own == {key: entry.shape for key, entry in backbone.published.items() if entry.name is not None}
    dropped = {key.split(".")[0] for key, entry in backbone.published.items() if entry.name is None}
    assert len(dropped) == 1, "the classifier"
    assert not dropped & {key.split(".")[0] for key in own}


def test_a_resnet_of_torchvision_is_ours() -> None:
    """The chain and our own ResNet are the same function of the same weights."""
    ours = build_backbone(ResNetSpec(depth=18, init="none")).eval()
    theirs = build_backbone(vision("resnet18")).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(ours(images), theirs(images), strict=True))


@pytest.mark.parametrize(("stages", "frozen"), [(0, 0), (1, 2), (2, 4), (3, 9), (4, 13)])
def test_frozen_stages_and_norms(stages: int, frozen: int) -> None:
    backbone = build_backbone(vision("mobilenet_v3_small", frozen_stages=stages)).train()
    still = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert still == {str(index) for index in range(frozen)}
    norms = {name.split(".")[1]: m.training for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {index: index not in still for index in norms}
    all_frozen = build_backbone(vision("mobilenet_v3_small", norm="frozen")).train()
    assert not any(m.training for m in all_frozen.modules() if isinstance(m, nn.BatchNorm2d))


def test_training_does_not_depend_on_chance() -> None:
    backbone = build_backbone(vision("convnext_tiny")).train()
    images = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images), backbone(images), strict=True))


def test_finding_the_maps_leaves_the_random_numbers_alone() -> None:
    layout_of.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    layout_of("regnet_y_400mf")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenet_v3_smal", "no classification network 'mobilenet_v3_smal': did you mean 'mobilenet_v3_small'?"),
        ("r7", "no classification network 'r7': see torchvision's list_models()"),
        ("fasterrcnn_resnet50_fpn", None),
        ("squeezenet1_0", "'squeezenet1_0' has no maps of strides 8, 16 and 32: take another network"),
        ("alexnet", "'alexnet' has no maps of strides 8, 16 and 32: take another network"),
        ("vit_b_16", "'vit_b_16' takes images of one size only: take another network"),
        ("maxvit_t", "'maxvit_t' takes images of one size only: take another network"),
        ("inception_v3", "'inception_v3' normalizes its input once more by itself: take another network"),
    ],
)
def test_refused_networks(name: str, message: str | None) -> None:
    flags = {"model.backbone": {"kind": "torchvision", "name": name}}
    with pytest.raises(SpecError) as fault:
        specs.load(TeacherSpec, None, flags, [])
    said = str(fault.value)
    assert said.startswith("command line: model.backbone.name: torchvision")
    assert "\n" not in said
    if message:
        possessive = "" if message.startswith("no ") else "'s"
        verb = "has " if message.startswith("no ") else ""
        assert said == f"command line: model.backbone.name: torchvision{possessive} {verb}{message}"


def test_the_kind_is_resnet_unless_said() -> None:
    old = json.dumps({"backbone": {"depth": 18, "init": "none"}})
    assert ModelSpec.model_validate_json(old).backbone == ResNetSpec(depth=18, init="none")
    found = specs.load(TeacherSpec, None, {}, ["model.backbone.depth=34"])
    assert found.model.backbone == ResNetSpec(depth=34)
    for fault, message in (
        ("model.backbone.dept=34", "model.backbone.dept: unknown key; did you mean 'depth'?"),
        ("model.backbone.kind=vgg", "model.backbone.kind: expected 'resnet', 'torchvision' or 'timm', given \"vgg\""),
        ("model.backbone.depth=19", "model.backbone.depth: expected 18, 34, 50 or 101, given 19"),
    ):
        with pytest.raises(SpecError) as error:
            specs.load(TeacherSpec, None, {}, [fault])
        assert str(error.value) == f"--set {fault}: {message}"


def test_statistics_are_the_weights_own_and_recorded() -> None:
    assert (vision("resnet50").mean, vision("resnet50").std) == IMAGENET
    assert (vision("efficientnet_v2_l").mean, vision("efficientnet_v2_l").std) == ((127.5,) * 3, (127.5,) * 3)
    given = ModelSpec.model_validate_json(
        json.dumps({"backbone": {"kind": "torchvision", "name": "resnet18", "mean": [1, 2, 3.5], "std": [4, 5, 6]}})
    )
    assert isinstance(given.backbone, TorchvisionSpec)
    assert (given.backbone.mean, given.backbone.std) == ((1.0, 2.0, 3.5), (4.0, 5.0, 6.0))
    assert ModelSpec.model_validate_json(given.model_dump_json()) == given


def batch_of(size: int) -> Batch:
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    hw = torch.tensor([[size, size]] * 2)
    return Batch(images, hw, hw, (0, 1), random_targets(2, size, 3, seed=1))


def stored(path: Path, backbone: object) -> Detector:
    """Write a checkpoint of a detector with random weights."""
    detector = Detector(model(backbone), 3)
    meta = CheckpointMeta(
        model=detector.spec.model_dump(mode="json"), classes=("a", "b", "c"), short_side=64, long_side=64
    )
    save(path, detector.state_dict(), meta)
    return detector


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t"])
def test_checkpoint_there_and_back_and_a_step(tmp_path: Path, name: str) -> None:
    """The student learns from a teacher that expects other colours; each sees its own."""
    own = {"kind": "torchvision", "name": name, "init": "none", "mean": [120.0, 110.0, 100.0]}
    detector = stored(tmp_path / "student.safetensors", own)
    loaded, _ = load_detector(tmp_path / "student.safetensors")
    assert loaded.spec == detector.spec
    assert torch.equal(loaded.mean.flatten(), torch.tensor([120.0, 110.0, 100.0]))
    pairs = zip(loaded.state_dict().values(), detector.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    stored(tmp_path / "teacher.safetensors", {"depth": 18, "width": 0.125, "init": "none"})
    teaching = hire(tmp_path / "teacher.safetensors", DistillationSpec(terms=(LD(),)), torch.device("cpu"))
    seen: dict[str, Tensor] = {}
    for who, network in (("student", detector), ("teacher", teaching.teacher)):
        network.register_forward_pre_hook(lambda _m, given, who=who: seen.__setitem__(who, given[0]))
    batch = batch_of(64)
    losses = training_losses(Learner(detector.train(), teaching), detector, teaching, batch, LossSpec())
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
    for who, mean in (("student", (120.0, 110.0, 100.0)), ("teacher", IMAGENET[0])):
        expected = (batch.images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
        assert torch.equal(seen[who], expected)


def started(init: Path | str, name: str = "mobilenet_v3_small") -> tuple[Detector, str]:
    detector = Detector(model({"kind": "torchvision", "name": name, "init": str(init)}), 3)
    return detector, initialize(detector)


@pytest.mark.parametrize("has_other_names", [False, True])
def test_init_from_a_file_by_name_or_order(tmp_path: Path, has_other_names: bool) -> None:
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    named = {f"x{i:03}.{k.rpartition('.')[2]}" if has_other_names else k: v for i, (k, v) in enumerate(state.items())}
    path = tmp_path / "weights.pth"
    torch.save(named, path)
    detector, note = started(path)
    assert note == has_other_names * (
        f"{path}: other names than those of torchvision's mobilenet_v3_small, but all shapes and last parts of names "
        "agree in order: matched by order"
    )
    own = detector.backbone.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_another_order_is_not_guessed(tmp_path: Path) -> None:
    """Weight and bias of a norm have one shape; changing places must not go unnoticed."""
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    keys = [f"x{index}.{key.rpartition('.')[2]}" for index, key in enumerate(state)]
    keys[1], keys[2] = keys[2], keys[1]
    path = tmp_path / "weights.pth"
    torch.save(dict(zip(keys, state.values(), strict=True)), path)
    with pytest.raises(CheckpointError, match="do not fit torchvision's mobilenet_v3_small; change") as fault:
        started(path)
    assert "\nmissing: features.0.0.weight [16, 3, 3, 3]\n" in str(fault.value)


def test_init_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    other = stored(path, {"kind": "torchvision", "name": "mobilenet_v3_small", "init": "none"})
    detector, note = started(path)
    assert note == ""
    theirs = other.backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in detector.backbone.state_dict().items())
    save_file({"backbone.odd": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="207 entries do not fit torchvision's mobilenet_v3_small"):
        started(path)


def test_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingError) as fault:
        started("imagenet")
    url = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.url
    name = url.rpartition("/")[2]
    assert str(fault.value) == (
        f"cannot get the ImageNet weights {url} (<urlopen error no route to host>): put {name} at "
        f"{tmp_path}/checkpoints/{name}, or pass --init PATH, or --init none to start from random weights"
    )


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    own_timm.names.cache_clear()
    with pytest.raises(MissingError) as fault:
        specs.load(DistillSpec, None, {"student.backbone": {"kind": "timm", "name": "resnet18"}}, [])
    assert str(fault.value) == "timm is not installed: pip install ldctl[timm]"
    assert fault.value.exit_code == 9


def timm_spec(name: str, **values: object) -> TimmSpec:
    pytest.importorskip("timm")
    return TimmSpec.model_validate({"name": name, "init": "none", **values})


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("tf_efficientnet_lite0", (40, 112, 320)),
        ("convnext_atto", (80, 160, 320)),
        ("vgg11", (512, 512, 512)),
        ("mambaout_femto", (96, 192, 288)),
    ],
)
def test_maps_of_timm(name: str, channels: tuple[int, ...]) -> None:
    backbone = build_backbone(timm_spec(name)).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(value.shape) for value in maps] == [
        (1, width, 64 // stride, 96 // stride) for width, stride in zip(channels, (8, 16, 32), strict=True)
    ]
    assert backbone.out_channels == channels
    named = {entry.name for entry in backbone.published.values()} - {None}
    assert named == backbone.state_dict().keys()


def test_timm_says_what_its_weights_expect() -> None:
    spec = timm_spec("tf_efficientnet_lite0")
    assert (spec.mean, spec.std) == ((127.5,) * 3, (127.5,) * 3)
    assert (timm_spec("resnet18").mean, timm_spec("resnet18").std) == IMAGENET
    detector = Detector(model(spec), 3)
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert detector.normalize(images, torch.tensor([[1, 2]])).unique().tolist() == [-1.0, 1.0]


def test_timm_takes_the_networks_own_file(tmp_path: Path) -> None:
    """Timm names some modules otherwise where it takes a network apart."""
    timm = pytest.importorskip("timm")
    network = timm.create_model("convnext_atto")
    torch.save(network.state_dict(), tmp_path / "own.pth")
    detector = Detector(model(timm_spec("convnext_atto", init=str(tmp_path / "own.pth"))), 3).eval()
    assert initialize(detector) == ""
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval().forward_intermediates(images, intermediates_only=True)[-3:]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(detector.backbone(images), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "timm has no classification network 'resnet81': did you mean 'resnet18'?"),
        (
            "vit_tiny_patch16_224",
            "timm's 'vit_tiny_patch16_224' has no maps of strides 8, 16 and 32 of images of any size: "
            "take another network",
        ),
    ],
)
def test_refused_networks_of_timm(name: str, message: str) -> None:
    with pytest.raises(ValidationError) as fault:
        timm_spec(name)
    assert [error["msg"] for error in fault.value.errors()] == [f"Value error, {message}"]


def test_timm_cannot_download(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = timm_spec("resnet18", init="imagenet")
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def refuse(name: str, *, pretrained: bool = False, **values: object) -> nn.Module:
        if pretrained:
            raise OSError("no route\nto host")
        built: nn.Module = create(name, **values)
        return built

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(MissingError) as fault:
        initialize(Detector(model(spec), 3))
    assert str(fault.value) == (
        "cannot get the ImageNet weights of timm's resnet18 (no route to host): pass --init PATH, or --init none to "
        "start from random weights"
    )


def export(backbone: object, path: Path) -> Parity:
    """Write a detector that finds something to ONNX, and check it on a small image and a long one."""
    torch.manual_seed(0)
    detector = Detector(model(backbone), 3)
    with torch.no_grad():
        for layer in (*detector.head.cls_tower, *detector.head.edge_tower):
            layer.conv.weight.normal_(0, 0.1)
        detector.head.cls.weight.normal_(0, 0.3)
        detector.head.edge.weight.normal_(0, 0.2)
        detector.head.edge.bias.normal_(0, 0.1)
    images = [test_export.photo(100, 120), test_export.photo(300, 60, seed=1)]
    detector.train()
    detector(detector.normalize(torch.stack([images[0]] * 2), torch.tensor([[100, 120]] * 2)))  # statistics of norms
    detector.eval()
    return OnnxExporter()(
        detector,
        path,
        classes=test_export.CLASSES,
        short_side=test_export.SHORT,
        long_side=test_export.LONG,
        postprocess=test_export.POST,
        images=images,
        expected=[test_export.eager(detector, image) for image in images],
    )


EXPORTED = {"kind": "torchvision", "init": "none", "mean": (127.0, 127.0, 127.0), "std": (128.0, 128.0, 128.0)}


def test_exported_is_eager(tmp_path: Path) -> None:
    parity = export({**EXPORTED, "name": "mobilenet_v3_small"}, tmp_path / "file.onnx")
    assert parity.num_detections > 10
    assert parity.num_unmatched == 0
    assert parity.max_score_difference < 1e-4


def test_swin_is_not_exported(tmp_path: Path) -> None:
    path = tmp_path / "swin.safetensors"
    stored(path, {"kind": "torchvision", "name": "swin_t", "init": "none"})
    with pytest.raises(ExportError) as fault:
        engine.export(engine.export_spec(path, {}, []), None)
    assert str(fault.value) == (
        f"{path}: torchvision's swin_t cannot be exported to ONNX (its windows are shifted at some image sizes only, "
        "which one graph cannot do): distil a student with a convolutional backbone from it, and export that"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["swin.safetensors"]


def test_a_runtime_without_an_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As older ones, which cannot run deformable convolutions."""

    def refuse(*_: object, **__: object) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented("no DeformConv(19)\nat all")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ExportError) as fault:
        export({"depth": 18, "width": 0.125, "init": "none"}, tmp_path / "file.onnx")
    assert str(fault.value) == (
        f"{tmp_path}/file.onnx: not written, for onnxruntime {onnxruntime.__version__} cannot run it "
        "(no DeformConv(19) at all): update onnxruntime"
    )
    assert not list(tmp_path.iterdir())
