"""The detector's forward pass, parameters, modes and starting weights."""

import json
from pathlib import Path
from urllib.error import URLError

import oracle
import pytest
import torch
from conftest import Deviations
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet

from ldctl.errors import CheckpointError, MissingError
from ldctl.mmdet import from_mmdet
from ldctl.models import Detector, HeadSpec, ModelSpec, ResNetSpec, initialize, load_backbone_weights
from ldctl.models import resnet as own_resnet

NARROW = ModelSpec(backbone=ResNetSpec(depth=18, width=0.125, init="none"), channels=32)


def build(depth: int, num_classes: int = 80, *, dcn: bool = False) -> Detector:
    return Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init="none", dcn=dcn)), num_classes)


def reference(shared: Path, depth: int, num_classes: int, salt: str, *, dcn: bool) -> Detector:
    """Return a detector with the weights of the reference's forward pass."""
    kinds = json.loads((shared / f"oracle/mmdet_keys_r{depth}.json").read_text())
    shapes = kinds["gfl_dcn" if dcn else "gfl"]
    for part in ("weight", "bias"):
        shapes[f"bbox_head.gfl_cls.{part}"][0] = num_classes
    state = oracle.weights(shapes, depth, salt)
    detector = build(depth, num_classes, dcn=dcn)
    detector.load_state_dict(from_mmdet(state, Path("reference.pth")))
    return detector.eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "depth", "num_classes"),
    [("r18", 18, 80), ("r50", 50, 80), ("r101", 101, 80), ("r18_20c", 18, 20), ("r50_dcn", 50, 80)],
)
def test_forward_is_the_reference(shared: Path, name: str, depth: int, num_classes: int) -> None:
    arrays, notes = oracle.read(shared / f"oracle/gfl_forward_{name}.safetensors")
    images = oracle.normal(tuple(arrays["images"].shape), f"input.images/{name}", notes["salt"])
    assert torch.equal(images, arrays["images"])
    detector = reference(shared, depth, num_classes, notes["salt"], dcn=name.endswith("dcn"))
    stages: dict[str, Tensor] = {}
    for level in range(2, 6):
        layer = getattr(detector.backbone, f"layer{level - 1}")
        layer.register_forward_hook(lambda _m, _i, out, key=f"c{level}": stages.__setitem__(key, out))
    with torch.no_grad():
        dense = detector(images)
    stages |= {f"p{level}": feature for level, feature in enumerate(dense.features, start=3)}
    for key, value in stages.items():
        assert relative(value.mean(dim=(0, 2, 3)), arrays[f"{key}_channel_mean"]) < 1e-4
        assert relative(value.abs().mean(), arrays[f"{key}_absmean"]) < 1e-4
    cls = torch.cat([level.flatten(2).mT for level in oracle.levels(arrays, "cls_score")], dim=1)
    edge = torch.cat([level.flatten(2).mT for level in oracle.levels(arrays, "bbox_pred")], dim=1)
    assert relative(dense.cls, cls) < 1e-4
    assert relative(dense.edge, edge.unflatten(-1, (4, 17))) < 1e-4


