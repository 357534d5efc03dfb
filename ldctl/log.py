"""What a run tells: one JSON object per line in a file, and the same records on the terminal."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ldctl.errors import OutputError

Value = str | int | float | None

TITLES = {"images_per_second": "images/s", "memory_gb": "memory GB"}
SMOOTHING = 0.3  # weight of the newest interval in the mean time of a step


class MetricsLog:
    """Appends records to a JSON Lines file; a record is out of this process when `write` returns.

    Raises:
        OutputError: The file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(_unwritable(path, error)) from error

    def write(self, record: Mapping[str, Value]) -> None:
        """Append a flat record; null stands for NaN and infinity, which JSON does not have."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(_unwritable(self.path, error)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def truncate_after(path: Path, step: int, evaluated_step: int) -> None:
    """Drop the records past a step, which a run resumed from it writes again, and a half-written last line.

    Call it before a `MetricsLog` opens the file.

    Args:
        path: What a `MetricsLog` wrote; nothing happens where it does not exist.
        step: The last step to keep.
        evaluated_step: The last step whose evaluation to keep.

    Raises:
        OutputError: The file cannot be rewritten.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _is_kept(json.loads(line), step, evaluated_step)]
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise OutputError(_unwritable(path, error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: holds lines that are no records of a run; move it away and resume again") from error


def _is_kept(record: dict[str, Any], step: int, evaluated_step: int) -> bool:
    at = record["step"]
    return bool(at <= (evaluated_step if record.get("phase") == "eval" else step))


class _Terminal(Console):
    """A console whose reader may go away in the middle of a run."""

    def on_broken_pipe(self) -> None:
        """Fall silent instead of ending the process, as rich does: the signal that came with it stops the loop."""
        self.quiet = True


class Progress:
    """Shows a run on stderr: live bars on a terminal, otherwise a plain line now and then.

    Values arrive as plain numbers: nothing here waits for a device. Leaving its `with` block ends the live display.

    Args:
        num_steps: Optimizer steps of the whole run.
        num_epochs: Epochs of the whole run.
        first_step: Steps finished before this process started: above 0 when resumed.
        quiet: Show nothing; records are still made.
        every: Seconds between plain lines; the first and the last training record are always shown.
        console: Where to show; stderr if None.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        num_steps: int,
        num_epochs: int,
        *,
        first_step: int = 0,
        quiet: bool = False,
        every: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = {"epoch": num_epochs, "step": num_steps}
        self._quiet, self._every, self._clock = quiet, every, clock
        self._console = console or _Terminal(stderr=True)
        self._last_step, self._mark = first_step, clock()  # where the interval of the next training record starts
        self._shown = -math.inf
        self._step_seconds: float | None = None
        self._evaluation_start: float | None = None
        self._text = Text()
        self._bars = Bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self._console)
        self._steps = self._bars.add_task("train", total=num_steps, completed=first_step)
        self._images = self._bars.add_task("evaluate", total=None, visible=False)
        live = Live(console=self._console, get_renderable=lambda: Group(self._bars, self._text))
        self._live = live if _is_terminal(self._console) and not quiet else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()

    def train(
        self, *, epoch: int, step: int, images: int, data_seconds: float, values: Mapping[str, float]
    ) -> dict[str, Value]:
        """Show how training goes, and return the record of it.

        Args:
            epoch: The epoch under way, from 1.
            step: Optimizer steps finished, more than in the last call.
            images: Images seen since the last call, by all ranks.
            data_seconds: How long the loop waited for the loader since the last call.
            values: `lr`, the losses, `memory_gb` on a GPU, by name.

        Returns:
            `phase`, `epoch`, `step`, `values`, then `images_per_second` and `data_wait` (share of time in [0, 1]) since
            the last call, and `eta_s` for the run's remaining steps at their smoothed pace, all without evaluations.
        """
        now = self._clock()
        seconds = max(now - self._mark, 1e-9)  # a coarse clock may stand still
        pace = seconds / (step - self._last_step)
        self._step_seconds = pace + (1 - SMOOTHING) * ((self._step_seconds or pace) - pace)
        self._mark, self._last_step = now, step
        record: dict[str, Value] = {"phase": "train", "epoch": epoch, "step": step, **values}
        record |= {
            "images_per_second": round(images / seconds, 3),
            "data_wait": round(min(data_seconds / seconds, 1.0), 4),
            "eta_s": round((self._totals["step"] - step) * self._step_seconds, 1),
        }
        self._text = Text(self._line(record))
        self._bars.update(self._steps, completed=step)
        if not self._live:
            self._now_and_then(self._line(record), must=step == self._totals["step"])
        return record

    def evaluate(self, done: int, total: int) -> None:
        """Show how many images of an evaluation are done; call it with 0 first, to stop the clock of training."""
        if self._evaluation_start is None:
            self._evaluation_start = self._clock()
        self._bars.update(self._images, completed=done, total=total, visible=True)
        if not self._live:
            self._now_and_then(f"evaluate  image {done}/{total}")

    def evaluated(self, *, epoch: int, step: int, values: Mapping[str, float]) -> dict[str, Value]:
        """End an evaluation, show its figures and return the record: `phase` (`eval`), `epoch`, `step`, `values`."""
        if self._evaluation_start is not None:
            self._mark += self._clock() - self._evaluation_start
            self._evaluation_start = None
        self._bars.update(self._images, visible=False)
        record: dict[str, Value] = {"phase": "eval", "epoch": epoch, "step": step, **values}
        self.note(self._line(record))
        return record

    def gradients(self, *, epoch: int, step: int, shares: Mapping[str, float]) -> dict[str, Value]:
        """Show each loss's share of the gradient; return the record: `phase` (`gradient`), `epoch`, `step`, shares."""
        record: dict[str, Value] = {"phase": "gradient", "epoch": epoch, "step": step, **shares}
        self.note("gradient  " + "  ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        return record

    def note(self, text: str) -> None:
        """Print a line; on a terminal it stays above the bars."""
        if not self._quiet:
            try:
                self._console.print(Text(text), soft_wrap=True)
            except OSError:  # a display that cannot be written to is no reason to stop: the log file has it all
                self._quiet = True

    def _now_and_then(self, text: str, *, must: bool = False) -> None:
        """Print a line unless the last such line is less than `every` seconds old."""
        now = self._clock()
        if must or now - self._shown >= self._every:
            self._shown = now
            self.note(text)

    def _line(self, record: Mapping[str, Value]) -> str:
        """Return every field of a record on one line."""
        counts = {name: f"{name} {record[name]}/{total}" for name, total in self._totals.items()}
        return "  ".join(counts.get(name) or _shown(name, value) for name, value in record.items())


class PassProgress:
    """Shows one pass over many things on stderr: a live bar on a terminal, otherwise a plain line now and then.

    Args:
        title: What is being done.
        unit: What is counted.
        total: How many there are.
        first: How many were done before this process started.
        quiet: Show nothing.
        every: Seconds between plain lines; the last is always shown.
        console: Where to show; stderr if None.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        total: int,
        *,
        first: int = 0,
        quiet: bool = False,
        every: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._unit, self._total, self._first = title, unit, total, first
        self._every, self._clock, self._start, self._shown = every, clock, clock(), -math.inf
        self._console = console or _Terminal(stderr=True)
        self._console.quiet = quiet
        self._bars = Bars(TextColumn("{task.description}"), BarColumn(), console=self._console, disable=quiet)
        self._task = self._bars.add_task(title, total=total, completed=first)
        self._is_live = _is_terminal(self._console) and not quiet

    def __enter__(self) -> "PassProgress":
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bars.stop()

    def update(self, done: int) -> None:
        """Show how many are done, how many in a second since the start, and how long the rest will take."""
        now = self._clock()
        rate = (done - self._first) / max(now - self._start, 1e-9)  # a coarse clock may stand still
        rest = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown"
        said = f"{self._title}  {done}/{self._total}  {rate:.3g} {self._unit}/s  eta {rest}"
        if self._is_live:
            self._bars.update(self._task, description=said, completed=done)
        elif now - self._shown >= self._every or done == self._total:
            self._shown = now
            with contextlib.suppress(OSError):  # a display that cannot be written to is no reason to stop
                self._console.print(Text(said), soft_wrap=True)


def _is_terminal(console: Console) -> bool:
    # FORCE_COLOR makes rich take a file for a terminal; a CI log is one at times, but keeps every frame.
    return console.is_interactive and console.file.isatty() and not os.environ.get("CI")


def _shown(name: str, value: Value) -> str:
    """Return a field as people read it."""
    if not isinstance(value, (int, float)):
        return str(value)  # the phase
    if name == "eta_s":
        return f"eta {timedelta(seconds=round(value))}"
    if name == "data_wait":
        return f"data wait {value:.0%}"
    return f"{TITLES.get(name, name)} {value:.4g}"


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror}); free space or choose another output folder"
