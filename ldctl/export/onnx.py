"""ONNX: one file from raw photos to final boxes, checked in ONNX Runtime before it is kept."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jaxtyping
import onnx
import onnxruntime
import torch
from jaxtyping import Float, Int, UInt8
from onnx import ModelProto
from onnx.compose import merge_models
from onnx.helper import set_model_props
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
from pydantic import Field
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from ldctl import __version__
from ldctl.boxes import decode_ltrb, expected_distance
from ldctl.errors import ExportError, OutputError
from ldctl.export.graphs import resize_graph, select_graph
from ldctl.export.parity import Parity, Postprocess, Tolerance, compare
from ldctl.schema import Spec
from ldctl.types import Dense, Detections

MAX_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the graph itself takes well under 1 MiB
BOX_FORMAT = "xyxy (left, top, right, bottom), float32, pixels of the given image, origin at its top left"


@runtime_checkable
class Exportable(Protocol):
    """What is read of a detector, which is an `nn.Module`."""

    @property
    def num_classes(self) -> int:
        """Classes of the head."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring locations, per pyramid level."""

    @property
    def mean(self) -> Float[Tensor, "3 1 1"]:
        """What is subtracted from an image's red, green and blue."""

    @property
    def std(self) -> Float[Tensor, "3 1 1"]:
        """What they are then divided by."""

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Dense:
        """Predict from normalized images."""


class OnnxExporter(Spec):
    """One ONNX file from raw photos to final boxes.

    Input `images`: uint8 RGB `[batch, 3, height, width]`, any size (one per batch). Outputs: `boxes`
    `[batch, max_detections, 4]` in pixels of the given image, `scores` `[batch, max_detections]`, best first and 0
    where there is none, `labels` (-1 where there is none) and `num_detections` `[batch]`. Classes and settings are in
    the file's metadata.

    Attributes:
        opset: Version of the ONNX operators.
        tolerance: What the check lets pass.
    """

    kind: Literal["onnx"] = "onnx"
    opset: int = Field(default=20, ge=18, le=22)
    tolerance: Tolerance = Tolerance()

    def __call__(
        self,
        detector: Exportable,
        path: Path,
        *,
        classes: tuple[str, ...],
        short_side: int,
        long_side: int,
        postprocess: Postprocess,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        expected: Sequence[Detections],
    ) -> Parity:
        """Write the file, after ONNX Runtime gave the detector's boxes with it; until then an older file stays.

        Args:
            detector: Any device, any mode; not changed.
            path: File to write; missing folders are created.
            classes: Class names.
            short_side: Pixels to which the evaluation scales the shorter side.
            long_side: Most pixels of the longer side.
            postprocess: Thresholds.
            images: Photos to check the file with, at least one.
            expected: What the detector finds on each, in pixels of the photo.

        Raises:
            OutputError: The path cannot be written.
            ExportError: The weights exceed what one ONNX file holds, or ONNX Runtime does not know an operator, or it
                gives other boxes than the detector.
        """
        with _beside(path) as temporary:
            model = build(detector, classes, short_side, long_side, postprocess, self.opset)
            _write(model, temporary, path)
            try:
                parity = check_parity(temporary, images, expected, postprocess, self.tolerance)
            except NotImplementedByRuntime as error:  # as DeformConv by older ones
                raise ExportError(
                    f"{path}: not written, for onnxruntime {onnxruntime.__version__} cannot run it "
                    f"({' '.join(str(error).split())}): update onnxruntime"
                ) from error
            if not parity.is_within(self.tolerance):
                raise ExportError(
                    f"{path}: not written, for ONNX Runtime gives other boxes than the detector on {parity.num_images} "
                    f"images: {parity.num_unmatched} of {parity.num_detections} detections have no counterpart, edges "
                    f"differ by up to {parity.max_box_difference_px:.3g} px (tolerance {self.tolerance.box_px:g}), "
                    f"scores by up to {parity.max_score_difference:.3g} (tolerance {self.tolerance.score:g}): "
                    "update onnxruntime and torch, or report this"
                )
        return parity