def test_gflv2_head_is_the_reference(shared: Path, deviations: Deviations) -> None:
    path = shared / "oracle/gflv2_head_forward_20c.safetensors"
    arrays, notes = oracle.read(path)
    shapes = json.loads((shared / "oracle/mmdet_keys_r18.json").read_text())["gfl"]
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("bbox_head.")}
    shapes |= json.loads((shared / "oracle/fork_keys_gflv2_head.json").read_text())
    for part in ("weight", "bias"):
        shapes[f"bbox_head.gfl_cls.{part}"][0] = (
            20 + 1
        )  # the reference's last channel is the background: nothing reads it
    detector = Detector(ModelSpec(backbone=ResNetSpec(depth=18, init="none"), head=HeadSpec(kind="gflv2")), 20)
    detector.load_state_dict(from_mmdet(oracle.weights(shapes, 18, notes["salt"]), Path("reference.pth")))
    assert sum(p.numel() for p in detector.head.quality.parameters()) == 1409
    with torch.no_grad():
        dense = detector.head(tuple(oracle.levels(arrays, "feat")))
    cls, score = (
        torch.cat([level.flatten(2).mT for level in oracle.levels(arrays, key)], dim=1)[..., :20]
        for key in ("cls_feat", "cls_prob")
    )
    edge = torch.cat([level.flatten(2).mT for level in oracle.levels(arrays, "bbox_pred")], dim=1)
    pairs = {"cls": (dense.cls, cls), "edge": (dense.edge.flatten(2), edge), "score": (dense.score, score)}
    for name, (found, expected) in pairs.items():
        deviations.record(f"GFLv2 head: {name}, relative", path.name, relative(found, expected))
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize(("depth", "pyramid"), [(18, 3_180_544), (34, 3_180_544), (50, 3_868_672), (101, 3_868_672)])
def test_number_of_parameters(depth: int, pyramid: int) -> None:
    with torch.device("meta"):
        detector = build(depth)
        torchvision_backbone = getattr(resnet, f"resnet{depth}")()
        head_20 = build(depth, 20).head
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in detector.named_children()}
    fc = sum(p.numel() for p in torchvision_backbone.fc.parameters())
    assert count["fpn"] == pyramid
    assert count["head"] == 5_063_833
    assert sum(p.numel() for p in head_20.parameters()) == 4_925_533
    assert count["backbone"] == sum(p.numel() for p in torchvision_backbone.parameters()) - fc


@pytest.mark.parametrize(("depth", "entries"), [(18, 120), (34, 216), (50, 318), (101, 624)])
def test_backbone_has_torchvisions_names_and_shapes(depth: int, entries: int) -> None:
    with torch.device("meta"):
        own = build(depth).backbone.state_dict()
        theirs = getattr(resnet, f"resnet{depth}")().state_dict()
    assert len(own) == entries
    assert {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in theirs.items() if not name.startswith("fc.")
    }


def test_a_deformable_backbone_starts_as_the_plain_one() -> None:
    plain, deformable = (
        own_resnet.ResNet(ResNetSpec(depth=50, width=0.125, init="none", dcn=dcn)).eval() for dcn in (False, True)
    )
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # the last of a block starts at 0, which would hide the convolutions
            nn.init.ones_(module.weight)
    load_backbone_weights(deformable, plain.state_dict(), source="plain.pth")
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in zip(plain(images), deformable(images), strict=True):
            assert relative(other, one) < 1e-5
    offsets = deformable.layer3[0].conv2.conv_offset
    loss = torch.stack([each.square().mean() for each in deformable(images)]).sum()
    loss.backward()
    assert offsets.weight.grad.any()


def test_deformable_convolutions_want_bottlenecks() -> None:
    with pytest.raises(ValidationError, match="depth 18 has no bottlenecks for deformable convolutions: use 50 or 101"):
        ResNetSpec(depth=18, dcn=True)


def test_a_narrow_backbone_keeps_the_names() -> None:
    with torch.device("meta"):
        assert set(Detector(NARROW, 3).backbone.state_dict()) == set(build(18).backbone.state_dict())
        assert Detector(NARROW, 3).backbone.out_channels == (16, 32, 64)


def test_head_starts_as_in_the_paper() -> None:
    head = Detector(NARROW.model_copy(update={"channels": 64}), 3).head
    assert torch.allclose(head.cls.bias, torch.tensor(-4.59511985))
    assert not head.edge.bias.any()
    assert all(scale.item() == 1.0 and scale.ndim == 0 for scale in head.scales)
    assert abs(head.edge.weight.std().item() - 0.01) < 5e-4
    assert {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)} == {32}


