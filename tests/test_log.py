"""Lines on the terminal and in metrics.jsonl, whole, with a clock that the test turns."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from ldctl.errors import OutputError
from ldctl.log import MetricsLog, PassProgress, Progress, truncate_after


@pytest.fixture(autouse=True)
def outside_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, *, quiet: bool = False, first_step: int = 0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=40)
    return Progress(40, 2, first_step=first_step, quiet=quiet, console=console, clock=clock), out


def tick(progress: Progress, clock: Clock, seconds: float, step: int, images: int = 20) -> dict[str, object]:
    clock.now += seconds
    return progress.train(
        epoch=1 + step // 21, step=step, images=images, data_seconds=0.5, values={"lr": 0.01, "qfl": 1.23456}
    )


# The file


def test_records_are_lines_flushed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"phase": "train", "step": 1, "qfl": 0.5, "ld/main": math.nan, "giou": math.inf, "kd": -math.inf})
    assert path.read_text() == (
        '{"phase": "train", "step": 1, "qfl": 0.5, "ld/main": null, "giou": null, "kd": null}\n'
    )
    log.write({"phase": "eval", "step": 1, "ap": None})
    log.close()
    again = MetricsLog(path)
    again.write({"step": 2})
    assert path.read_text().splitlines()[1:] == ['{"phase": "eval", "step": 1, "ap": null}', '{"step": 2}']
    again.close()


def test_unwritable_log(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    path = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(OutputError) as caught:
        MetricsLog(path)
    assert str(caught.value) == f"{path}: cannot be written (File exists); free space or choose another output folder"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk() -> None:
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(OutputError) as caught:
        log.write({"step": 1})
    assert str(caught.value) == (
        "/dev/full: cannot be written (No space left on device); free space or choose another output folder"
    )


def test_truncate_keeps_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}\n', '{"step": 2, "phase": "train"}\n', '{"step": 2, "phase": "eval"}\n', '{"step": 3}\n']
    path.write_text("".join(lines) + '{"step": 2, "qf')  # the process died in the middle of a line
    truncate_after(path, 2, 2)
    assert path.read_text() == "".join(lines[:3])
    assert list(tmp_path.iterdir()) == [path]
    truncate_after(path, 2, 1)  # the evaluation is still to be done
    assert path.read_text() == "".join(lines[:2])
    truncate_after(path, 0, 0)
    assert path.read_text() == ""


def test_truncate_without_a_log(tmp_path: Path) -> None:
    truncate_after(tmp_path / "metrics.jsonl", 5, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["loss 1.5\n", "{}\n", "5\n", '{"step": "1"}\n', b"\xff\n"])
def test_truncate_leaves_a_foreign_file_alone(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(OutputError) as caught:
        truncate_after(path, 5, 5)
    assert str(caught.value) == f"{path}: holds lines that are no records of a run; move it away and resume again"
    assert path.read_bytes() == before


# Plain lines


def test_plain_lines_of_a_run() -> None:
    clock = Clock()
    progress, out = plain(clock)
    with progress:
        tick(progress, clock, 2.0, step=10)  # shown: the first
        tick(progress, clock, 4.0, step=20)  # not shown: 4 s later
        progress.evaluate(0, 8)
        clock.now += 3.0
        progress.evaluate(4, 8)  # 7 s after the last line
        clock.now += 4.0
        progress.evaluate(8, 8)
        record = progress.evaluated(epoch=1, step=20, values={"ap": 0.41239, "ap_large": math.nan})
        progress.note("saved runs/r50/best.safetensors")
        tick(progress, clock, 5.0, step=30)
        clock.now += 1.0
        progress.train(
            epoch=2, step=40, images=20, data_seconds=9.0, values={"lr": 1e-5, "qfl": 1.0, "memory_gb": 7.25}
        )
    assert out.getvalue() == (
        "train  epoch 1/2  step 10/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:06\n"
        "evaluate  image 8/8\n"
        "eval  epoch 1/2  step 20/40  ap 0.4124  ap_large nan\n"
        "saved runs/r50/best.safetensors\n"
        "train  epoch 2/2  step 40/40  lr 1e-05  qfl 1  memory GB 7.25  images/s 20  data wait 100%  eta 0:00:00\n"
    )
    assert record["phase"] == "eval"
    assert {key: record[key] for key in ("epoch", "step", "ap")} == {"epoch": 1, "step": 20, "ap": 0.41239}


def test_record_has_the_fields_of_the_line() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    tick(progress, clock, 2.0, step=10)
    clock.now += 1.0  # training that no record has measured yet
    progress.evaluate(0, 8)
    clock.now += 50.0
    progress.evaluated(epoch=1, step=15, values={})
    assert tick(progress, clock, 3.0, step=20) == {
        "phase": "train",
        "epoch": 1,
        "step": 20,
        "lr": 0.01,
        "qfl": 1.23456,
        "images_per_second": 5.0,  # 20 images in 1 + 3 seconds
        "data_wait": 0.125,
        "eta_s": 5.2,  # 20 steps of 0.3 * 0.4 + 0.7 * 0.2
    }


def test_resumed_run_measures_its_own_steps() -> None:
    clock = Clock()
    progress, out = plain(clock, first_step=30)
    record = tick(progress, clock, 2.0, step=35)
    assert (record["images_per_second"], record["eta_s"]) == (10.0, 2.0)
    assert out.getvalue() == (
        "train  epoch 2/2  step 35/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:02\n"
    )


def test_long_eta() -> None:
    clock = Clock()
    out = io.StringIO()
    progress = Progress(87_960, 12, console=Console(file=out), clock=clock)
    tick(progress, clock, 1.0, step=2)
    assert out.getvalue().rstrip().endswith("eta 12:12:59")


def test_a_clock_that_stands_still() -> None:
    progress, _ = plain(Clock())
    record = progress.train(epoch=1, step=1, images=0, data_seconds=0.0, values={})
    assert (record["images_per_second"], record["eta_s"]) == (0.0, 0.0)


def test_quiet_shows_nothing_but_records() -> None:
    clock = Clock()
    progress, out = plain(clock, quiet=True)
    with progress:
        assert tick(progress, clock, 2.0, step=10)["images_per_second"] == 10.0
        progress.evaluate(8, 8)
        progress.evaluated(epoch=1, step=10, values={"ap": 0.5})
        progress.note("saved")
    assert out.getvalue() == ""


def test_plain_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    tick(Progress(40, 2, clock=clock), clock, 2.0, step=10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "train  epoch 1/2  step 10/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:06\n"
    )


# The live display


def live(clock: Clock, out: io.StringIO) -> str:
    """Run the same calls on what rich takes for a terminal; return what it received."""
    console = Console(file=out, width=120, force_terminal=True, force_interactive=True, no_color=True)
    with Progress(40, 2, console=console, clock=clock) as progress:
        tick(progress, clock, 2.0, step=10)
        progress.evaluate(4, 8)
        progress.evaluated(epoch=1, step=10, values={"ap": 0.5})
        tick(progress, clock, 2.0, step=40)
    return out.getvalue()


def test_live_display_ends_with_the_last_record() -> None:
    received = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", live(Clock(), Terminal())).replace("\r", "")
    lines = [line.rstrip() for line in received.splitlines()]
    assert "eval  epoch 1/2  step 10/40  ap 0.5" in lines
    assert lines[-2:] == [
        f"train {40 * '━'} 40/40",
        "train  epoch 2/2  step 40/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:00",
    ]


@pytest.mark.parametrize(("ci", "out"), [("true", Terminal()), ("", io.StringIO())], ids=["ci", "forced-color"])
def test_no_live_display_in_ci_nor_in_a_file(ci: str, out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    assert live(Clock(), out) == (
        "train  epoch 1/2  step 10/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:06\n"
        "eval  epoch 1/2  step 10/40  ap 0.5\n"
        "train  epoch 2/2  step 40/40  lr 0.01  qfl 1.235  images/s 10  data wait 25%  eta 0:00:00\n"
    )


def test_shown_records_are_what_the_log_holds(tmp_path: Path) -> None:
    clock = Clock()
    progress, _ = plain(clock)
    record = tick(progress, clock, 2.0, step=10)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(record)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record


# A pass over many things


def passed(clock: Clock, out: io.StringIO, **options: bool) -> str:
    console = Console(file=out, width=60, force_terminal=isinstance(out, Terminal), no_color=True)
    with PassProgress("cache", "views", 100, first=20, console=console, clock=clock, **options) as progress:
        for done in range(30, 101, 10):
            clock.now += 4
            progress.update(done)
    return out.getvalue()


def test_a_pass_tells_its_rate_and_what_is_left() -> None:
    """Every ten seconds, and at the end; what was done before counts in no rate."""
    assert passed(Clock(), io.StringIO()) == (
        "cache  30/100  2.5 views/s  eta 0:00:28\n"
        "cache  60/100  2.5 views/s  eta 0:00:16\n"
        "cache  90/100  2.5 views/s  eta 0:00:04\n"
        "cache  100/100  2.5 views/s  eta 0:00:00\n"
    )
    assert passed(Clock(), io.StringIO(), quiet=True) == ""
    assert passed(Clock(), Terminal(), quiet=True) == ""


def test_a_pass_on_a_terminal_is_one_line() -> None:
    received = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", passed(Clock(), Terminal()))
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", received)]
    assert [line for line in lines if line][-1].startswith("cache  100/100  2.5 views/s  eta 0:00:00 ━")


def test_a_pass_without_progress_so_far() -> None:
    out = io.StringIO()
    PassProgress("cache", "views", 5, console=Console(file=out), clock=Clock()).update(0)
    assert out.getvalue() == "cache  0/5  0 views/s  eta unknown\n"
