"""Train one detector: the loop, its saved state, and what stops it."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldctl import checkpoint, distributed
from ldctl.checkpoint import CheckpointMeta
from ldctl.data import DataSpec
from ldctl.data.loader import num_steps, train_batches
from ldctl.errors import CheckpointError, HungUp, Interrupted, OutputError, Terminated, TrainingError, Unread
from ldctl.log import MetricsLog, Progress, truncate_after
from ldctl.metrics import evaluate
from ldctl.models.detector import Detector, PostprocessSpec
from ldctl.optim import Ema, build_optimizer, load_optimizer_state, lr_factor, optimizer_state, scaled_lr, set_lr
from ldctl.predict import on_device, predict
from ldctl.samples import Dataset
from ldctl.spec import TrainSpec
from ldctl.step import Learner, Teaching, count_positive, gradient_shares, split, training_losses
from ldctl.types import Batch

STATE_FILE = "state.safetensors"
LAST_FILE = "last.safetensors"
BEST_FILE = "best.safetensors"
LOG_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: What the progress display calls it.
        folder: Where its files go.
        detector: What is trained; on `device`.
        teaching: From whom it learns, and what; none trains a plain detector.
        train: How to train.
        data: How to load images.
        postprocess: From predictions to final boxes.
        train_set: Images to train on.
        val_set: Images to evaluate on.
        meta: Metadata of a checkpoint, given its metrics.
        device: Where to train.
        quiet: No progress display.
    """

    name: str
    folder: Path
    detector: Detector
    teaching: Teaching | None
    train: TrainSpec
    data: DataSpec
    postprocess: PostprocessSpec
    train_set: Dataset
    val_set: Dataset
    meta: Callable[[dict[str, float]], CheckpointMeta]
    device: torch.device
    quiet: bool


