"""The optimizer, its learning rate over the run, its state as named tensors, and the moving average of the weights."""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ldctl.errors import CheckpointError
from ldctl.schema import Spec

# Most of a run that the warm-up may take: a run of 100 steps warms up for 25; COCO's 500 of 87,960 are far below it.
WARMUP_SHARE = 0.25

MILESTONE_SHARES = (2 / 3, 11 / 12)  # of the epochs, where the decay is not placed by hand

ADAMW_DEFAULTS = {"lr": 1e-4, "weight_decay": 0.05}  # Source: mmdet, Mask R-CNN with Swin-T on COCO
ADAMW_BETA2 = 0.999  # Source: Adam (arXiv:1412.6980), section 2


class OptimSpec(Spec):
    """How the weights move: one rule for every parameter, norms and biases included.

    Attributes:
        kind: `sgd` with momentum, or `adamw`.
        lr: Learning rate at `base_batch` images a step; 1e-4 if unset for `adamw`.
        momentum: Share of the previous direction that SGD keeps; AdamW's beta1.
        weight_decay: Pull towards zero; 0.05 if unset for `adamw`.
        base_batch: Images a step that `lr` was chosen for; `scaled_lr` adapts it.
        clip_norm: Longest gradient over all parameters (L2 norm), beyond which it is shortened; None: never.

    Source: GFL and LD, COCO recipe.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    base_batch: int = Field(default=16, ge=1)
    clip_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _adamw_defaults(cls, values: Any) -> Any:  # noqa: ANN401
        """Give AdamW its own defaults: SGD's learning rate would wreck it."""
        if isinstance(values, dict) and values.get("kind") == "adamw":
            return ADAMW_DEFAULTS | values
        return values


class ScheduleSpec(Spec):
    """How the learning rate changes over a run.

    Attributes:
        kind: `step` multiplies by `gamma` after each milestone; `cosine` falls to 0 along half a cosine, step by step.
        milestones: Finished epochs at which `step` decays, ascending; unless given, after 2/3 and 11/12 of the epochs,
            rounded: 8 and 11 of 12 (1x), 16 and 22 of 24 (2x).
        gamma: What `step` multiplies by.
        warmup_steps: Steps over which the rate rises linearly; at most a quarter of the run (`WARMUP_SHARE`).
        warmup_factor: Where the rise starts, as a share of the scheduled rate.

    Source: GFL and LD, COCO 1x recipe.
    """

    kind: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] | None = None
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=500, ge=0)
    warmup_factor: float = Field(default=0.001, gt=0, le=1)

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, milestones: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if milestones is None:
            return None
        if list(milestones) != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
            raise ValueError(f"milestones must be ascending epochs from 1 on, not {list(milestones)}")
        return milestones


class EmaSpec(Spec):
    """A moving average of the weights, evaluated and kept in place of the weights themselves.

    Attributes:
        decay: Share of the average that one step keeps.
        warmup: Steps over which that share rises, so that the average forgets the initial weights.

    Source: YOLOX (arXiv:2107.08430), its published code: decay 0.9998, warm-up 2000.
    """

    decay: float = Field(default=0.9998, gt=0, lt=1)
    warmup: int = Field(default=2000, ge=1)


def scaled_lr(spec: OptimSpec, batch_size: int) -> float:
    """Return the learning rate for a step over `batch_size` images (all ranks together): in proportion to it.

    Source: Accurate, Large Minibatch SGD (arXiv:1706.02677).
    """
    return spec.lr * batch_size / spec.base_batch


