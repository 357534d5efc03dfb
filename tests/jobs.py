"""Jobs of tiny training runs, one step of them, and runs on two ranks."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor

from ldctl.assemble import hire, make_job, open_data
from ldctl.data.loader import train_batches
from ldctl.losses import LossSpec
from ldctl.step import Learner, training_losses
from ldctl.trainer import Job, Trainer
from ldctl.types import Batch

FROZEN = {"student__backbone__norm": "frozen"}


def after_step(patch: pytest.MonkeyPatch, step: int, do: Callable[[], object]) -> None:
    """Do something at the end of an optimizer step."""
    original = Trainer.take_step

    def patched(self: Trainer, batch: Batch) -> dict[str, Tensor]:
        losses = original(self, batch)
        if self.step + 1 == step:
            do()
        return losses

    patch.setattr(Trainer, "take_step", patched)


def small_job(teacher: Path | None = None, **values: object) -> Job:
    """Return a job whose folder is not used."""
    folder = Path("/nonexistent/run")
    if teacher is None:
        plain = runs.plain_spec(folder, **values)
        return make_job(plain, "teacher", folder, plain.model, open_data(plain.data, torch.device("cpu"), quiet=True))
    spec = runs.distill_spec(folder, teacher, **values)
    setting = open_data(spec.data, torch.device("cpu"), quiet=True)
    return make_job(spec, "student", folder, spec.student, setting, hire(teacher, spec.distill, torch.device("cpu")))


def first_batch(job: Job) -> Batch:
    return next(train_batches(job.train_set, job.data, batch_size=job.train.batch, seed=0, epoch=0))


def losses_of(job: Job, batch: Batch) -> dict[str, Tensor]:
    return training_losses(Learner(job.detector, job.teaching), job.detector, job.teaching, batch, LossSpec())


def on_two_ranks(work: Callable[[int], object]) -> list[int | None]:
    """Run something in two processes that torchrun might have started; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)

    processes = [runs.start(as_rank, rank) for rank in range(2)]
    for process in processes:
        process.join(90)
        process.kill()
    return [process.exitcode for process in processes]
