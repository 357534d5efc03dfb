"""The learning rate against mmengine's, optimizer steps against hand-made ones, and resuming bit by bit."""

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldctl.errors import CheckpointError
from ldctl.optim import (
    Ema,
    EmaSpec,
    OptimSpec,
    ScheduleSpec,
    build_optimizer,
    ema_decay,
    load_optimizer_state,
    lr_factor,
    optimizer_state,
    scaled_lr,
    set_lr,
)


def net() -> nn.Sequential:
    """Convolution in channels_last, trainable norm, a frozen layer, a 0-dim parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).to(
        memory_format=torch.channels_last
    )
    model[2].requires_grad_(False)
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        (model(images) * model.scale).square().sum().backward()
        set_lr(optimizer, 0.01 / (step + 1))
        optimizer.step()
        optimizer.zero_grad()


# The schedule


def test_lr_is_mmengine_s(shared: Path) -> None:
    oracle = json.loads((shared / "oracle" / "lr_schedule.json").read_text())
    got = [
        oracle["base_lr"] * lr_factor(ScheduleSpec(), step, oracle["iters_per_epoch"], oracle["epochs"])
        for step in oracle["iteration"]
    ]
    assert got == pytest.approx(oracle["mmengine_lr"], rel=1e-9)


def test_mmcv_1_differs_as_documented(shared: Path) -> None:
    oracle = json.loads((shared / "oracle" / "lr_schedule.json").read_text())
    for step, lr in zip(oracle["iteration"], oracle["mmcv1_formula_lr"], strict=True):
        if step < 500:
            assert lr == pytest.approx(oracle["base_lr"] * (1 - (1 - step / 500) * (1 - 0.001)), rel=1e-9)


def test_coco_schedule_in_full() -> None:
    factors = {step: lr_factor(ScheduleSpec(), step, 7330, 12) for step in (0, 499, 58639, 58640, 80629, 80630)}
    expected = {0: 0.001, 499: 1.0, 58639: 1.0, 58640: 0.1, 80629: 0.1, 80630: 0.01}
    assert factors == pytest.approx(expected, rel=1e-12)


def test_short_run_warms_up_over_a_quarter() -> None:
    schedule = ScheduleSpec(warmup_factor=0.1, milestones=(8,))
    factors = [lr_factor(schedule, step, 4, 5) for step in range(20)]  # 20 steps: 5 of warm-up, no milestone reached
    assert factors == pytest.approx([0.1, 0.325, 0.55, 0.775] + 16 * [1.0])


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warm_up(warmup_steps: int) -> None:
    schedule = ScheduleSpec(warmup_steps=warmup_steps, milestones=(1,))
    assert [lr_factor(schedule, step, 2, 2) for step in range(4)] == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_cosine() -> None:
    schedule = ScheduleSpec(kind="cosine", warmup_steps=2, warmup_factor=0.5)
    factors = [lr_factor(schedule, step, 4, 2) for step in (0, 1, 2, 4, 8, 9)]
    eighth = (1 + math.cos(math.pi / 8)) / 2
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert factors == pytest.approx([0.5, eighth, quarter, 0.5, 0.0, 0.0], abs=1e-15)


@pytest.mark.parametrize("milestones", [(11, 8), (8, 8), (0, 3)])
def test_milestones_must_ascend(milestones: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="milestones must be ascending epochs from 1 on, not"):
        ScheduleSpec(milestones=milestones)


# The optimizer


def test_lr_scales_with_the_batch() -> None:
    assert scaled_lr(OptimSpec(), 16) == 0.01
    assert scaled_lr(OptimSpec(), 6) == pytest.approx(0.00375)  # the authors' 2 GPUs with 3 images each
    assert scaled_lr(OptimSpec(lr=0.1, base_batch=4), 2) == pytest.approx(0.05)


def test_adamw_has_its_own_defaults() -> None:
    assert OptimSpec(kind="adamw").model_dump() == {
        "kind": "adamw", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0.05, "base_batch": 16, "clip_norm": None,
    }  # fmt: skip
    assert OptimSpec(kind="adamw", lr=0.5).lr == 0.5
    assert OptimSpec.model_validate_json(OptimSpec(kind="adamw").model_dump_json()) == OptimSpec(kind="adamw")
    (group,) = build_optimizer(OptimSpec(kind="adamw", momentum=0.8), {"student": net()}).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.8, 0.999), 0.05)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"base_batch": 0}, {"clip_norm": 0.0}, {"lr": "1"}],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OptimSpec.model_validate(values)


def test_one_group_of_what_takes_gradients() -> None:
    optimizer = build_optimizer(OptimSpec(), {"student": net(), "adapter": nn.Linear(2, 3)})
    (group,) = optimizer.param_groups
    assert group["param_names"] == [
        "student.scale", "student.0.weight", "student.0.bias", "student.1.weight", "student.1.bias",
        "adapter.weight", "adapter.bias",
    ]  # fmt: skip
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 1e-4)


def test_sgd_by_hand() -> None:
    """Two steps of momentum and weight decay, the decay on a norm's bias too."""
    module = nn.BatchNorm1d(1)
    with torch.no_grad():
        module.bias.fill_(2.0)
    optimizer = build_optimizer(OptimSpec(weight_decay=0.5), {"student": module})
    expected, velocity = 2.0, 0.0
    for lr, gradient in ((0.1, 1.0), (0.01, -3.0)):
        set_lr(optimizer, lr)
        module.bias.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.5 * expected
        expected -= lr * velocity
        assert module.bias.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_resume_is_bitwise(kind: str, tmp_path: Path) -> None:
    spec = OptimSpec.model_validate({"kind": kind})
    whole = net()
    whole_optimizer = build_optimizer(spec, {"student": whole})
    train(whole, whole_optimizer, range(3))
    tensors, values = optimizer_state(whole_optimizer)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "state.safetensors")
    weights = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    train(whole, whole_optimizer, range(3, 6))

    resumed = net()
    resumed.load_state_dict(weights)
    resumed_optimizer = build_optimizer(spec, {"student": resumed})
    load_optimizer_state(resumed_optimizer, load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(values)))
    train(resumed, resumed_optimizer, range(3, 6))

    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(optimizer_state(resumed_optimizer)[0], optimizer_state(whole_optimizer)[0])
    for parameter, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        for entry, value in whole_optimizer.state.get(parameter, {}).items():
            assert resumed_optimizer.state[other][entry].stride() == value.stride()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
        assert got[key].dtype == value.dtype, key