@dataclass
class Interrupts:
    """Remembers a request to stop until the loop asks for it."""

    received: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Note the signal; the next one of its kind acts at once."""
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def stops() -> dict[int, type[Interrupted]]:
    """Return what a signal that asks to stop is reported as."""
    kinds = {"SIGINT": Interrupted, "SIGTERM": Terminated, "SIGHUP": HungUp, "SIGPIPE": Unread}
    return {int(getattr(signal, name)): kind for name, kind in kinds.items() if hasattr(signal, name)}


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Turn the signals of `stops` into a request that the loop honours after its step, while the context lasts."""
    handler = Interrupts()
    numbers = set(stops())
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # started by nohup
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield handler
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Trainer:
    """Trains the detector of a job, from the start or from its saved state.

    Attributes:
        step: Optimizer steps done.
        evaluated_step: The step at which the last evaluation ended.
        best_ap: AP of the best checkpoint.
        pending: Losses of the steps since the last record, which the next one averages.
        shares: Each loss's share of the gradient at the first step of an epoch, until it is recorded.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps_per_epoch = num_steps(job.train_set, job.train.batch_size, canvas=job.data.canvas)
        self.total_steps = self.steps_per_epoch * job.train.epochs
        self.learner = Learner(job.detector, job.teaching).to(job.device)
        modules = {"student": job.detector, "adapters": self.learner.adapters}
        self.optimizer = build_optimizer(job.train.optim, modules)
        self.ema = Ema(job.train.ema, job.detector) if job.train.ema else None
        self.step = 0
        self.evaluated_step = 0
        self.best_ap = -1.0
        self.pending: list[dict[str, Tensor]] = []
        self.shares: dict[str, float] = {}
        self.wrapped: nn.Module = self.learner
        if distributed.world_size() > 1:
            self.wrapped = DistributedDataParallel(self.learner)

    @property
    def evaluated(self) -> Detector:
        """Return the detector that is evaluated and saved: the moving average, if there is one."""
        if self.ema is None:
            return self.job.detector
        assert isinstance(self.ema.module, Detector)
        return self.ema.module

    def run(self) -> None:
        """Train to the last step, evaluating and saving on the way; does nothing where all that is done.

        Raises:
            Interrupted: A signal asked to stop; the state is saved.
            TrainingError: A loss is not finite, or memory ran out; what was saved before is intact.
            OutputError: A file cannot be written.
        """
        job = self.job
        if distributed.is_main():
            truncate_after(job.folder / LOG_FILE, self.step, self.evaluated_step)
        quiet = job.quiet or not distributed.is_main()
        with (
            interrupts() as stop,
            Progress(self.total_steps, job.train.epochs, first_step=self.step, quiet=quiet) as progress,
            closing(MetricsLog(job.folder / LOG_FILE if distributed.is_main() else Path(os.devnull))) as log,
        ):
            try:
                while self.step < self.total_steps:
                    self._train_epoch(stop, progress, log)
                    self._evaluate(stop, progress, log)
                if self.evaluated_step < self.step:  # resumed between the last step and its evaluation
                    self._evaluate(stop, progress, log)
            except torch.cuda.OutOfMemoryError as error:
                raise TrainingError(
                    f"{job.name}: out of GPU memory at step {self.step + 1}: go on with smaller micro-batches, "
                    f"--resume --set train.accumulate={2 * job.train.accumulate}"
                ) from error
            except OutputError as error:
                raise OutputError(f"{error}; what was saved before is intact, --resume goes on") from error

    def take_step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimizer step; return its losses, detached and still on the device."""
        job, train = self.job, self.job.train
        factor = lr_factor(train.schedule, self.step, self.steps_per_epoch, train.epochs)
        set_lr(self.optimizer, scaled_lr(train.optim, train.batch_size) * factor)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        parts = split(batch, train.accumulate)
        uses_bf16 = train.bf16 and job.device.type == "cuda"
        num_positive = count_positive(job.detector, batch) / len(parts) if len(parts) > 1 else None
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with self._gradients_reduced(is_last):
                losses = training_losses(
                    self.wrapped,
                    job.detector,
                    job.teaching,
                    part,
                    train.losses,
                    parts=len(parts),
                    num_positive=num_positive,
                    bf16=uses_bf16,
                )
                if index == 0 and self.step % self.steps_per_epoch == 0:
                    shares = gradient_shares(losses, job.detector).tolist()  # synchronises, once per epoch
                    self.shares = dict(zip(losses, shares, strict=True))
                    if wrong := ", ".join(name for name, share in self.shares.items() if not math.isfinite(share)):
                        raise self._diverged(f"the gradient of {wrong} is not finite at step {self.step + 1}")
                total = torch.stack(list(losses.values())).sum() / len(parts)
                torch.autograd.backward(total)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        if train.optim.clip_norm is not None:
            parameters = [p for p in self.learner.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(parameters, train.optim.clip_norm)
        self.optimizer.step()
        if self.ema:
            self.ema.update(job.detector)
        return sums

    def _train_epoch(self, stop: Interrupts, progress: Progress, log: MetricsLog) -> None:
        """Train to the end of the epoch, unless an evaluation is due first (resumed between the two)."""
        job, train = self.job, self.job.train
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        if first_step == 0 and self.step > self.evaluated_step and self._wants_evaluation():
            return
        self.wrapped.train()
        batches = train_batches(
            job.train_set,
            job.data,
            batch_size=train.batch_size,
            seed=train.seed,
            epoch=epoch,
            first_step=first_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            teacher_scale=job.teaching.scale if job.teaching else 1.0,
            cache=job.teaching.cache if job.teaching else None,
        )
        with closing(batches):
            self._take_steps(batches, epoch, stop, progress, log)

    def _take_steps(
        self, batches: Iterable[Batch], epoch: int, stop: Interrupts, progress: Progress, log: MetricsLog
    ) -> None:
        """Take a step with each batch; record, save and stop where that is due."""
        job, train = self.job, self.job.train
        unseen, waited, mark = 0, 0.0, time.monotonic()
        for batch in on_device(batches, job.device):
            waited += time.monotonic() - mark
            self.pending.append(self.take_step(batch))
            self.step += 1
            unseen += train.batch_size
            if self.shares:
                log.write(progress.gradients(epoch=epoch + 1, step=self.step, shares=self.shares))
                self.shares = {}
            is_last = self.step % self.steps_per_epoch == 0
            is_recorded = self.step % train.log_every == 0 or is_last or self.step == 1
            if is_recorded:
                values = self._mean_losses()  # synchronises, once per record
                values["lr"] = self.optimizer.param_groups[0]["lr"]
                if job.device.type == "cuda":
                    values["memory_gb"] = torch.cuda.max_memory_allocated(job.device) / 2**30
                record = progress.train(
                    epoch=epoch + 1, step=self.step, images=unseen, data_seconds=waited, values=values
                )
                log.write(record)
                self.pending, unseen, waited = [], 0, 0.0
            signal_number = _agreed(stop.received, is_recorded)
            if signal_number or is_last or self.step % train.save_every == 0:
                self._save_state()
            self._stop_if(signal_number)
            mark = time.monotonic()

    def _gradients_reduced(self, is_reduced: bool) -> AbstractContextManager[None]:
        """Average gradients over ranks in this backward pass, or leave that to a later one."""
        if is_reduced or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def _mean_losses(self) -> dict[str, float]:
        """Return the mean of each loss, and of their sum, over the pending steps and all ranks.

        Raises:
            TrainingError: One is not finite.
        """
        names = list(self.pending[0])
        means = distributed.reduce_mean(torch.stack([torch.stack([step[n] for n in names]) for step in self.pending]))
        values = dict(zip(names, means.mean(0).tolist(), strict=True))
        if not all(math.isfinite(value) for value in values.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise self._diverged(f"a loss is not finite by step {self.step} ({shown})")
        return {"loss": sum(values.values())} | values

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{self.job.name}: {what}: start anew with a lower train.optim.lr or with train.optim.clip_norm set; "
            "what was saved before is intact"
        )

    def _wants_evaluation(self) -> bool:
        """Return whether the spec asks for an evaluation after the epoch that just ended."""
        epoch = self.step // self.steps_per_epoch
        return epoch % self.job.train.eval_every == 0 or epoch == self.job.train.epochs

    def _evaluate(self, stop: Interrupts, progress: Progress, log: MetricsLog) -> None:
        """Evaluate, record and save the weights, if the spec asks for it after this epoch."""
        job = self.job
        if not self._wants_evaluation():
            return
        self._share_buffers()

        def on_batch(done: int, total: int) -> None:
            progress.evaluate(done, total)
            if distributed.world_size() == 1:  # else the other ranks would wait for this one
                self._stop_if(stop.received)

        detections = predict(
            self.evaluated,
            job.val_set,
            job.data,
            job.postprocess,
            batch_size=max(job.train.batch_size // distributed.world_size() // job.train.accumulate, 1),
            device=job.device,
            on_batch=on_batch,
        )
        metrics = evaluate(job.val_set, detections)
        self.evaluated_step = self.step
        figures = metrics.figures()
        log.write(progress.evaluated(epoch=self.step // self.steps_per_epoch, step=self.step, values=figures))
        is_best = not metrics.ap <= self.best_ap  # undefined where there are no objects: the latest is best then
        if is_best and not math.isnan(metrics.ap):
            self.best_ap = metrics.ap
        if distributed.is_main():
            weights = self.evaluated.state_dict()
            checkpoint.save(job.folder / LAST_FILE, weights, job.meta(figures))
            if is_best or not (job.folder / BEST_FILE).exists():
                checkpoint.save(job.folder / BEST_FILE, weights, job.meta(figures))
        self._save_state()
        distributed.barrier()  # the files are there when a rank goes on to read them

    def _stop_if(self, signal_number: int | None) -> None:
        if signal_number is None:
            return
        raise stops()[signal_number](
            f"{self.job.name}: stopped at step {self.step} of {self.total_steps}; repeat the command with --resume"
        )

    def _share_buffers(self) -> None:
        """Give every rank the running statistics of the first, which are the ones that are saved."""
        for module in (self.job.detector, self.ema.module if self.ema else None):
            if module is not None:
                distributed.broadcast([buffer for buffer in module.buffers() if buffer.is_floating_point()])

    def _save_state(self) -> None:
        """Write all that `load_state` needs to go on exactly from here.

        Raises:
            TrainingError: There is nothing worth saving: a loss or a weight is not finite.
            OutputError: The file cannot be written.
        """
        self._share_buffers()
        if self.pending:
            self._mean_losses()
        weights = self.learner.state_dict().values()
        if not torch.stack([value.isfinite().all() for value in weights]).all():  # synchronises, once per save
            raise self._diverged(f"a weight is not finite after step {self.step}")
        names = list(self.pending[0]) if self.pending else []
        pending = [distributed.reduce_mean(torch.stack([step[name] for name in names])) for step in self.pending]
        if not distributed.is_main():
            return
        moments, kind = optimizer_state(self.optimizer)
        tensors = {f"student/{name}": value for name, value in self.job.detector.state_dict().items()}
        tensors |= {f"adapters/{name}": value for name, value in self.learner.adapters.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
        if self.ema:
            tensors |= {f"ema/{name}": value for name, value in self.ema.module.state_dict().items()}
        tensors |= {f"pending/{index}": value for index, value in enumerate(pending)}
        values = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best_ap": self.best_ap,
            "ema_updates": self.ema.num_updates if self.ema else 0,
            "optimizer": kind,
            "pending": names,
            "learns_from": self._learns_from(),
        }
        checkpoint.save_state(self.job.folder / STATE_FILE, tensors, values)

    def _learns_from(self) -> list[str | None]:
        """Return the hashes of the data, of the teacher's file, and of the cache where that teaches in its place."""
        meta, teaching = self.job.meta({}), self.job.teaching
        cached = [teaching.cache.fingerprint] if teaching and teaching.cache else []
        return [meta.data_fingerprint, meta.teacher_sha256, *cached]

    def load_state(self) -> None:
        """Go on from the saved state.

        Raises:
            CheckpointError: The state is missing, damaged, or of another run.
        """
        path = self.job.folder / STATE_FILE
        state = checkpoint.load_state(path)
        if state.values["learns_from"] != self._learns_from():
            raise CheckpointError(
                f"{path}: the run was started with other images, boxes or another teacher's file: "
                "restore them, or start a new run with another --output"
            )
        student = below(state.tensors, "student")
        checkpoint.fit(student, shapes(self.job.detector), path)
        self.job.detector.load_state_dict(student)
        adapters = below(state.tensors, "adapters")
        checkpoint.fit(adapters, shapes(self.learner.adapters), path)
        self.learner.adapters.load_state_dict(adapters)
        load_optimizer_state(self.optimizer, below(state.tensors, "optimizer"), state.values["optimizer"])
        if self.ema:
            average = below(state.tensors, "ema")
            checkpoint.fit(average, shapes(self.ema.module), path)
            self.ema.module.load_state_dict(average)
            self.ema.num_updates = state.values["ema_updates"]
        self.step = state.values["step"]
        self.evaluated_step = state.values["evaluated_step"]
        self.best_ap = state.values["best_ap"]
        pending = below(state.tensors, "pending")
        names = state.values["pending"]
        self.pending = [
            dict(zip(names, pending[str(index)].to(self.job.device), strict=True)) for index in range(len(pending))
        ]


def _agreed(received: int | None, is_recorded: bool) -> int | None:
    """Return the signal at which to stop after this step.

    Several ranks agree on it, and only where they talk anyway: one that stopped by itself would leave the others
    waiting for its gradients.
    """
    if distributed.world_size() == 1:
        return received
    if not is_recorded:
        return None
    return next((number for number in distributed.gather([received]) if number is not None), None)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, without it."""
    return {k.removeprefix(f"{prefix}/"): value for k, value in tensors.items() if k.startswith(f"{prefix}/")}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's entries by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
