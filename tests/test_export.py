"""Tests of the exporters: the file gives the detector's boxes, and a file that does not is noticed and not kept."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import runs
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn.functional import interpolate, pad

import ldctl
from ldctl.errors import ExportError, OutputError
from ldctl.export import OnnxExporter, Parity, Tolerance, check_parity, compare
from ldctl.export import onnx as onnx_export
from ldctl.models import Detector, HeadSpec, ModelSpec, PostprocessSpec, ResNetSpec, detect
from ldctl.types import Detections

CLASSES = ("cat", "dog", "übergröße")
SHORT, LONG = 128, 213
POST = PostprocessSpec()
TOLERANCE = Tolerance()


def make_detector(kind: str = "gfl") -> Detector:
    """A small detector with random weights that finds a few dozen objects with scores all over (0, 1)."""
    torch.manual_seed(0)
    head = HeadSpec.model_validate({"kind": kind, "num_convs": 1})
    spec = ModelSpec(backbone=ResNetSpec(depth=18, width=0.25, init="none"), head=head, channels=64)
    detector = Detector(spec, len(CLASSES))
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.0)
        for layer in (*detector.head.cls_tower, *detector.head.edge_tower):
            layer.conv.weight.normal_(0, 0.1)
        detector.head.cls.weight.normal_(0, 0.3)
        detector.head.cls.bias.fill_(-6.0)
        detector.head.edge.weight.normal_(0, 0.2)
        detector.head.edge.bias.normal_(0, 0.1)  # equal constants would become one in the file
        for level, scale in enumerate(detector.head.scales):
            scale.fill_(0.8 + 0.1 * level)
        for parameter in () if detector.head.quality is None else detector.head.quality.parameters():
            parameter.normal_(0, 0.5)
    return detector


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random colours, coarse and fine."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for grain, weight in ((64, 0.5), (16, 0.3), (4, 0.2)):
        noise = torch.rand(1, 3, height // grain + 2, width // grain + 2, generator=generator)
        layers.append(weight * interpolate(noise, size=(height, width), mode="bilinear"))
    return (sum(layers)[0] * 255).round().to(torch.uint8)


def eager(detector: Detector, image: Tensor, post: PostprocessSpec = POST) -> Detections:
    """What the evaluation finds: resize on uint8, pad with zeros, normalize, predict, select."""
    height, width = image.shape[1:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
    small = interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    small = pad(small, (0, -size[1] % 32, 0, -size[0] % 32))
    size_hw = torch.tensor([size])
    with torch.no_grad():
        dense = detector(detector.normalize(small, size_hw))
    return detect(dense, size_hw, torch.tensor([[height, width]]), (0,), post)[0]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return make_detector().eval()


@pytest.fixture(scope="module")
def exported(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parity]:
    """The file, written once by the exporter into a folder that it has to make."""
    path = tmp_path_factory.mktemp("export") / "new" / "folder" / "small.onnx"
    images = [photo(120, 160), photo(300, 200, seed=1)]
    training = copy.deepcopy(detector).train()
    parity = OnnxExporter()(
        training,
        path,
        classes=CLASSES,
        short_side=SHORT,
        long_side=LONG,
        postprocess=POST,
        images=images,
        expected=[eager(detector, image) for image in images],
    )
    assert training.training
    return path, parity


@pytest.fixture(scope="module")
def session(exported: tuple[Path, Parity]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(exported[0])


def altered(path: Path, target: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """Write a copy of the file in which one weight is another."""
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), weight.name))
    onnx.save(model, target)
    return model


def test_exporter_reports_the_parity_it_checked(exported: tuple[Path, Parity]) -> None:
    path, parity = exported
    assert parity.is_within(TOLERANCE)
    assert parity.num_images == 2
    assert parity.num_detections > 20
    assert parity.max_box_difference_px < 0.002
    assert parity.max_score_difference < 2e-5
    assert [file.name for file in path.parent.iterdir()] == ["small.onnx"]


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="no process forked from one that trained can train on a GPU")
def test_a_forked_process_trains_after_an_export(exported: tuple[Path, Parity]) -> None:
    """Which other test files count on, whatever ran before them."""

    def step() -> None:
        torch.ones(2, requires_grad=True).sum().backward()

    step()
    process = runs.start(step)
    process.join(60)
    assert process.exitcode == 0


SIZES = [(128, 160), (97, 101), (100, 77), (300, 200), (200, 300), (33, 300), (640, 64), (480, 640), (8, 8), (1, 500)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_the_detector_at_any_size(
    detector: Detector, exported: tuple[Path, Parity], height: int, width: int
) -> None:
    image = photo(height, width, seed=height)
    parity = check_parity(exported[0], [image], [eager(detector, image)], POST, TOLERANCE)
    assert parity.num_unmatched == 0
    assert parity.num_detections >= 5 or height < 10
    assert parity.max_box_difference_px < 0.002, parity
    assert parity.max_score_difference < 2e-5, parity


@pytest.mark.parametrize("kind", get_args(HeadSpec.model_fields["kind"].annotation)[1:])
def test_every_kind_of_head(kind: str, tmp_path: Path) -> None:
    detector = make_detector(kind).eval()
    images = [photo(120, 160), photo(300, 200, seed=1)]
    model = onnx_export.build(detector, CLASSES, SHORT, LONG, POST, 20)
    onnx.save(model, tmp_path / "head.onnx")
    parity = check_parity(tmp_path / "head.onnx", images, [eager(detector, image) for image in images], POST, TOLERANCE)
    assert parity.num_detections > 20
    assert parity.num_unmatched == 0
    assert parity.max_box_difference_px < 0.002
    assert parity.max_score_difference < 2e-5
    if detector.head.quality is None:
        return
    with torch.no_grad():  # the file's scores must hang on the quality, or the check proves nothing of it
        for parameter in detector.head.quality.parameters():
            parameter.mul_(-1)
    flipped = [eager(detector, image) for image in images]
    assert not check_parity(tmp_path / "head.onnx", images, flipped, POST, TOLERANCE).is_within(TOLERANCE)


def test_equals_the_detector_in_a_batch(detector: Detector, session: onnxruntime.InferenceSession) -> None:
    images = torch.stack([photo(150, 190, seed=seed) for seed in range(3)])
    found = onnx_export.run(session, images)
    assert len({len(one.score) for one in found}) > 1, "images that differ in their number of detections"
    for image, one in zip(images, found, strict=True):
        assert compare(one, eager(detector, image), POST, TOLERANCE).is_within(TOLERANCE)


def test_fills_up_with_nothing(session: onnxruntime.InferenceSession) -> None:
    boxes, scores, labels, counts = session.run(None, {"images": photo(90, 120)[None].numpy()})
    count = int(counts[0])
    assert 0 < count < 100
    assert boxes.shape == (1, 100, 4)
    assert (labels[0, :count] >= 0).all()
    assert (labels[0, count:] == -1).all()
    assert (scores[0, :count] > POST.score_threshold).all()
    assert (np.diff(scores[0]) <= 0).all()
    assert not scores[0, count:].any()
    assert not boxes[0, count:].any()
    assert (boxes[0, :, 2] <= 120.001).all()
    assert (boxes[0, :, 3] <= 90.001).all()


def test_no_detections_at_all(detector: Detector, exported: tuple[Path, Parity], tmp_path: Path) -> None:
    silent = copy.deepcopy(detector)
    with torch.no_grad():
        silent.head.cls.bias.fill_(-100)
    path = tmp_path / "silent.onnx"
    altered(exported[0], path, "head.cls.bias", lambda bias: np.full_like(bias, -100))
    expected = eager(silent, photo(100, 100))
    assert len(expected.score) == 0
    parity = check_parity(path, [photo(100, 100)], [expected], POST, TOLERANCE)
    assert parity == Parity(1, 0, 0, 0, 0.0, 0.0)
    # A hundred on one side, none on the other
    full = check_parity(exported[0], [photo(100, 100)], [expected], POST, TOLERANCE)
    assert full.num_unmatched > 5
    assert not full.is_within(TOLERANCE)


def test_cuts_off_at_the_most_detections(detector: Detector, exported: tuple[Path, Parity], tmp_path: Path) -> None:
    loud = copy.deepcopy(detector)
    with torch.no_grad():
        loud.head.cls.bias.fill_(-1)
    path = tmp_path / "loud.onnx"
    altered(exported[0], path, "head.cls.bias", lambda bias: np.full_like(bias, -1))
    image = photo(200, 260)
    expected = eager(loud, image)
    assert len(expected.score) == 100
    assert check_parity(path, [image], [expected], POST, TOLERANCE).is_within(TOLERANCE)


def test_file_describes_itself(exported: tuple[Path, Parity], session: onnxruntime.InferenceSession) -> None:
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["strides"]) == [8, 16, 32, 64, 128]
    assert {key: metadata[key] for key in metadata if key not in ("classes", "strides")} == {
        "ldctl_version": ldctl.__version__,
        "short_side": "128",
        "long_side": "213",
        "score_threshold": "0.05",
        "nms_iou": "0.6",
        "candidates_per_level": "1000",
        "max_detections": "100",
        "box_format": "xyxy (left, top, right, bottom), float32, pixels of the given image, origin at its top left",
    }
    signature = [(node.name, node.shape, node.type) for node in (*session.get_inputs(), *session.get_outputs())]
    assert signature == [
        ("images", ["batch", 3, "height", "width"], "tensor(uint8)"),
        ("boxes", ["batch", 100, 4], "tensor(float)"),
        ("scores", ["batch", 100], "tensor(float)"),
        ("labels", ["batch", 100], "tensor(int64)"),
        ("num_detections", ["batch"], "tensor(int64)"),
    ]
    onnx.checker.check_model(exported[0], full_check=True)
    content = exported[0].read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(ldctl.__file__).parent).encode() not in content


def test_keeps_the_older_file_when_the_check_fails(
    detector: Detector, exported: tuple[Path, Parity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = altered(exported[0], tmp_path / "bad.onnx", "head.cls.bias", lambda bias: bias + np.float32(0.2))
    monkeypatch.setattr(onnx_export, "build", lambda *_: bad)
    folder = tmp_path / "out"
    target = folder / "model.onnx"
    image = photo(120, 160)

    def export() -> None:
        OnnxExporter()(
            detector,
            target,
            classes=CLASSES,
            short_side=SHORT,
            long_side=LONG,
            postprocess=POST,
            images=[image],
            expected=[eager(detector, image)],
        )

    with pytest.raises(ExportError, match=r"model\.onnx: not written.*on 1 images: .* scores by up to 0\.0") as caught:
        export()
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    target.write_text("older")
    with pytest.raises(ExportError):
        export()
    assert [file.read_text() for file in folder.iterdir()] == ["older"]


@pytest.mark.parametrize("weight", ["head.edge.bias", "head.cls.bias"])
def test_check_notices_a_small_change_of_a_weight(
    detector: Detector, exported: tuple[Path, Parity], tmp_path: Path, weight: str
) -> None:
    path = tmp_path / "changed.onnx"

    def change(bias: np.ndarray) -> np.ndarray:
        bias = bias.copy()
        bias[2 :: 17 if "edge" in weight else 3] += np.float32(0.5)
        return bias

    altered(exported[0], path, weight, change)
    image = photo(120, 160)
    assert not check_parity(path, [image], [eager(detector, image)], POST, TOLERANCE).is_within(TOLERANCE)


def test_says_where_it_cannot_write(detector: Detector, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    for path, problem in ((tmp_path, "is a folder"), (file / "model.onnx", "cannot be written")):
        with pytest.raises(OutputError, match=problem) as caught:
            OnnxExporter()(
                detector,
                path,
                classes=CLASSES,
                short_side=SHORT,
                long_side=LONG,
                postprocess=POST,
                images=[],
                expected=[],
            )
        assert str(path) in str(caught.value)


def test_refuses_weights_that_one_file_cannot_hold(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    with pytest.raises(ExportError, match="do not fit one ONNX file"):
        onnx_export.build(detector, CLASSES, SHORT, LONG, POST, 20)


def boxes(*rows: tuple[float, ...]) -> Detections:
    """Detections from rows of left, top, right, bottom, score and class."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(image_id=0, xyxy=table[:, :4], score=table[:, 4], label=table[:, 5].long())