@pytest.mark.parametrize(
    ("kind", "entries"), [("sgd", ["momentum_buffer"]), ("adamw", ["step", "exp_avg", "exp_avg_sq"])]
)
def test_state_is_flat_and_named(kind: str, entries: list[str]) -> None:
    model = net()
    optimizer = build_optimizer(OptimSpec.model_validate({"kind": kind}), {"student": model})
    assert optimizer_state(optimizer)[0] == {}
    train(model, optimizer, range(1))
    tensors, values = optimizer_state(optimizer)
    names = ["scale", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(tensors) == [f"{entry}/student.{name}" for name in names for entry in entries]
    assert values == {"optimizer": {"sgd": "SGD", "adamw": "AdamW"}[kind]}


def test_loaded_state_is_a_copy() -> None:
    model = net()
    optimizer = build_optimizer(OptimSpec(), {"student": model})
    train(model, optimizer, range(1))
    tensors, values = optimizer_state(optimizer)
    other = build_optimizer(OptimSpec(), {"student": net()})
    load_optimizer_state(other, tensors, values)
    tensors["momentum_buffer/student.scale"].zero_()
    assert optimizer_state(other)[0]["momentum_buffer/student.scale"] != 0


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({}, {"optimizer": "AdamW"}, "training state: made by AdamW, but the spec says SGD; resume with the spec that "
         "the run was started with"),
        ({"momentum_buffer/student.2.weight": torch.zeros(1)}, {"optimizer": "SGD"},
         "training state: momentum_buffer/student.2.weight of shape [1] fits no parameter of the student; resume with "
         "the spec that the run was started with"),
        ({"momentum_buffer/student.0.bias": torch.zeros(5)}, {"optimizer": "SGD"},
         "training state: momentum_buffer/student.0.bias of shape [5] fits no parameter of the student; resume with "
         "the spec that the run was started with"),
    ],
)  # fmt: skip
def test_foreign_state_is_refused(tensors: dict[str, Tensor], values: dict[str, str], message: str) -> None:
    optimizer = build_optimizer(OptimSpec(), {"student": net()})
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(optimizer, tensors, values)
    assert str(caught.value) == message


# The moving average


def test_ema_follows_weights_and_buffers() -> None:
    model = net()
    ema = Ema(EmaSpec(decay=0.9, warmup=10), model)
    mean = {key: tensor.double().clone() for key, tensor in model.state_dict().items()}
    optimizer = build_optimizer(OptimSpec(), {"student": model})
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-(step + 1) / 10))
        assert ema_decay(ema.spec, step + 1) == pytest.approx(decay, rel=1e-12)
        mean = {key: decay * old + (1 - decay) * model.state_dict()[key].double() for key, old in mean.items()}
    got = ema.module.state_dict()
    for key, value in mean.items():
        if key != "1.num_batches_tracked":
            torch.testing.assert_close(got[key].double(), value, rtol=1e-5, atol=1e-7)
    assert got["1.num_batches_tracked"] == 4
    assert ema.num_updates == 4
    assert not torch.equal(got["1.running_mean"], model.state_dict()["1.running_mean"])
    assert torch.equal(got["2.weight"], model.state_dict()["2.weight"])  # frozen: not a bit moves


def test_ema_is_apart_from_the_module() -> None:
    model = net()
    ema = Ema(EmaSpec(), model)
    assert not ema.module.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    before = ema.module.state_dict()["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(ema.module.state_dict()["0.weight"], before)


def test_ema_resumes_bitwise() -> None:
    model = net()
    whole = Ema(EmaSpec(), model)
    optimizer = build_optimizer(OptimSpec(), {"student": model})
    train(model, optimizer, range(2))
    whole.update(model)
    resumed = Ema(EmaSpec(), model)
    resumed.module.load_state_dict(whole.module.state_dict())
    resumed.num_updates = whole.num_updates
    train(model, optimizer, range(2, 4))
    whole.update(model)
    resumed.update(model)
    assert_same(resumed.module.state_dict(), whole.module.state_dict())


@pytest.mark.parametrize(("epochs", "expected"), [(12, (8, 11)), (24, (16, 22))])
def test_milestones_follow_the_epochs_unless_given(epochs: int, expected: tuple[int, ...]) -> None:
    schedule = ScheduleSpec(warmup_steps=0)
    factors = [lr_factor(schedule, epoch, 1, epochs) for epoch in range(epochs)]
    assert tuple(epoch for epoch in range(1, epochs) if factors[epoch] < factors[epoch - 1]) == expected
