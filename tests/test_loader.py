"""Order, sharing among ranks, resuming, and what a batch holds."""

import multiprocessing
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import image_dataset

from ldctl.data import DataSpec
from ldctl.data.augment import eval_view, place, scaled, show, train_view
from ldctl.data.loader import (
    epoch_order,
    eval_batches,
    num_steps,
    train_batches,
    usable_workers,
    view_batches,
    view_plan,
)
from ldctl.data.table import pack
from ldctl.errors import DataError, SpecError
from ldctl.samples import Dataset, Sample
from ldctl.types import Batch

WIDE, TALL, SQUARE = (40, 60), (60, 40), (50, 50)
SPEC = DataSpec(short_side=(32, 64), long_side=100, workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """7 wide images, 4 tall and 2 square ones."""
    return image_dataset(tmp_path_factory.mktemp("images"), [WIDE] * 5 + [TALL] * 4 + [SQUARE] * 2 + [WIDE] * 2)


def batches(dataset: Dataset, spec: DataSpec = SPEC, **more: float) -> list[Batch]:
    options = {"batch_size": 4, "seed": 3, "epoch": 1} | more
    return list(train_batches(dataset, spec, **options))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.image_id == other.image_id
        for name in ("images", "size_hw", "original_hw"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for name in ("gt_xyxy", "gt_label", "is_object"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))


def bare(sizes_hw: list[tuple[int, int]]) -> Dataset:
    """Images without pixels or boxes."""
    nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.bool_))
    samples = pack(Sample(index, "x", height, width, *nothing) for index, (height, width) in enumerate(sizes_hw))

    def read(sample: Sample) -> torch.Tensor:
        raise DataError(f"{sample.file} has no pixels")

    return Dataset("bare", ("a",), (1,), samples, read, "")


def test_a_batch_holds_the_views_of_its_images(dataset: Dataset) -> None:
    by_id = {sample.image_id: (index, sample) for index, sample in enumerate(dataset.samples)}
    for batch in batches(dataset):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        assert batch.images.shape[2] - batch.size_hw[:, 0].max() < 32
        for row, image_id in enumerate(batch.image_id):
            index, sample = by_id[image_id]
            view = train_view(sample, SPEC, 3, 1, index)
            height, width = batch.size_hw[row].tolist()
            assert (height, width) == (view.height, view.width)
            assert torch.equal(batch.images[row, :, :height, :width], show(dataset.read(sample), view))
            assert batch.images[row, :, height:].sum() == batch.images[row, :, :, width:].sum() == 0
            assert batch.original_hw[row].tolist() == [sample.height, sample.width]
            found, count = place(sample, view), len(sample.label) - 1  # one is a crowd
            assert batch.targets.is_object[row].tolist() == [True] * count + [False] * (
                batch.targets.gt_label.shape[1] - count
            )
            assert torch.equal(batch.targets.gt_xyxy[row, :count], torch.from_numpy(found.xyxy))
            assert torch.equal(batch.targets.gt_label[row, :count], torch.from_numpy(found.label))
            assert batch.targets.gt_xyxy[row, count:].abs().sum() == 0


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_teacher_sees_the_same_views_at_its_own_scale(dataset: Dataset, scale: float) -> None:
    """Resized from the stored image, not from what the student sees; which stays what it is, but for its padding."""
    plain = batches(dataset)
    both = batches(dataset, teacher_scale=scale)
    assert all(side % 32 == 0 for batch in both for side in batch.for_teacher.images.shape[2:])
    cropped = []
    for one, other in zip(both, plain, strict=True):
        height, width = other.images.shape[2:]
        assert one.images[:, :, height:].sum() == one.images[:, :, :, width:].sum() == 0
        cropped.append(replace(one, images=one.images[:, :, :height, :width]))
    assert_same(cropped, plain)
    assert all(batch.for_teacher is None for batch in plain)
    by_id = {sample.image_id: (index, sample) for index, sample in enumerate(dataset.samples)}
    flips = set()
    for batch in both:
        seen = batch.for_teacher
        assert seen is not None
        assert [side / scale for side in seen.images.shape[2:]] == list(batch.images.shape[2:])
        for row, image_id in enumerate(batch.image_id):
            index, sample = by_id[image_id]
            view = scaled(train_view(sample, SPEC, 3, 1, index), scale)
            flips.add(view.is_flipped)
            height, width = seen.size_hw[row].tolist()
            assert (height, width) == (view.height, view.width)
            assert (abs(seen.size_hw[row] - scale * batch.size_hw[row]) <= 0.5).all()
            assert torch.equal(seen.images[row, :, :height, :width], show(dataset.read(sample), view))
            assert seen.images[row, :, height:].sum() == seen.images[row, :, :, width:].sum() == 0
    assert flips == {True, False}


