"""Exporters: a file that gives the detector's boxes without ldctl, checked against the detector before it is kept."""

from ldctl.export.onnx import Exportable, OnnxExporter, check_parity
from ldctl.export.parity import Parity, Postprocess, Tolerance, compare

__all__ = ["Exportable", "OnnxExporter", "Parity", "Postprocess", "Tolerance", "check_parity", "compare"]