A = (0.0, 0.0, 50.0, 100.0, 0.9, 0.0)
B = (200.0, 0.0, 300.0, 100.0, 0.8, 1.0)
C = (200.0, 0.0, 300.0, 62.5, 0.7, 1.0)  # overlaps B by 0.625
FAR = [(500.0 + 60 * i, 0.0, 550.0 + 60 * i, 50.0, 0.95, 2.0) for i in range(20)]


def passes(found: Detections, wanted: Detections, post: PostprocessSpec = POST) -> bool:
    forward, backward = compare(found, wanted, post, TOLERANCE), compare(wanted, found, post, TOLERANCE)
    assert forward.is_within(TOLERANCE) == backward.is_within(TOLERANCE)
    return forward.is_within(TOLERANCE)


def moved(row: tuple[float, ...], px: float = 0.0, score: float = 0.0, label: float = 0.0) -> tuple[float, ...]:
    return (row[0] + px, row[1], row[2] + px, row[3], row[4] + score, row[5] + label)


def test_order_does_not_matter_and_figures_are_the_largest() -> None:
    parity = compare(boxes(moved(B, px=0.25), moved(A, score=0.003)), boxes(A, B), POST, TOLERANCE)
    assert parity.is_within(TOLERANCE)
    assert parity.max_box_difference_px == pytest.approx(0.25)
    assert parity.max_score_difference == pytest.approx(0.003, abs=1e-6)