@pytest.mark.parametrize("size_hw", [(64, 96), (97, 131), (1, 1)])
def test_every_size_works(size_hw: tuple[int, int]) -> None:
    dense = Detector(NARROW, 3).eval()(torch.zeros(2, 3, *size_hw))
    num = sum(-(-size_hw[0] // stride) * -(-size_hw[1] // stride) for stride in (8, 16, 32, 64, 128))
    assert dense.cls.shape == (2, num, 3)
    assert dense.edge.shape == (2, num, 4, 17)
    assert dense.locations.xy.shape == (num, 2)
    assert sum(dense.locations.level_sizes) == num


def test_an_image_does_not_depend_on_its_batch() -> None:
    detector = Detector(NARROW, 3).eval()
    images = torch.randn(3, 3, 64, 64)
    together, alone = detector(images), detector(images[1:2])
    assert torch.allclose(together.cls[1:2], alone.cls, atol=1e-5)
    assert torch.allclose(together.edge[1:2], alone.edge, atol=1e-5)


def test_edges_are_float32_under_autocast() -> None:
    detector = Detector(NARROW, 3).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = detector(torch.randn(1, 3, 64, 64))
    assert dense.cls.dtype == torch.bfloat16
    assert dense.edge.dtype == torch.float32


def test_normalize_is_the_mean_colour_beyond_the_image() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    size_hw = torch.tensor([[32, 64], [20, 33]])
    normal = Detector(NARROW, 3).normalize(images, size_hw)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.equal(normal[0], expected[0])
    assert torch.equal(normal[1, :, :20, :33], expected[1, :, :20, :33])
    assert not normal[1, :, 20:].any()
    assert not normal[1, :, :, 33:].any()


def test_input_statistics_are_not_in_the_weights() -> None:
    assert {name.split(".")[0] for name in Detector(NARROW, 3).state_dict()} == {"backbone", "fpn", "head"}


@pytest.mark.parametrize(
    ("norm", "frozen_stages", "moves"),
    [("frozen", 1, set()), ("frozen", 0, set()), ("trainable", 0, {"bn1", "layer1", "layer2", "layer3", "layer4"}),
     ("trainable", 2, {"layer3", "layer4"})],
)  # fmt: skip
def test_which_statistics_move(norm: str, frozen_stages: int, moves: set[str]) -> None:
    spec = ResNetSpec.model_validate(
        {"depth": 18, "width": 0.125, "init": "none", "norm": norm, "frozen_stages": frozen_stages}
    )
    detector = Detector(NARROW.model_copy(update={"backbone": spec}), 3)
    detector.eval()
    detector.train()
    before = {name: value.clone() for name, value in detector.backbone.named_buffers()}
    detector(torch.randn(2, 3, 64, 64))
    moved = {name for name, value in detector.backbone.named_buffers() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == moves


def test_frozen_stages_get_no_gradient_and_frozen_norms_do() -> None:
    spec = ResNetSpec(depth=18, width=0.125, init="none", norm="frozen", frozen_stages=1)
    detector = Detector(NARROW.model_copy(update={"backbone": spec}), 3).train()
    frozen = {name for name, p in detector.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"conv1", "bn1", "layer1"}
    dense = detector(torch.randn(1, 3, 64, 64))
    (dense.cls.sum() + dense.edge.square().sum()).backward()
    parameters = dict(detector.named_parameters())
    assert parameters["backbone.layer2.0.bn1.weight"].grad is not None
    assert all(parameters[name].grad is None for name in frozen)


def test_frozen_parameters_are_the_references(shared: Path) -> None:
    expected = json.loads((shared / "oracle/mmdet_keys_r50.json").read_text())["requires_grad_false"]
    with torch.device("meta"):
        detector = Detector(ModelSpec(), 80)
    assert {name for name, p in detector.named_parameters() if not p.requires_grad} == set(expected)


def test_norm_follows_init() -> None:
    assert (ResNetSpec().norm, ResNetSpec().frozen_stages) == ("frozen", 1)
    random = ResNetSpec(init="none")
    assert (random.norm, random.frozen_stages) == ("trainable", 0)
    mixed = ResNetSpec.model_validate_json('{"init": "none", "norm": "frozen", "frozen_stages": null}')
    assert (mixed.norm, mixed.frozen_stages) == ("frozen", 0)
    assert ResNetSpec.model_validate_json(mixed.model_dump_json()) == mixed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0.5}, 'no ImageNet weights for width 0.5: use width 1, init "none" or a path'),
        ({"width": 0.3, "init": "none"}, "width 0.3 gives 19.2 stem channels: use a multiple of 1/64"),
    ],
)
def test_refused_widths(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as fault:
        ResNetSpec.model_validate(fields)
    assert [error["msg"] for error in fault.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize(
    "fields", [{"depth": 152}, {"frozen_stages": 5}, {"norm": "group"}, {"width": 0.0}, {"depht": 18}, {"init": ""}]
)
def test_refused_backbones(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ResNetSpec.model_validate(fields)


@pytest.mark.parametrize("channels", [0, 16, 48])
def test_channels_are_a_multiple_of_the_norms_groups(channels: int) -> None:
    with pytest.raises(ValidationError):
        ModelSpec(channels=channels)


def test_reg_max_and_num_convs() -> None:
    spec = NARROW.model_copy(update={"head": HeadSpec(reg_max=8, num_convs=2)})
    detector = Detector(spec, 3).eval()
    assert detector(torch.zeros(1, 3, 64, 64)).edge.shape[-1] == 9
    assert len(detector.head.cls_tower) == 2


def detector_of(init: str, depth: int = 18) -> Detector:
    return Detector(ModelSpec(backbone=ResNetSpec(depth=depth, init=init), channels=32), 3)


def test_imagenet_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet.resnet18().state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: old)
    detector = detector_of("imagenet")
    initialize(detector)
    own = detector.backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_v1_weights_are_used() -> None:
    names = [weights.url.rsplit("/", 1)[-1] for weights in own_resnet.IMAGENET.values()]
    assert names == [
        "resnet18-f37072fd.pth",
        "resnet34-b627a593.pth",
        "resnet50-0676ba61.pth",
        "resnet101-63fe2227.pth",
    ]


def test_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingError) as fault:
        initialize(detector_of("imagenet"))
    assert str(fault.value) == (
        "cannot get the ImageNet weights https://download.pytorch.org/models/resnet18-f37072fd.pth "
        f"(<urlopen error no route to host>): put resnet18-f37072fd.pth at {tmp_path}/checkpoints"
        "/resnet18-f37072fd.pth, or pass --init PATH, or --init none to start from random weights"
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_init_from_a_file(tmp_path: Path, suffix: str, prefix: str) -> None:
    state = {prefix + name: value for name, value in resnet.resnet18().state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    extra = {"head.cls.bias": torch.zeros(3)} if prefix else {}
    save_file(state | extra, path) if suffix == ".safetensors" else torch.save(state | extra, path)
    detector = detector_of(str(path))
    initialize(detector)
    own = detector.backbone.state_dict()
    assert all(torch.equal(own[name], state[prefix + name]) for name in own)


def test_init_from_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = resnet.resnet18().state_dict()
    state["conv1.weight"] = torch.zeros(8, 3, 7, 7)
    state["odd"] = state.pop("bn1.weight")
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as fault:
        initialize(detector_of(str(path)))
    assert str(fault.value) == (
        f"{path}: 3 entries do not fit a ResNet-18 of width 1; change the backbone or init\n"
        "missing: bn1.weight [64]\n"
        "unexpected: odd [64]\n"
        "shape: conv1.weight is [8, 3, 7, 7], the backbone's is [64, 3, 7, 7]"
    )


ADVICE = "pass --init the network's weights (.pth, .safetensors) or an ldctl checkpoint"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, f"no such file: {ADVICE}, or --init none"),
        ("text.pth", b"hello", f"not a readable weights file (KeyError): {ADVICE}"),
        ("text.safetensors", b"hello", f"not a readable weights file (SafetensorError): {ADVICE}"),
        ("list.pth", [1, 2], f"not a flat dictionary of tensors: {ADVICE}"),
        ("code.pth", {"weight": Path("code")}, f"not a readable weights file (UnpicklingError): {ADVICE}"),
    ],
)
def test_init_from_something_else(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as fault:
        initialize(detector_of(str(path)))
    assert str(fault.value) == f"{path}: {message}"


def test_construction_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_resnet, "download", lambda _: pytest.fail("downloaded"))
    detector_of("imagenet")
