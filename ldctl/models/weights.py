"""Starting weights of backbones: downloaded or read, and matched with the network by name, or else by order."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from ldctl.errors import CheckpointError, MissingError
from ldctl.keys import key_faults
from ldctl.models.base import Backbone

PREFIX = "backbone."  # of a backbone's entries in an ldctl checkpoint
COUNTER = "num_batches_tracked"  # matters to norms without momentum only; the first torchvision files predate it
OFFSETS = ".conv_offset."  # of deformable convolutions, which start as plain ones with plain weights


def initialize_backbone(backbone: Backbone) -> str:
    """Load the weights that the spec's `init` names; leave a random backbone alone.

    Returns:
        What the user should know of how they were matched; empty if there is nothing to say.

    Raises:
        MissingError: The ImageNet weights cannot be downloaded.
        CheckpointError: The file of `init` is missing, unreadable, or does not fit.
    """
    if backbone.spec.init == "none":
        return ""
    state = backbone.imagenet() if backbone.spec.init == "imagenet" else read_weights(Path(backbone.spec.init))
    return load_backbone_weights(backbone, state, source=backbone.spec.init)


def load_backbone_weights(backbone: Backbone, state: Mapping[str, Tensor], *, source: str) -> str:
    """Copy the weights of a network's own file, without its classifier, or those of an ldctl checkpoint's backbone.

    Entries are matched by name. Only if names do not fit, but every shape and the last part of every name (`weight`,
    `running_var`, ...) agree in order, they are matched by order: other tools name the same network differently.

    Args:
        backbone: Changed in place.
        state: Entries by name.
        source: What messages call it.

    Returns:
        That they were matched by order; empty if by name.

    Raises:
        CheckpointError: Entries are missing, unexpected or of another shape; the first are listed.
    """
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    own = backbone.state_dict()
    has_offsets = any(OFFSETS in key for key in state)
    optional = {k: v for k, v in own.items() if k.endswith(COUNTER) or (OFFSETS in k and not has_offsets)}
    named = {_own_name(backbone, own, key): value for key, value in state.items()}
    given = optional | {key: value for key, value in named.items() if key is not None}
    shapes, own_shapes = ({key: tuple(value.shape) for key, value in entries.items()} for entries in (given, own))
    verdict = f"do not fit {backbone.title}; change the backbone or init"
    faults = key_faults(shapes, own_shapes, "the backbone's", verdict)
    note = ""
    if faults:
        matched = _by_order(backbone, state)
        if matched is None:
            raise CheckpointError(f"{source}: {faults}")
        given = optional | matched
        note = (
            f"{source}: other names than those of {backbone.title}, but all shapes and last parts of names agree in "
            "order: matched by order"
        )
    backbone.load_state_dict(given)
    return note


def _own_name(backbone: Backbone, own: Mapping[str, Tensor], key: str) -> str | None:
    """Return what the backbone calls an entry; None where it has no such part; the name itself if that is unknown."""
    entry = backbone.published.get(key)
    return key if key in own or entry is None else entry.name


def _by_order(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the entries under the backbone's names, if they are those of its published file in the same order."""

    def kind(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return name.rpartition(".")[2], tuple(shape)

    theirs = [(key, value) for key, value in state.items() if not key.endswith(COUNTER)]
    ours = [(key, entry) for key, entry in backbone.published.items() if not key.endswith(COUNTER)]
    if [kind(key, value.shape) for key, value in theirs] != [kind(key, entry.shape) for key, entry in ours]:
        return None
    return {entry.name: value for (_, value), (_, entry) in zip(theirs, ours, strict=True) if entry.name is not None}


def download(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """Fetch torchvision's weights into torch hub's cache, or take them from there.

    Raises:
        MissingError: They cannot be downloaded.
    """
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        name = weights.url.rsplit("/", 1)[-1]
        target = Path(torch.hub.get_dir()) / "checkpoints" / name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingError(
            f"cannot get the ImageNet weights {weights.url} ({reason}): "
            f"put {name} at {target}, or pass --init PATH, or --init none to start from random weights"
        ) from error
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a flat file of tensors, `.safetensors` or a `.pth` without any code in it.

    Raises:
        CheckpointError: It is missing, unreadable or something else.
    """
    advice = "pass --init the network's weights (.pth, .safetensors) or an ldctl checkpoint"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: {advice}, or --init none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the reader raise anything
        raise CheckpointError(f"{path}: not a readable weights file ({type(error).__name__}): {advice}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not a flat dictionary of tensors: {advice}")
    return dict(state)