def test_a_batch_without_objects_has_none(tmp_path: Path) -> None:
    dataset = image_dataset(tmp_path, [SQUARE] * 2, objects=0)  # crowds only
    (batch,) = batches(dataset, batch_size=2)
    assert batch.targets.gt_xyxy.shape == (2, 0, 4)
    assert batch.targets.is_object.shape == (2, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset: Dataset, workers: int) -> None:
    assert_same(batches(dataset), batches(dataset, SPEC.model_copy(update={"workers": workers})))


def test_the_runs_random_state_is_left_alone(dataset: Dataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(dataset)
    list(eval_batches(dataset, SPEC, batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_order_changes_with_seed_and_epoch_only(dataset: Dataset) -> None:
    assert_same(batches(dataset), batches(dataset))
    orders = {
        tuple(epoch_order(dataset, 4, seed, epoch, canvas=False).ravel().tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_ranks_share_the_same_global_batches(dataset: Dataset) -> None:
    whole = batches(dataset)
    for world_size in (2, 4):
        shares = [batches(dataset, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for rank, share in enumerate(shares):
                part, mine = share[step], slice(rank, None, world_size)
                assert part.image_id == batch.image_id[mine]
                assert torch.equal(part.images, batch.images[mine])  # padded alike, too
                assert torch.equal(part.size_hw, batch.size_hw[mine])
    with pytest.raises(SpecError, match="4 cannot be shared by 3 ranks"):
        batches(dataset, world_size=3)


def test_a_run_resumes_inside_an_epoch_without_reading_the_start(dataset: Dataset) -> None:
    whole = batches(dataset)
    for first in range(len(whole) + 1):
        read: list[int] = []

        def noted(sample: Sample, read: list[int] = read) -> torch.Tensor:
            read.append(sample.image_id)
            return dataset.read(sample)

        rest = batches(replace(dataset, read=noted), first_step=first)
        assert_same(rest, whole[first:])
        assert read == [image_id for batch in rest for image_id in batch.image_id]


GROUPS = [(7, 6, 4), (8, 4, 4), (3, 3, 4), (1, 0, 4), (0, 9, 4), (5, 5, 1), (100, 37, 16), (2, 1, 16), (15, 17, 16)]


@pytest.mark.parametrize(("wide", "other", "size"), GROUPS)
def test_an_epoch_shows_every_image_and_fills_every_batch(wide: int, other: int, size: int) -> None:
    dataset = bare([WIDE] * wide + [TALL, SQUARE] * (other // 2) + [TALL] * (other % 2))
    order = epoch_order(dataset, size, seed=1, epoch=2, canvas=False)
    assert order.shape == (num_steps(dataset, size, canvas=False), size)
    assert num_steps(dataset, size, canvas=False) == -(-(wide + other) // size)
    counts = Counter(order.ravel().tolist())
    assert sorted(counts) == list(range(wide + other))
    assert sum(counts.values()) - len(counts) < size
    if wide + other >= size:
        assert max(counts.values()) <= 2
    is_mixed = [len({index < wide for index in batch}) == 2 for batch in order.tolist()]
    leftovers = -(-(wide % size + other % size) // size)
    assert not any(is_mixed[leftovers:])
    assert leftovers <= 2


@pytest.mark.parametrize(("wide", "other", "size"), GROUPS)
def test_on_canvases_an_epoch_shows_every_image_and_mixes_none(wide: int, other: int, size: int) -> None:
    dataset = bare([WIDE] * wide + [TALL, SQUARE] * (other // 2) + [TALL] * (other % 2))
    order = epoch_order(dataset, size, seed=1, epoch=2, canvas=True)
    assert num_steps(dataset, size, canvas=True) == -(-wide // size) + -(-other // size) == len(order)
    counts = Counter(order.ravel().tolist())
    assert sorted(counts) == list(range(wide + other))
    assert all(len({index < wide for index in batch}) == 1 for batch in order.tolist())
    assert sum(counts.values()) - len(counts) == -wide % size + -other % size


def test_on_canvases_padding_follows_from_the_image_alone(dataset: Dataset) -> None:
    spec = SPEC.model_copy(update={"canvas": True})
    plain = {id_: batch for batch in batches(dataset) for id_ in batch.image_id}
    found = batches(dataset, spec)
    assert len(found) == num_steps(dataset, 4, canvas=True) == 4
    for batch in found:
        height, width = batch.images.shape[2:]
        assert (height, width) in ((64, 128), (128, 64))
        for row, image_id in enumerate(batch.image_id):
            original_height, original_width = batch.original_hw[row].tolist()
            assert (original_width > original_height) == (width > height)
            other = plain[image_id]
            slot = other.image_id.index(image_id)
            assert torch.equal(batch.size_hw[row], other.size_hw[slot])  # the same view
            seen_height, seen_width = batch.size_hw[row].tolist()
            pixels = other.images[slot, :, :seen_height, :seen_width]
            assert torch.equal(batch.images[row, :, :seen_height, :seen_width], pixels)
    assert_same(batches(dataset, spec.model_copy(update={"workers": 2})), found)
    assert_same(batches(dataset, spec, first_step=2), found[2:])
    shares = [batches(dataset, spec, rank=rank, world_size=2) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert [batch.image_id for batch in share] == [batch.image_id[rank::2] for batch in found]


def test_every_view_is_planned_once_and_batches_are_filled_up(dataset: Dataset) -> None:
    spec = SPEC.model_copy(update={"short_side": (64, 64), "canvas": True})
    plan = view_plan(dataset, 4, (False, True))
    views = [view for batch in plan for view in batch]
    assert sorted(views) == [(index, flip) for index in range(13) for flip in (False, True)]
    assert [len(batch) for batch in plan] == [4, 4, 4, 2, 4, 4, 4]
    for group, batch in zip(plan, view_batches(dataset, spec, plan, batch_size=4), strict=True):
        chosen = [group[slot % len(group)] for slot in range(4)]
        assert batch.image_id == tuple(dataset.samples[index].image_id for index, _ in chosen)
        for row, (index, is_flipped) in enumerate(chosen):
            sample = dataset.samples[index]
            view = replace(eval_view(sample, spec), is_flipped=is_flipped)
            pixels = batch.images[row, :, : view.height, : view.width]
            assert torch.equal(pixels, show(dataset.read(sample), view))
            found = place(sample, view)
            assert torch.equal(batch.targets.gt_xyxy[row, : len(found.label)], torch.from_numpy(found.xyxy))


def test_every_epoch_leaves_out_nobody() -> None:
    dataset = bare([WIDE] * 21 + [TALL] * 12)
    first = Counter(
        index for epoch in range(50) for index in epoch_order(dataset, 8, 0, epoch, canvas=False)[0].tolist()
    )
    assert len(first) == 33  # the mixed batch in front is not always the same images
    last = Counter(epoch_order(dataset, 8, 0, epoch, canvas=False)[-1, 0] < 21 for epoch in range(50))
    assert min(last.values()) >= 5  # nor do wide batches always come before the others


def test_evaluation_gives_every_image_once_over_all_ranks(dataset: Dataset) -> None:
    ids = [sample.image_id for sample in dataset.samples]
    for world_size in (1, 2, 3):
        shares = [
            list(eval_batches(dataset, SPEC, batch_size=3, rank=r, world_size=world_size)) for r in range(world_size)
        ]
        found = [image_id for share in shares for batch in share for image_id in batch.image_id]
        assert sorted(found) == ids
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_does_not_depend_on_the_batch_size(dataset: Dataset) -> None:
    def images(size: int, workers: int) -> dict[int, tuple[torch.Tensor, list[int], list[int]]]:
        spec = SPEC.model_copy(update={"workers": workers})
        return {
            image_id: (batch.images[row], batch.size_hw[row].tolist(), batch.original_hw[row].tolist())
            for batch in eval_batches(dataset, spec, batch_size=size)
            for row, image_id in enumerate(batch.image_id)
        }

    alone = images(1, 0)
    for size, workers in ((3, 0), (100, 2)):
        for image_id, (pixels, size_hw, original_hw) in images(size, workers).items():
            assert torch.equal(pixels, alone[image_id][0])  # of the same padded size, too
            assert (size_hw, original_hw) == alone[image_id][1:]
            assert min(size_hw) == 64
            assert max(pixels.shape[1] - size_hw[0], pixels.shape[2] - size_hw[1]) < 32


def test_evaluation_batches_carry_no_objects(dataset: Dataset) -> None:
    for batch in eval_batches(dataset, SPEC, batch_size=4):
        assert batch.targets.gt_xyxy.shape == (len(batch.image_id), 0, 4)
        assert batch.image_id == tuple(sorted(batch.image_id))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_from_any_process(tmp_path: Path, workers: int) -> None:
    dataset = image_dataset(tmp_path, [WIDE] * 3)
    file = dataset.samples[1].file
    Path(file).write_bytes(b"damaged")
    spec = SPEC.model_copy(update={"workers": workers})
    for run in (
        lambda: list(train_batches(dataset, spec, batch_size=1, seed=0, epoch=0)),
        lambda: list(eval_batches(dataset, spec, batch_size=1)),
    ):
        with pytest.raises(DataError) as caught:
            run()
        assert type(caught.value) is DataError
        assert str(caught.value).startswith(f"{file}: not a readable image")
        assert "\n" not in str(caught.value)


def test_no_more_workers_than_cores(dataset: Dataset, recwarn: pytest.WarningsRecorder) -> None:
    assert usable_workers(0) == 0
    assert usable_workers(1) == 1
    assert 1 <= usable_workers(10_000) < 10_000
    spec = SPEC.model_copy(update={"workers": 10_000})
    assert len(list(eval_batches(dataset, spec, batch_size=4))) > 0
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_the_last_step_is_the_last() -> None:
    dataset = bare([WIDE] * 100)
    with pytest.raises(DataError, match="has no pixels"):
        next(train_batches(dataset, SPEC, batch_size=16, seed=0, epoch=0, first_step=6))
    assert list(train_batches(dataset, SPEC, batch_size=16, seed=0, epoch=0, first_step=7)) == []


HANGS = """
import json, sys
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, {tests!r})
from datasets import image_dataset
from ldctl.data import DataSpec
from ldctl.data.loader import eval_batches
dataset = image_dataset(Path({folder!r}), [(48, 64)] * 40)
dataset = replace(dataset, read=lambda sample: 1 // 0)
for batch in eval_batches(dataset, DataSpec(short_side=(64, 64), long_side=96, workers=2), batch_size=1):
    pass
"""


def test_an_error_in_a_worker_does_not_leave_the_process_hanging(tmp_path: Path) -> None:
    code = HANGS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr


def test_a_generator_that_is_closed_ends_its_workers(dataset: Dataset) -> None:
    batches = train_batches(dataset, SPEC.model_copy(update={"workers": 2}), batch_size=1, seed=0, epoch=0)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