def lr_factor(schedule: ScheduleSpec, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what the scaled learning rate is multiplied by in one step: the schedule times the warm-up.

    The warm-up rises from `warmup_factor` at step 0 to 1 at step `warmup - 1`, as in mmengine. mmcv 1, which the
    authors' code ran on, reaches 1 one step later: its rise is `1 - (1 - step / warmup) * (1 - warmup_factor)`.

    Args:
        schedule: The schedule.
        step: Steps finished before this one, from 0.
        steps_per_epoch: At least 1.
        epochs: Of the whole run, at least 1.

    Returns:
        In [0, 1].
    """
    total = steps_per_epoch * epochs
    warmup = min(schedule.warmup_steps, int(total * WARMUP_SHARE))
    rise = 1.0
    if step < warmup - 1:
        rise = schedule.warmup_factor + (1 - schedule.warmup_factor) * step / (warmup - 1)
    if schedule.kind == "cosine":
        return rise * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2
    milestones = schedule.milestones
    if milestones is None:
        milestones = tuple(round(share * epochs) for share in MILESTONE_SHARES)
    passed = sum(step >= milestone * steps_per_epoch for milestone in milestones)
    return rise * schedule.gamma**passed


def build_optimizer(spec: OptimSpec, modules: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters that take gradients, in one group.

    Its learning rate is `spec.lr` until `set_lr` gives it the step's.

    Args:
        spec: The rule.
        modules: What learns, unwrapped (no DDP), by the name that goes before its parameters' names: `student.fpn...`.
    """
    named = [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    # Torch takes its multi-tensor (foreach) kernels on CUDA by itself. Not fused: when a gradient scaler skips the very
    # first step, fused SGD keeps a momentum buffer that was never written.
    if spec.kind == "adamw":
        betas = (spec.momentum, ADAMW_BETA2)
        return torch.optim.AdamW(named, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay)
    return torch.optim.SGD(named, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a resumed run needs of an optimizer from `build_optimizer`.

    The learning rate is not in it: it follows from the step.

    Returns:
        The tensors as `<entry>/<parameter>`, such as `momentum_buffer/student.fpn.lateral.0.weight`, not copied: they
        change with the next step; none before the first. And `{"optimizer": <class>}`, for `load_optimizer_state`.
    """
    tensors = {}
    for name, parameter in _named_parameters(optimizer).items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{entry}/{name}"] = value
    return tensors, {"optimizer": type(optimizer).__name__}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, str]
) -> None:
    """Put what `optimizer_state` returned into a new optimizer of the same spec; the tensors are copied.

    Raises:
        CheckpointError: The state is of another kind of optimizer, or of parameters that this one does not have.
    """
    if values.get("optimizer") != type(optimizer).__name__:
        raise CheckpointError(
            f"training state: made by {values.get('optimizer')}, but the spec says {type(optimizer).__name__}; "
            "resume with the spec that the run was started with"
        )
    parameters = _named_parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    index_of = {name: index for index, name in enumerate(parameters)}
    for key, tensor in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or tensor.shape != (parameter.shape if entry != "step" else ()):
            raise CheckpointError(
                f"training state: {key} of shape {list(tensor.shape)} fits no parameter of the student; "
                "resume with the spec that the run was started with"
            )
        # The parameter's memory format, which safetensors does not keep: else every step would take the slow kernels.
        like = tensor if entry == "step" else parameter
        state.setdefault(index_of[name], {})[entry] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Ema:
    """A copy of a module whose floating-point weights and buffers follow it slowly; other buffers are copied.

    Attributes:
        module: The average: in evaluation mode, without gradients. Its `state_dict` goes into a checkpoint.
        num_updates: Calls of `update` so far. A resumed run sets it, and loads `module`'s weights.
    """

    def __init__(self, spec: EmaSpec, module: nn.Module) -> None:
        self.spec = spec
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.num_updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module` (unwrapped), after an optimizer step."""
        self.num_updates += 1
        decay = ema_decay(self.spec, self.num_updates)
        average = [*self.module.parameters(), *self.module.buffers()]
        current = [*module.parameters(), *module.buffers()]
        pairs = [(mean, new.detach()) for mean, new in zip(average, current, strict=True)]
        floats = [(mean, new) for mean, new in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [new for _, new in floats], 1 - decay)
        for mean, new in pairs:
            if not mean.is_floating_point():
                mean.copy_(new)


def ema_decay(spec: EmaSpec, num_updates: int) -> float:
    """Return the share of the average that update number `num_updates` (from 1) keeps.

    It is `decay * (1 - exp(-num_updates / warmup))`: near 0 at first, so that the average follows the weights.
    """
    return spec.decay * (1 - math.exp(-num_updates / spec.warmup))


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters of an optimizer's one group by their names."""
    (group,) = optimizer.param_groups
    return dict(zip(group["param_names"], group["params"], strict=True))
