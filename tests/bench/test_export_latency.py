"""How long an exported student takes against a plain export of the same detector: `pytest -m bench -s tests/bench`.

CPU time of ONNX Runtime on one thread, the files in turns, so that what else the machine does falls on all alike.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from figures import report
from onnx import ModelProto
from onnx.utils import Extractor
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import nms

from ldctl import spec
from ldctl.boxes import decode_ltrb, expected_distance
from ldctl.export.onnx import OnnxExporter, build
from ldctl.models import Detector, ModelSpec, PostprocessSpec, ResNetSpec
from ldctl.spec import DistillSpec

NOISE = 0.03  # two sessions of one and the same file differ by that much; the bench prints by how much they did
SHAPES = (
    0.02  # of the narrowest student's time: an image of any size has its shapes computed, one of a fixed size has not
)
CANDIDATES = 300  # pairs of location and class above the threshold, as on a photo with some dozens of objects
POST = PostprocessSpec()

# detector, classes, photo, network input, rounds
STUDENTS = {
    "small": (
        lambda: spec.load(DistillSpec, "small", {"teacher.path": "-"}, []).student,
        3,
        (480, 640),
        (240, 320),
        41,
    ),
    "r18": (lambda: ModelSpec(backbone=ResNetSpec(depth=18, init="none")), 80, (640, 640), (320, 320), 21),
    "r50": (lambda: ModelSpec(backbone=ResNetSpec(depth=50, init="none")), 80, (640, 640), (640, 640), 15),
}


class PlainNetwork(nn.Module):
    """What a plain export of the detector holds: from a normalized image to scores and distributions."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        dense = self.detector(images)
        return dense.score, dense.edge


class PlainPipeline(nn.Module):
    """The whole way as one writes it in torch: from a photo of one size to final boxes."""

    def __init__(self, detector: Detector, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.size_hw = detector, size_hw

    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        small = interpolate(photo.float(), size=self.size_hw, mode="bilinear")
        padded = nn.functional.pad(
            (small - self.detector.mean) / self.detector.std, (0, -self.size_hw[1] % 32, 0, -self.size_hw[0] % 32)
        )
        dense = self.detector(padded)
        ltrb = expected_distance(dense.edge[0])
        xyxy = decode_ltrb(dense.locations.xy, ltrb, dense.locations.stride).clamp(min=0)
        limit = torch.tensor(self.size_hw[::-1], dtype=torch.float32).repeat(2)
        xyxy = torch.minimum(xyxy, limit) * (photo.shape[-1] / self.size_hw[1])
        rows, scores, labels, start = [], [], [], 0
        for size in dense.locations.level_sizes:
            pairs = dense.score[0, start : start + size].flatten()
            best = pairs.topk(min(POST.candidates_per_level, len(pairs)))
            rows.append(best.indices // self.detector.num_classes + start)
            labels.append(best.indices % self.detector.num_classes)
            scores.append(best.values)
            start += size
        row, score, label = torch.cat(rows), torch.cat(scores), torch.cat(labels)
        counts = score > POST.score_threshold
        row, score, label = row[counts], score[counts], label[counts]
        apart = (
            label.unsqueeze(1) * 10_000.0
        )  # boxes of different classes do not meet: `batched_nms` cannot be exported
        keep = nms(xyxy[row] + apart, score, POST.nms_iou)[: POST.max_detections]
        return xyxy[row][keep], score[keep], label[keep]


def make(model: ModelSpec, num_classes: int, size_hw: tuple[int, int], image: np.ndarray) -> Detector:
    """A detector of random weights whose biases bring `CANDIDATES` pairs above the threshold on an image."""
    torch.manual_seed(0)
    detector = Detector(model, num_classes).eval()
    with torch.no_grad():
        nn.init.normal_(detector.head.cls.weight, std=0.05)
        small = interpolate(torch.from_numpy(image), size=size_hw, mode="bilinear", align_corners=False)
        dense = detector(detector.normalize(small, torch.tensor([size_hw])))
        wanted = torch.tensor(POST.score_threshold).logit()
        detector.head.cls.bias += wanted - dense.cls.flatten().sort(descending=True).values[CANDIDATES]
    return detector


def plain_export(module: nn.Module, example: Tensor, path: Path) -> onnxruntime.InferenceSession:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), path, dynamo=True, verbose=False)
    return session(onnx.load(path))


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def network_of(model: ModelProto) -> ModelProto:
    """Cut the network out of an exported file: from the normalized image to scores and distributions."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    (split,) = (node for node in model.graph.node if node.op_type == "Split")
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    gather = made_by[softmax.input[0]]
    assert gather.op_type.startswith("Gather")
    edge = made_by[gather.input[0]].input[0]
    assert made_by[edge].op_type == "Concat"
    return Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(["resize_input"], [split.input[0], edge])


def runner(session: onnxruntime.InferenceSession, image: np.ndarray) -> Callable[[], list[np.ndarray]]:
    (given,) = session.get_inputs()
    return lambda: session.run(None, {given.name: image})


def milliseconds(runners: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds + 2):  # the first two warm up
        for name, run in runners.items():
            start = time.process_time()
            run()
            taken[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values[2:]) for name, values in taken.items()}


@pytest.mark.bench
@pytest.mark.parametrize("name", STUDENTS)
def test_latency_against_a_plain_export(name: str, tmp_path: Path) -> None:
    model, num_classes, photo_hw, size_hw, rounds = STUDENTS[name]
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.integers(0, 256, (1, 3, 16, 16), dtype=np.uint8))
    photo = interpolate(coarse, size=photo_hw, mode="bilinear").numpy()
    detector = make(model(), num_classes, size_hw, photo)
    padded_hw = [-(-side // 32) * 32 for side in size_hw]
    normal = generator.normal(size=(1, 3, *padded_hw)).astype(np.float32)
    classes = tuple(f"class {index}" for index in range(num_classes))
    ours = build(detector, classes, min(size_hw), max(size_hw), POST, OnnxExporter().opset)
    jaxtyping.config.update("jaxtyping_disable", True)  # its checks do not go with symbols
    try:
        network = plain_export(PlainNetwork(detector), torch.from_numpy(normal), tmp_path / "network.onnx")
        whole = plain_export(PlainPipeline(detector, size_hw), torch.from_numpy(photo), tmp_path / "whole.onnx")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    runners = {
        "network": runner(session(network_of(ours)), normal),
        "plain network": runner(network, normal),
        "plain network again": runner(session(onnx.load(tmp_path / "network.onnx")), normal),
        "whole": runner(session(ours), photo),
        "plain whole": runner(whole, photo),
    }
    for found, wanted in zip(runners["network"](), runners["plain network"](), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    *_, (count,) = runners["whole"]()
    plain_boxes, *_ = runners["plain whole"]()
    assert count > 20
    assert abs(len(plain_boxes) - count) <= 0.1 * POST.max_detections, "the same job, but for levels rounded to uint8"
    ms = milliseconds(runners, rounds)
    whole_ratio, network_ratio = ms["whole"] / ms["plain whole"], ms["network"] / ms["plain network"]
    report(
        what="exported file",
        student=name,
        input=padded_hw,
        ms={key: round(value, 2) for key, value in ms.items()},
        network_ratio=network_ratio,
        whole_ratio=whole_ratio,
        whole_to_plain_network=ms["whole"] / ms["plain network"],
        same_file_ratio=ms["plain network again"] / ms["plain network"],
    )
    assert whole_ratio <= 1 + NOISE
    assert network_ratio <= 1 + NOISE + SHAPES
