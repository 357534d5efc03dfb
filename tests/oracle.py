"""The reference numbers' weights and inputs, which follow from names and shapes, and a reader of its files."""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the arrays and the notes of a reference file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def levels(arrays: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """Return the arrays `<prefix>.0`, `<prefix>.1`, ... in order."""
    count = sum(key.rpartition(".")[0] == prefix for key in arrays)
    return [arrays[f"{prefix}.{level}"] for level in range(count)]


def _generator(key: str, salt: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32((salt + key).encode()))


def normal(shape: tuple[int, ...], key: str, salt: str = "") -> Tensor:
    """Return the standard normal array of a name: images (`input.images/<name>`) and features are these as they are."""
    return torch.from_numpy(np.asarray(_generator(key, salt).standard_normal(shape), dtype=np.float32))


def weight(key: str, shape: tuple[int, ...], salt: str = "", *, is_basic: bool) -> Tensor:
    """Return one entry of the reference's state dict.

    Args:
        key: Name in mmdet's layout.
        shape: Its shape.
        salt: Tells several detectors apart.
        is_basic: True for ResNet 18 and 34, where `bn2` is a block's last norm.
    """
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("integral.project"):
        return torch.linspace(0, shape[0] - 1, shape[0])
    if key.endswith("running_var"):
        return _tensor(0.75 + 0.5 * _generator(key, salt).random_sample(shape))
    noise = np.asarray(_generator(key, salt).standard_normal(shape))
    if len(shape) == 4:
        small = 0.1 if "conv_offset" in key else 1.0
        return _tensor(noise * np.sqrt(2.0 / np.prod(shape[1:])) * small)
    if key.endswith("running_mean"):
        return _tensor(0.1 * noise)
    if key.endswith(".scale"):
        return _tensor(1.0 + 0.1 * noise)
    if key.endswith("bias"):
        return _tensor((-3.0 if key.endswith("gfl_cls.bias") else 0.0) + 0.1 * noise)
    is_last = key.endswith(".bn3.weight") or (is_basic and key.endswith(".bn2.weight"))
    base = 0.2 if key.startswith("backbone.layer") and is_last else 1.0
    return _tensor(base * (1.0 + 0.1 * noise))


def weights(shapes: dict[str, list[int]], depth: int, salt: str = "") -> dict[str, Tensor]:
    """Return the whole state dict of a reference detector from its key list."""
    return {key: weight(key, tuple(shape), salt, is_basic=depth in (18, 34)) for key, shape in shapes.items()}


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
