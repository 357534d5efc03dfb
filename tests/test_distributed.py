"""How a batch is split over ranks does not change what `synced` computes."""

import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenes import grid as grid_of
from scenes import images_of, on_ranks, random_dense, random_targets, vlr_region
from torch import Tensor
from torch.testing import assert_close

from ldctl import distributed
from ldctl.assign import assign
from ldctl.distill import KD, LD, BinaryKD
from ldctl.distill.logits import sum_of_level_means
from ldctl.losses import LossSpec, detection_losses, normalizer
from ldctl.regions import RegionSpec, all_region, main_region
from ldctl.types import Normalizer, Pair, Where

CLASSES, IMAGES = 5, 16
ONE = torch.tensor(1.0)
TERMS = (LD(), LD(region="vlr", weight=0.0625), KD(), KD(region="vlr"), BinaryKD(), BinaryKD(region="main"))


def rank_losses(images: list[int], kind: str, shift: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return one rank's losses, and the gradients of their sum for the whole batch (zero at other ranks' images).

    Args:
        images: The rank's share of the batch.
        kind: Of normaliser.
        shift: Added to the class logits: far below zero, the floor of the sum of weights acts.
    """
    grid = grid_of(128, 128)
    student, teacher = (random_dense(grid, IMAGES, CLASSES, seed) for seed in (0, 1))
    leaves = student.cls, student.edge
    student.cls.data += shift
    student, teacher = images_of(student, images), images_of(teacher, images)
    targets = images_of(random_targets(IMAGES, 128, CLASSES, seed=2), images)
    assigned = assign(grid, targets, torch.full((len(images), 2), 128), CLASSES)
    regions = {
        "main": main_region(student, assigned),
        "vlr": vlr_region(RegionSpec(), assigned, targets, grid),
        "all": all_region(assigned, grid),
    }
    norm = normalizer(kind, assigned, regions["main"])
    (at_main,) = student.at([regions["main"].picked])
    losses = detection_losses(LossSpec(), student, at_main, assigned, regions["main"], norm)
    losses |= {term.name: term(Pair(student, teacher), regions[term.region], norm) for term in TERMS}
    return losses, list(torch.autograd.grad(sum(losses.values()), leaves))


def mean_over_ranks(results: list[tuple[dict[str, Tensor], list[Tensor]]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Average losses and gradients, as data parallelism does."""
    losses = {name: torch.stack([part[name].detach() for part, _ in results]).mean() for name in results[0][0]}
    return losses, [torch.stack(parts).mean(dim=0) for parts in zip(*(grads for _, grads in results), strict=True)]


def shares(num_ranks: int) -> list[list[int]]:
    return [list(range(IMAGES))[rank::num_ranks] for rank in range(num_ranks)]


def split(patch: pytest.MonkeyPatch, num_ranks: int, kind: str, shift: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    work: Callable[[int], object] = lambda rank: rank_losses(shares(num_ranks)[rank], kind, shift)  # noqa: E731
    return mean_over_ranks(on_ranks(patch, num_ranks, work))


def same(found: tuple[dict[str, Tensor], list[Tensor]], expected: tuple[dict[str, Tensor], list[Tensor]]) -> None:
    for name, loss in expected[0].items():
        assert loss > 0, name
        assert_close(found[0][name], loss.detach(), rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    for ours, gradient in zip(found[1], expected[1], strict=True):
        assert_close(ours, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, -12.0])
def test_synced_does_not_depend_on_the_split(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    whole = rank_losses(shares(1)[0], "synced", shift)
    for num_ranks in (2, 4, 8):
        same(split(monkeypatch, num_ranks, "synced", shift), whole)


def test_reference_depends_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing."""
    whole, _ = rank_losses(shares(1)[0], "reference", 0.0)
    eight, _ = split(monkeypatch, 8, "reference", 0.0)
    for name in ("ld/main", "ld/vlr"):
        assert_close(whole[name].detach(), 8 * eight[name], rtol=1e-5, atol=0)
    synced, _ = split(monkeypatch, 8, "synced", 0.0)
    for name in ("ld/main", "ld/vlr"):
        assert_close(synced[name], eight[name], rtol=1e-6, atol=0)
    assert abs(whole["kd/main"] / eight["kd/main"] - 1) > 0.01
    assert synced["kd/main"].item() == pytest.approx(eight["kd/main"].item(), rel=0.1)  # one pairing, not all


def test_a_level_with_one_row_among_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of eight is occupied: one pair in four holds it, and none of its rows counts on another rank."""

    def work(images: range) -> Tensor:
        at = torch.tensor([images.index(3)] if 3 in images else [], dtype=torch.int64)
        where = Where(at, torch.ones(len(at)), torch.zeros_like(at), at, len(images), 5)
        return sum_of_level_means(torch.full((len(at),), 2.0), where, Normalizer("synced", ONE, ONE))

    for num_ranks in (1, 2, 4, 8):
        size = 8 // num_ranks
        parts = on_ranks(
            monkeypatch, num_ranks, lambda rank, size=size: work(range(8)[rank * size : (rank + 1) * size])
        )
        assert torch.stack(parts).mean().item() == pytest.approx(2 / 4)


def worker(rank: int, port: int, folder: str) -> None:
    """One of two real processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    facts = (distributed.rank(), distributed.world_size(), distributed.is_main(), distributed.gather([rank, "x"]))
    value = torch.tensor([1.0 + rank], requires_grad=True)
    mean = distributed.reduce_mean(value)
    rows = distributed.gather_rows(value * torch.ones(2, 3))
    kept = value.item(), mean.item(), mean.requires_grad, rows.requires_grad, rows[:, 0].tolist(), tuple(rows.shape)
    distributed.barrier()
    losses, gradients = rank_losses(shares(2)[rank], "synced", 0.0)
    result = facts, kept, {name: loss.detach() for name, loss in losses.items()}, gradients
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def test_two_real_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    results = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    everything = [0, "x", 1, "x"]
    assert [facts for facts, *_ in results] == [(0, 2, True, everything), (1, 2, False, everything)]
    assert [kept for _, kept, *_ in results] == [
        (mine, 1.5, False, False, [1.0, 1.0, 2.0, 2.0], (4, 3)) for mine in (1.0, 2.0)
    ]
    found = mean_over_ranks([(losses, gradients) for *_, losses, gradients in results])
    same(found, rank_losses(shares(1)[0], "synced", 0.0))


def test_one_rank() -> None:
    value = torch.tensor([3.0])
    assert distributed.reduce_mean(value) is value
    assert distributed.gather_rows(value) is value
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather([1, 2]) == [1, 2]
    distributed.barrier()
