"""Fixtures that every test file shares, and the table of deviations from the reference numbers."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# A forked process hangs in its first parallel loop when its parent had threads; one thread also sums in one order.
torch.set_num_threads(1)
# A process whose first backward pass comes after an export starts threads for it, and what it forks cannot train then.
# Where there is a GPU, the first one always does.
if not torch.cuda.device_count():
    torch.ones((), requires_grad=True).backward()
# A shell's background job starts with Ctrl-C ignored, and nohup ignores hanging up; the tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass
class Deviations:
    """How far results lie from reference numbers, for one table at the end of the test run.

    A test asks for the session fixture `deviations` and, for every reference file it checks, calls
    `deviations.record("decode: boxes, px", path.name, worst)`: `kind` says what was compared and in which unit,
    `file` which file it came from, `value` the largest deviation found there. Calls with the same kind and file keep
    the larger value. Recording asserts nothing: the test still compares with its own tolerance, after recording.
    """

    worst: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self, kind: str, file: str, value: float) -> None:
        """Note one deviation; a NaN counts as the largest."""
        files = self.worst.setdefault(kind, {})
        value = float("inf") if value != value else float(value)
        files[file] = max(files.get(file, 0.0), value)


DEVIATIONS = pytest.StashKey[Deviations]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEVIATIONS] = Deviations()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker process of pytest-xdist noted to the process that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deviations"] = session.config.stash[DEVIATIONS].worst


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: "WorkerController") -> None:
    """Add what a worker process noted; one that crashed hands over nothing."""
    for kind, files in getattr(node, "workeroutput", {}).get("deviations", {}).items():
        for file, value in files.items():
            node.config.stash[DEVIATIONS].record(kind, file, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    worst = config.stash[DEVIATIONS].worst
    if not worst:
        return
    terminalreporter.section("largest deviation from the reference numbers")
    width = max(map(len, worst))
    terminalreporter.write_line(f"{'kind':<{width}}  files  largest  where")
    for kind, files in sorted(worst.items()):
        where, value = max(files.items(), key=lambda item: item[1])
        terminalreporter.write_line(f"{kind:<{width}}  {len(files):>5}  {value:.1e}  {where if value else '-'}")


@pytest.fixture(scope="session")
def deviations(request: pytest.FixtureRequest) -> Deviations:
    """Collector of the final table; see `Deviations` for its use."""
    return request.config.stash[DEVIATIONS]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference numbers and real images beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared with reference numbers and images beside the checkout")
    return folder
