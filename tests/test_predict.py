"""Batches on their way to the device."""

from collections.abc import Iterator

import pytest
import torch
from datasets import image_dataset
from torch.testing import assert_close

from ldctl.data import DataSpec
from ldctl.data.loader import train_batches
from ldctl.predict import on_device
from ldctl.samples import Dataset
from ldctl.types import Batch

SPEC = DataSpec(short_side=(200, 300), long_side=400, workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return image_dataset(tmp_path_factory.mktemp("images"), [(48, 64)] * 24)


def batches(dataset: Dataset) -> Iterator[Batch]:
    return train_batches(dataset, SPEC, batch_size=2, seed=0, epoch=0, teacher_scale=2.0)


def sums(batch: Batch) -> torch.Tensor:
    """Return what changes with every value of a batch that has come over."""
    assert batch.for_teacher is not None
    seen = (batch.images, batch.for_teacher.images, batch.size_hw, batch.original_hw, *vars(batch.targets).values())
    return torch.stack([(v.double().flatten() * torch.arange(v.numel(), device=v.device)).sum() for v in seen])


def test_batches_arrive_one_at_a_time(dataset: Dataset) -> None:
    drawn = []

    def noted() -> Iterator[Batch]:
        for batch in batches(dataset):
            drawn.append(batch.image_id)
            yield batch

    assert drawn == []
    for count, (moved, batch) in enumerate(zip(on_device(noted(), torch.device("cpu")), batches(dataset), strict=True)):
        assert len(drawn) == count + 1  # a run that stops has not waited for images that it does not use
        assert moved.image_id == batch.image_id
        assert torch.equal(sums(moved), sums(batch))


@pytest.mark.gpu
def test_copies_beside_computation_bring_every_value(dataset: Dataset) -> None:
    """While the GPU is busy, and its memory is given away as soon as the host lets go of a batch."""
    device = torch.device("cuda")
    expected = torch.stack([sums(batch) for batch in batches(dataset)])
    found = []
    for batch in on_device(batches(dataset), device):
        torch.cuda._sleep(20_000_000)  # cycles
        found.append(sums(batch))
    assert_close(torch.stack(found).cpu(), expected, rtol=1e-12, atol=0)