class _Network(nn.Module):
    """From normalized images to the candidates of every level, boxes in pixels of the given image."""

    def __init__(self, detector: Exportable, postprocess: Postprocess) -> None:
        super().__init__()
        self.detector = detector
        self.postprocess = postprocess

    def forward(
        self, images: Float[Tensor, "B 3 H W"], size_hw: Int[Tensor, "2"], original_hw: Int[Tensor, "2"]
    ) -> tuple[Float[Tensor, "B N 4"], Float[Tensor, "B C N"], Float[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Return boxes, scores by class, scores and labels; a score is 0 where the candidate does not count."""
        dense = self.detector(images)
        row, score, label = self._candidates(dense)
        image = torch.arange(row.shape[0]).unsqueeze(1)
        edge = dense.edge.flatten(0, 1)[image * dense.edge.shape[1] + row]
        locations = dense.locations
        xyxy = decode_ltrb(locations.xy[row], expected_distance(edge), locations.stride[row])
        scale_wh = (size_hw.double() / original_hw.double()).float().flip(0).repeat(2)
        xyxy = torch.minimum(xyxy.clamp(min=0), size_hw.float().flip(0).repeat(2)) / scale_wh
        has_extent = (xyxy[..., 2:] > xyxy[..., :2]).all(dim=-1)
        score = score.where(has_extent & (score > self.postprocess.score_threshold), 0.0)
        of_class = torch.arange(self.detector.num_classes).view(1, -1, 1)
        by_class = score.unsqueeze(1).where(label.unsqueeze(1) == of_class, 0.0)
        return xyxy, by_class, score, label

    def _candidates(self, dense: Dense) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Return location, score and class of the best pairs of each level.

        As many of each level as the image with the most above the threshold has there, at least one: boxes are decoded
        and compared for these few only, not for every location.
        """
        pairs, scores = [], []
        start, num_classes = 0, self.detector.num_classes
        sizes = dense.locations.level_sizes
        for size, of_level in zip(sizes, torch.split(dense.score, list(sizes), dim=1), strict=True):
            score = of_level.flatten(1)
            # counted in float32, which is exact up to 2^24 and what ONNX Runtime adds up fastest
            above = (score > self.postprocess.score_threshold).float().sum(dim=1).amax(dim=0).long()
            count = torch.sym_int(above.clamp(min=1, max=self.postprocess.candidates_per_level).item())
            torch._check(count >= 1)  # torch.export cannot know either
            torch._check(count <= score.shape[1])
            best = score.topk(count)
            pairs.append(best.indices + start * num_classes)
            scores.append(best.values)
            start += size
        pair = torch.cat(pairs, dim=1)
        return pair // num_classes, torch.cat(scores, dim=1), pair % num_classes


def build(
    detector: Exportable,
    classes: tuple[str, ...],
    short_side: int,
    long_side: int,
    postprocess: Postprocess,
    opset: int,
) -> ModelProto:
    """Return the whole graph: the network as torch exports it between a resize and a selection written in ONNX's text.

    Raises:
        ExportError: The weights exceed what one ONNX file holds.
    """
    network = _Network(copy.deepcopy(detector), postprocess).cpu().float().eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(f"weights of {size / 1e9:.1f} GB do not fit one ONNX file (2.1 GB): use a narrower backbone")
    core = _trace(network, opset)
    limit = min(postprocess.max_detections, len(detector.strides) * postprocess.candidates_per_level)
    mean, std = (color.flatten().tolist() for color in (detector.mean, detector.std))
    resize = resize_graph(core.ir_version, opset, short_side, long_side, mean, std)
    select = select_graph(core.ir_version, opset, limit, postprocess.nms_iou)
    inputs = [("resize_input", "input"), ("resize_size", "size_hw"), ("resize_original", "original_hw")]
    outputs = [(f"core_{name}", f"select_{name}") for name in ("xyxy", "by_class", "score", "label")]
    model = merge_models(merge_models(resize, core, io_map=inputs), select, io_map=outputs, name="ldctl")
    model.producer_name, model.producer_version = "ldctl", __version__
    settings = {
        "ldctl_version": __version__,
        "classes": json.dumps(classes),
        "short_side": str(short_side),
        "long_side": str(long_side),
        "strides": json.dumps(detector.strides),
        "score_threshold": str(postprocess.score_threshold),
        "nms_iou": str(postprocess.nms_iou),
        "candidates_per_level": str(postprocess.candidates_per_level),
        "max_detections": str(postprocess.max_detections),
        "box_format": BOX_FORMAT,
    }
    set_model_props(model, settings)
    onnx.checker.check_model(model, full_check=True)
    return model


def _trace(network: _Network, opset: int) -> ModelProto:
    """Let torch export the network for any batch and any size."""
    example = (torch.zeros(2, 3, 256, 384), torch.tensor([250, 380]), torch.tensor([500, 760]))
    dynamic = torch.export.Dim.DYNAMIC
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                example,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["input", "size_hw", "original_hw"],
                output_names=["core_xyxy", "core_by_class", "core_score", "core_label"],
                dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, None, None),
            )
        except OnnxExporterError as error:  # networks whose code depends on the image's size
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"torch cannot export this network for images of any size ({reason}): take another backbone"
            ) from error
    assert program is not None
    model = program.model_proto
    # Torch notes the stack trace of every node: local paths, and megabytes.
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from talking, and shapes from being checked: sizes are symbols here, which a check would pin."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels, is_unchecked = [logger.level for logger in loggers], jaxtyping.config.jaxtyping_disable
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        jaxtyping.config.update("jaxtyping_disable", True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", is_unchecked)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_parity(
    path: Path,
    images: Sequence[UInt8[Tensor, "3 _ _"]],
    expected: Sequence[Detections],
    postprocess: Postprocess,
    tolerance: Tolerance,
) -> Parity:
    """Run the file in ONNX Runtime on every image alone, and on the first one again behind its mirror image.

    Args:
        path: An exported file.
        images: At least one.
        expected: The detector's boxes on each image.
        postprocess: The file's thresholds.
        tolerance: What counts as equal.
    """
    assert len(images) == len(expected) > 0, "a check without images cannot fail"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pairs = [(run(session, image[None])[0], wanted) for image, wanted in zip(images, expected, strict=True)]
    # In a batch of two, the second must come out as it does alone.
    pairs.append((run(session, torch.stack((images[0].flip(-1), images[0])))[1], pairs[0][0]))
    total = sum((compare(*pair, postprocess, tolerance) for pair in pairs), start=Parity(0, 0, 0, 0, 0.0, 0.0))
    return replace(total, num_images=len(images), num_detections=sum(len(wanted.score) for wanted in expected))


def run(session: onnxruntime.InferenceSession, images: UInt8[Tensor, "B 3 H W"]) -> list[Detections]:
    """Return what an exported file finds on images of one size; their ids are their places in the batch."""
    outputs = session.run(["boxes", "scores", "labels", "num_detections"], {"images": images.numpy(force=True)})
    boxes, scores, labels, counts = (torch.from_numpy(output) for output in outputs)
    return [
        Detections(image_id=image, xyxy=boxes[image, :count], score=scores[image, :count], label=labels[image, :count])
        for image, count in enumerate(counts.tolist())
    ]


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a new file in the target's folder, which replaces the target at the end, unless something failed.

    Raises:
        OutputError: The path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}): choose another place") from error
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(model: ModelProto, temporary: Path, path: Path) -> None:
    """Serialize the model; messages name the final path."""
    try:
        temporary.write_bytes(model.SerializeToString())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}): free space or choose another place"
        ) from error