@pytest.mark.parametrize("rows", [[A], [A, B], [A, B, *FAR]])
@pytest.mark.parametrize("change", [{"px": 1.0}, {"score": 0.02}, {"label": 1.0}])
def test_real_differences_are_noticed(rows: list[tuple[float, ...]], change: dict[str, float]) -> None:
    assert not passes(boxes(*(moved(row, **change) for row in rows)), boxes(*rows))


def test_missing_and_doubled_boxes_are_noticed() -> None:
    assert not passes(boxes(A), boxes(A, B))
    assert not passes(boxes(A, A, B), boxes(A, B))
    assert not passes(boxes(), boxes(A))
    doubled = [moved(row, score=-0.01) for row in FAR]
    assert not passes(boxes(*FAR, *doubled), boxes(*FAR))
    assert passes(boxes(), boxes())


def test_figures_of_a_shift_name_it() -> None:
    parity = compare(boxes(*(moved(row, px=3.0) for row in FAR)), boxes(*FAR), POST, TOLERANCE)
    assert parity.max_box_difference_px == pytest.approx(3.0)
    assert parity.num_unmatched == 0


def test_boxes_at_the_score_threshold_may_come_and_go() -> None:
    assert passes(boxes(A), boxes(A, (*B[:4], 0.0501, 1.0)))
    assert not passes(boxes(A), boxes(A, (*B[:4], 0.1, 1.0)))


def test_boxes_at_the_last_rank_may_come_and_go() -> None:
    two = PostprocessSpec(max_detections=2)
    other = (*B[:4], 0.801, 2.0)
    assert passes(boxes(A, B), boxes(A, other), two)
    assert not passes(boxes(A, B), boxes(A, other), POST)
    assert not passes(boxes(A, B), boxes(A, (*B[:4], 0.85, 2.0)), two)


def test_boxes_without_extent_may_come_and_go() -> None:
    assert passes(boxes(A), boxes(A, (100.0, 10.0, 100.0001, 20.0, 0.8, 1.0)))


def test_boxes_at_the_nms_threshold_may_come_and_go() -> None:
    at_threshold = PostprocessSpec(nms_iou=0.624)
    assert passes(boxes(*FAR, B), boxes(*FAR, B, C), at_threshold)
    assert not passes(boxes(*FAR, B), boxes(*FAR, B, C), PostprocessSpec(nms_iou=0.7))
    # What C would have suppressed is there without it
    d = (200.0, 0.0, 300.0, 42.0, 0.6, 1.0)
    assert passes(boxes(*FAR, B, d), boxes(*FAR, B, C), at_threshold)
    # Of two equally good boxes either may stay
    twin = (200.0, 0.0, 300.0, 95.0, 0.8001, 1.0)
    assert passes(boxes(*FAR, B), boxes(*FAR, twin))
    assert not passes(boxes(B), boxes(twin)), "without other boxes this may as well be a shift"


def test_a_check_needs_images(exported: tuple[Path, Parity]) -> None:
    with pytest.raises(AssertionError):
        check_parity(exported[0], [], [], POST, TOLERANCE)
