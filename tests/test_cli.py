"""The command line: every help text and every message whole, exit codes, and that nothing is lost or overwritten."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import runs
import torch
from datasets import coco_document, write_coco

from ldctl import checkpoint, engine, evaluation, mmdet
from ldctl.checkpoint import CheckpointMeta
from ldctl.cli import main
from ldctl.metrics import TITLES, Metrics
from ldctl.models import Detector, HeadSpec, ModelSpec, ResNetSpec
from ldctl.types import Batch

HELP = Path(__file__).parent / "help"
COMMANDS = ("", "teacher", "teacher train", "teacher import", "teacher cache", "distill", "eval", "export")
SYNTHETIC = (
    "--device cpu --batch 4 --epochs 2 --set data.format=synthetic --set data.synthetic={train=10,val=3,size=64} "
    "--set data.short_side=[64,64] --set data.long_side=64 --set data.workers=0 --set train.log_every=1"
)
TINY = (
    "--init none --set {0}.backbone.width=0.125 --set {0}.backbone.depth=18 --set {0}.channels=32 "
    "--set {0}.head.num_convs=1"
)
PLAIN, STUDENT = (TINY.format(section) for section in ("model", "student"))
SAID = (
    "train: 10 images, 44 boxes, 4 classes from synthetic train\n"
    "val: 3 images, 12 boxes, 4 classes from synthetic val\n"
)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def ldctl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str], Ran]:
    """Run a command line in this process, in an empty folder; anything but an exit code is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    capfd.readouterr()

    def run(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ldctl", *shlex.split(line)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector after one epoch on four classes."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    engine.train_teacher(runs.plain_spec(folder, train__epochs=1), quiet=True)
    return folder / "best.safetensors"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_recorded_text(ldctl: Callable[[str], Ran], command: str) -> None:
    """`LDCTL_RECORD=1` records it anew."""
    ran = ldctl(f"{command} --help")
    path = HELP / f"{'_'.join(['ldctl', *command.split()])}.txt"
    if os.environ.get("LDCTL_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == path.read_text()


def test_every_command_has_a_recorded_help(ldctl: Callable[[str], Ran]) -> None:
    assert {path.stem for path in HELP.iterdir()} == {"_".join(["ldctl", *command.split()]) for command in COMMANDS}
    for text in (HELP / "ldctl.txt", HELP / "ldctl_teacher.txt"):
        found = [line.split()[0] for line in text.read_text().partition("Commands:\n")[2].splitlines()]
        prefix = text.stem.removeprefix("ldctl").strip("_")
        inside = {c.removeprefix(prefix).split()[0] for c in COMMANDS if c.startswith(prefix) and c != prefix}
        assert inside == set(found)


def cpu_seconds(code: str, compiled: Path) -> float:
    """Return the least CPU time of five runs of a program, whose compiled files a first run leaves in a folder."""
    # compiled files, as an installation has them
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": str(compiled),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    seconds = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds[1:])


SAY_HELP = """import sys
sys.argv = ["ldctl", "--help"]
from ldctl.cli import main
try:
    main()
finally:
    assert not {"torch", "numpy", "pydantic", "rich"} & set(sys.modules), "heavy"
"""


def test_help_costs_little_more_than_typer_and_loads_no_torch(tmp_path: Path) -> None:
    """A ratio, which holds on slow machines, too; the bound in seconds is the next test's."""
    assert cpu_seconds(SAY_HELP, tmp_path) < 2.5 * cpu_seconds("import typer", tmp_path)


@pytest.mark.bench
def test_help_answers_in_a_third_of_a_second(tmp_path: Path) -> None:
    assert cpu_seconds(SAY_HELP, tmp_path) < 0.3


def test_version_and_no_arguments(ldctl: Callable[[str], Ran]) -> None:
    ran = ldctl("--version")
    assert (ran.code, ran.out) == (0, "ldctl 0.1.0\n")
    ran = ldctl("distill --nonsense")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: ldctl distill [OPTIONS]\nTry 'ldctl distill -h' for help.\n")
    assert ldctl("teacher").code == 2


# --- what bad input gets --------------------------------------------------------------------------------------------


def test_every_fault_of_a_spec_at_once(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(
        '[train]\nepoch = 3\nbatch = "4"\n\n[student]\nchannels = 33\n\n[data]\nflip = 2\n'
    )
    ran = ldctl("distill --preset bad.toml --set distill.terms.0.wieght=1 --set train.accumulate=0.5 -o run")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        "error: bad.toml: teacher: no teacher: pass --teacher FILE, or say in [teacher.model] what to train first\n"
        "bad.toml:2: train.epoch: unknown key; did you mean 'epochs'?\n"
        "bad.toml:3: train.batch: expected a whole number or 'auto', given \"4\"\n"
        "bad.toml:6: student.channels: must be a multiple of 32, given 33\n"
        "bad.toml:9: data.flip: must be less than or equal to 1, given 2\n"
        "--set distill.terms.0.wieght=1: distill.terms.0.wieght: unknown key; did you mean 'weight'?\n"
        "--set train.accumulate=0.5: train.accumulate: expected a whole number, given 0.5\n"
    )
    assert not (tmp_path / "run").exists()


NO_DATA = (
    "error: nowhere: no such folder: put a COCO, VOC or YOLO data set there or name one with --data; "
    "`ldctl distill --preset quickstart` needs none\n"
)
STATE = "error: state.safetensors: a run's saved state, which only --resume reads: pass best.safetensors beside it\n"
MISTAKES = {
    "distill": (3, "error: teacher: no teacher: pass --teacher FILE, or say in [teacher.model] what to train first\n"),
    "distill --preset nope.toml": (3, "error: --preset nope.toml: no such file\n"),
    "distill --teacher none.safetensors": (
        5,
        "error: none.safetensors: no such file: check the path, or make one with `ldctl teacher train` or "
        "`ldctl teacher import`\n",
    ),
    "distill --teacher no/none.safetensors": (
        5, "error: no/none.safetensors: no such file, and no folder no: check the path\n",
    ),
    "distill --preset quickstart --set data.unlabelled=no/such": (
        4, "error: no/such: no such folder: name a folder of images with data.unlabelled, or leave it out\n",
    ),
    "distill --preset small": (
        5,
        "error: runs/small-teacher/best.safetensors: no such file: train it first with `ldctl teacher train --preset "
        "small-teacher`, or pass another file (`ldctl distill --teacher FILE`)\n",
    ),
    "distill --student r19": (
        3,
        "error: no backbone 'r19': did you mean r18? There are r18, r34, r50, r101, a network of torchvision, or "
        "timm:NAME\n",
    ),
    "teacher train --model R50": (
        3,
        "error: no backbone 'R50': did you mean r50? There are r18, r34, r50, r101, a network of torchvision, or "
        "timm:NAME\n",
    ),
    "teacher train --data broken.toml": (
        4,
        "error: broken.toml: a file, not a folder: name the data set's folder with --data, and an annotation file in "
        "it with data.train or data.val\n",
    ),
    "export state.safetensors": (5, STATE),
    "eval state.safetensors": (5, STATE),
    "distill --teacher state.safetensors": (5, STATE),
    "distill --teacher text.safetensors": (
        5, "error: text.safetensors: not a safetensors file: pass a file that `ldctl` wrote\n",
    ),
    "eval foreign.safetensors": (
        5,
        "error: foreign.safetensors: no metadata of ldctl, as other tools' files: pass a file that `ldctl` wrote\n",
    ),
    "export .": (5, "error: .: a folder, not a weights file: pass a file in it, as best.safetensors\n"),
    "teacher train --data nowhere": (4, NO_DATA),
    "teacher train --init none.pth {plain} --init none.pth {synthetic}": (
        5,
        SAID + "error: none.pth: no such file: pass --init the network's weights (.pth, .safetensors) or an ldctl "
        "checkpoint, or --init none\n",
    ),
    "teacher train --preset broken.toml": (3, "error: broken.toml:2:2: Expected '=' after a key in a key/value pair\n"),
    "teacher train {synthetic} {plain} --device nonsense": (
        9, "error: --device nonsense: not available here: use cpu, or check the driver and torch's build\n",
    ),
    "teacher train {synthetic} {plain} --device meta": (
        9, "error: --device meta: not available here: use cpu, or check the driver and torch's build\n",
    ),
    f"teacher train --seed {2**63} --epochs {10**18}": (
        3,
        f"error: command line: train.epochs: must be less than or equal to 1000000, given {10**18}\n"
        f"command line: train.seed: must be less than {2**63}, given {2**63}\n",
    ),
    f"teacher train {{synthetic}} {{plain}} -o {'x' * 300}": (
        7, f"error: {'x' * 300}/spec.toml: cannot be written (File name too long): choose another place\n",
    ),
    "teacher train {synthetic} {plain} --set train.accumulate=3": (
        3, "error: command line: train: batch 4 does not divide into 3 micro-batches (accumulate)\n",
    ),
    "teacher train {synthetic} {plain} --resume -o run": (
        7, "error: run: holds no run to resume: mend --output, or leave out --resume\n",
    ),
    "teacher train {synthetic} {plain} -o broken.toml": (
        7, "error: broken.toml: exists and holds something else: pass another --output\n",
    ),
    "teacher train {synthetic} {plain} -o text.safetensors": (
        7, "error: text.safetensors: exists already: pass another --output\n",
    ),
    "teacher train {synthetic} {plain} -o broken.toml/run": (
        7, "error: broken.toml/run: cannot be written (broken.toml is a file): pass another --output\n",
    ),
    "teacher import text.safetensors -o text.safetensors": (
        7, "error: text.safetensors: exists already: pass another --output\n",
    ),
    "teacher import none.pth -o new.safetensors": (
        5, "error: none.pth: no such file: pass the .pth of a GFL detector of mmdet\n",
    ),
    "distill --cache none.cache": (5, "error: none.cache: no such file: make one with `ldctl teacher cache`\n"),
    "distill --cache text.safetensors": (
        5, "error: text.safetensors: not a teacher's cache: pass a file that `ldctl teacher cache` wrote\n",
    ),
    "distill --cache none.cache --preset pkd": (
        3,
        'error: distill.terms.0: "pkd" looks at more than what the teacher says in the main region and the VLR, which '
        "is what a cache holds: leave the term out, or pass --preset ld-full or ld-main (small-ld-full or "
        "small-ld-main for small data)\n",
    ),
    "teacher cache none.safetensors": (
        5,
        "error: none.safetensors: no such file: check the path, or make one with `ldctl teacher train` or "
        "`ldctl teacher import`\n",
    ),
    "teacher cache text.safetensors -o broken.toml": (
        7, "error: broken.toml: exists already: pass another --output\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_line(ldctl: Callable[[str], Ran], tmp_path: Path, line: str) -> None:
    (tmp_path / "text.safetensors").write_text("some text that is longer than a header")
    (tmp_path / "broken.toml").write_text("a = 1\nb\n")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    checkpoint.save_state(tmp_path / "state.safetensors", {"a": torch.zeros(1)}, {})
    before = tree(tmp_path)
    ran = ldctl(line.format(synthetic=SYNTHETIC, plain=PLAIN))
    assert (ran.code, ran.err) == MISTAKES[line]
    assert ran.out == ""
    left = tree(tmp_path)
    assert {name: left[name] for name in before} == before
    assert set(left) - set(before) <= {
        "runs/teacher-r18/spec.toml",
        "runs/teacher-r18/.lock",
    }  # what the next attempt may overwrite


def test_a_run_that_failed_at_once_does_not_stand_in_the_way(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    assert ldctl(f"teacher train {SYNTHETIC} {PLAIN} --init none.pth -o run").code == 5
    ran = ldctl(f"teacher train {SYNTHETIC} {PLAIN} --epochs 1 -o run -q")
    assert ran.code == 0, ran.err
    assert (tmp_path / "run/best.safetensors").exists()


def test_a_missing_device(ldctl: Callable[[str], Ran]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ran = ldctl(f"teacher train {SYNTHETIC} {PLAIN} --device cuda")
    message = "error: --device cuda: not available here: use cpu, or check the driver and torch's build\n"
    assert (ran.code, ran.err) == (9, message)


def test_a_batch_that_ranks_cannot_share(ldctl: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    ran = ldctl(f"teacher train {SYNTHETIC} {PLAIN}")
    message = "error: train.batch 4 does not divide into 3 ranks x 1 micro-batches: make it a multiple of 3\n"
    assert (ran.code, ran.err) == (3, message)


def test_a_teacher_is_cached_and_a_student_distilled(
    ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path
) -> None:
    shutil.copy(teacher, tmp_path / "t.safetensors")
    recipe = "--preset ld-full " + SYNTHETIC.replace("--epochs 2 ", "")
    ran = ldctl(f"teacher cache t.safetensors {recipe} -q")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("t.cache: 20 views, 0.2 MB, ")
    assert ran.err.startswith("t.cache: 20 views, about 0.2 MB, ")
    again = ldctl(f"teacher cache t.safetensors {recipe}")
    assert (again.code, again.err) == (
        7,
        "error: t.cache: a finished cache already: pass it to `ldctl distill --cache` as it is, or another --output\n",
    )
    (tmp_path / "t.safetensors").unlink()  # nobody needs it any more
    ran = ldctl(f"distill --cache t.cache {recipe} {STUDENT} --epochs 1 -o run -q")
    assert ran.code == 0, ran.err
    said = f"; its file says AP {checkpoint.load_meta(teacher).metrics['ap']:.3f} for the same images\n"
    assert f"teacher: not loaded, all that it says is in t.cache{said}" in ran.err
    assert checkpoint.load_meta(tmp_path / "run/best.safetensors").teacher_sha256 == checkpoint.sha256(teacher)
    assert ldctl("distill --resume -o run -q").code == 0


def test_a_truncated_teacher(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    data = teacher.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    ran = ldctl(f"distill --teacher cut.safetensors {SYNTHETIC} {STUDENT} -o run")
    size = len(data)
    message = f"error: cut.safetensors: truncated ({size - 100} bytes of {size}): take another copy of the file\n"
    assert (ran.code, ran.err) == (5, message)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_needs_no_import(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    ran = ldctl(f"teacher import {teacher} -o new.safetensors")
    message = f"error: {teacher}: a checkpoint of ldctl already, which needs no import: use it as it is\n"
    assert (ran.code, ran.err) == (5, message)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_teacher_of_other_bins(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    ran = ldctl(f"distill --teacher {teacher} {SYNTHETIC} {STUDENT} --set student.head.reg_max=8 -o run")
    assert (ran.code, ran.err) == (
        3,
        f"error: {teacher}: the teacher has reg_max 16, the student 8, and distributions over different bins cannot be "
        "compared: pass --set student.head.reg_max=16\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_cut_beyond_the_teachers_head(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    """Before any data is read: there is none."""
    deep = STUDENT.replace("num_convs=1", "num_convs=4")
    terms = """--set 'distill.terms=[{kind="crosskd_cls"}]'"""
    ran = ldctl(f"distill --teacher {teacher} --data none {deep} {terms} -o run")
    assert (ran.code, ran.err) == (
        3,
        f"error: {teacher}: distill.cut is 3, but a head's towers have fewer layers (teacher 1, student 4): pass "
        "--set distill.cut=1, the largest that works\n",
    )
    assert not (tmp_path / "run").exists()


def small_coco(root: Path, classes: int = 2) -> Path:
    """A data set in COCO form, six images of 64 x 48 in each split, as a user may bring."""
    document = coco_document(6)
    if classes == 1:
        document["categories"] = [{"id": 1, "name": "cat"}]
        document["annotations"] = [entry | {"category_id": 1} for entry in document["annotations"]]  # type: ignore[operator]
    for split in ("train", "val"):
        write_coco(root, document, split, num_images=6)
    return root


SIZES = "--set data.short_side=[48,48] --set data.long_side=64 --set data.workers=0"


def test_a_teacher_of_other_classes(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    small_coco(tmp_path / "data")
    ran = ldctl(f"eval {teacher} --data data")
    assert (ran.code, ran.err) == (
        4,
        f"error: {teacher}: knows 4 classes, data/annotations/instances_val2017.json has 2: it lacks cat, dog, the "
        "data has no disc, box, triangle, cross: use a detector that was trained on these classes\n",
    )
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.write_bytes(b"no image")  # what class names alone decide is refused before an image is looked at
    line = f"distill --teacher {teacher} --data data {SIZES} {STUDENT} -o run"
    ran = ldctl(line)
    assert (ran.code, ran.err) == (
        3,
        'error: distill.terms.2: "binary_kd" compares class scores, but the teacher knows none of the data\'s classes '
        "(the data has cat, dog; the teacher disc, box, triangle, cross): say which are the same with --set "
        '\'teacher.classes={"cat"="..."}\', or keep to terms that do not look at classes with --set '
        '\'distill.terms=[{kind = "ld"}, {kind = "ld", region = "vlr", weight = 0.0625}]\'\n',
    )
    ran = ldctl(f"{line} --set teacher.classes.cow=disc")
    assert (ran.code, ran.err) == (
        3,
        'error: teacher.classes: the data has no cow: write student_name = "teacher\'s name", as the data spells it '
        "(cat, dog)\n",
    )
    ran = ldctl(f"{line} --set teacher.classes.cat=disk")
    assert (ran.code, ran.err) == (
        3,
        'error: teacher.classes: the teacher has no disk: write student_name = "teacher\'s name", as the teacher '
        "spells it (disc, box, triangle, cross)\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_knows_some_of_the_classes(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    small_coco(tmp_path / "data")
    common = f"--data data --device cpu --batch 4 --epochs 1 {SIZES} {STUDENT} -q"
    ran = ldctl(f"distill --teacher {teacher} {common} -o run --set teacher.classes.dog=box")
    assert ran.code == 0, ran.err
    said = "classes: the teacher knows 1 of the data's 2: dog (its box); terms on classes leave out cat"
    assert said in ran.err.splitlines()
    assert "teacher: its classes are not the data's, so its AP on these images is not known" in ran.err.splitlines()
    assert f"# {said}" in (tmp_path / "run/spec.toml").read_text().splitlines()
    assert "teacher" not in ran.out
    assert checkpoint.load_meta(tmp_path / "run/best.safetensors").classes == ("cat", "dog")
    assert ldctl("distill --resume -o run -q").code == 0
    # LD alone needs no class
    terms = "--set 'distill.terms=[{kind=\"ld\"}]'"
    ran = ldctl(f"distill --teacher {teacher} {common} -o ld {terms}")
    assert ran.code == 0, ran.err
    line = "classes: the teacher knows 0 of the data's 2: none; terms on classes leave out cat, dog"
    assert line in ran.err.splitlines()


def test_softmax_over_one_class(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    small_coco(tmp_path / "data", classes=1)
    ran = ldctl(f"teacher train --data data --device cpu --batch 4 --epochs 1 {SIZES} {PLAIN} -o teacher -q")
    assert ran.code == 0, ran.err
    line = f"distill --teacher teacher/best.safetensors --data data --device cpu --batch 4 --epochs 1 {SIZES} {STUDENT}"
    ran = ldctl(f"{line} -o run --set 'distill.terms.2={{kind=\"kd\"}}'")
    assert ran.code == 3
    assert ran.err.splitlines()[-1] == (
        'error: distill.terms.2: "kd" takes a softmax over classes, which says nothing of a single class: '
        "use --set 'distill.terms.2={kind=\"binary_kd\"}' or leave the term out"
    )
    assert not (tmp_path / "run").exists()
    ran = ldctl(f"{line} -o run -q --set 'distill.terms.2={{kind=\"binary_kd\"}}'")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no train split: looked for COCO's annotations/instances_train2017.json"),
        ('{"images": [', "annotations/instances_train2017.json: not valid JSON: Expecting value: line 1 column 13"),
        ('{"images": [], "annotations": [], "categories": []}', "no classes: there is nothing to detect"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "no image with a box to train on",
        ),
        ("[]", "not a COCO annotation file: list instead of an object"),
    ],
)
def test_bad_data(ldctl: Callable[[str], Ran], tmp_path: Path, content: str | None, message: str) -> None:
    """The messages whole: tests/test_formats.py."""
    (tmp_path / "data/annotations").mkdir(parents=True)
    if content:
        (tmp_path / "data/annotations/instances_train2017.json").write_text(content)
    ran = ldctl(f"teacher train --data data {PLAIN} -o run")
    assert ran.code == 4
    assert ran.err.startswith("error: data")
    assert ran.err.count("\n") == 1
    assert message in ran.err
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_named_and_left_out(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    small_coco(tmp_path / "data")
    for split in ("train", "val"):
        path = tmp_path / f"data/{split}2017/2.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "data/train2017/3.jpg").unlink()
    line = f"teacher train --data data --device cpu --batch 4 --epochs 1 {SIZES} {PLAIN} -o run -q"
    ran = ldctl(line)
    assert ran.code == 0, ran.err
    faults = (tmp_path / "run/data_faults.txt").read_text().splitlines()
    assert len(faults) == 3
    for file, fault in zip(
        ("train2017/2.jpg: image 12", "train2017/3.jpg: image 13", "val2017/2.jpg: image 12"), faults, strict=True
    ):
        assert fault.startswith(f"data/{file}: ")
        assert fault.endswith(": image skipped")
        assert f"data: {fault}\n" in ran.err
    assert "train: 4 images, 4 boxes, 2 classes from data/annotations/instances_train2017.json\n" in ran.err
    ran = ldctl("eval run/best.safetensors --json")
    assert ran.code == 0
    assert ran.err == f"data: {faults[2]}\n"


def test_an_output_that_holds_a_run(ldctl: Callable[[str], Ran], teacher: Path) -> None:
    before = tree(teacher.parent)
    for line in (f"teacher train {PLAIN}", f"distill --teacher {teacher} {STUDENT}"):
        ran = ldctl(f"{line} {SYNTHETIC} -o {teacher.parent}")
        message = f"error: {teacher.parent}: holds a run already: continue it with --resume, or pass another --output\n"
        assert (ran.code, ran.err) == (7, message)
    ran = ldctl(f"teacher train --resume -o {teacher.parent} --epochs 3 --set train.optim.lr=0.5 --set data.workers=1")
    assert (ran.code, ran.err) == (
        3,
        f"error: --resume: {teacher.parent}/spec.toml says otherwise: train.epochs: was 1, now 3; "
        "train.optim.lr: was 0.01, now 0.5: resume with the values that the run was started with\n",
    )
    assert tree(teacher.parent) == before


def test_differences_from_a_resumed_run_are_in_toml_and_no_more_than_ten(
    ldctl: Callable[[str], Ran], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.toml").write_text(ldctl(f"teacher train {SYNTHETIC} {PLAIN} -o run --dry-run").out)
    ran = ldctl("teacher train --resume -o run --set train.bf16=false --set model.backbone.init=a.pth")
    assert (ran.code, ran.err) == (
        3,
        'error: --resume: run/spec.toml says otherwise: model.backbone.init: was "none", now "a.pth"; '
        "train.bf16: was true, now false: resume with the values that the run was started with\n",
    )
    (folder / "spec.toml").write_text("".join(f"key{number} = 1\n" for number in range(12)))
    (tmp_path / "empty.toml").write_text("")
    ran = ldctl(f"teacher train --resume -o run --preset empty.toml {SYNTHETIC}")
    assert ran.err.count(": was ") == 10
    assert " keys more: resume with the values that the run was started with\n" in ran.err


def test_faults_of_a_file_that_serves_both_splits_are_told_once(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    small_coco(tmp_path / "data")
    (tmp_path / "data/train2017/3.jpg").unlink()
    both = " ".join(f"--set data.{split}=annotations/instances_train2017.json" for split in ("train", "val"))
    ran = ldctl(f"teacher train --data data --device cpu --batch 4 --epochs 1 {both} {SIZES} {PLAIN} -o run -q")
    assert ran.code == 0, ran.err
    assert ran.err.count("data: ") == 1
    assert len((tmp_path / "run/data_faults.txt").read_text().splitlines()) == 1


def test_a_spec_of_a_run_that_was_damaged(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    folder = tmp_path / "runs/teacher-r18"
    folder.mkdir(parents=True)
    (folder / "spec.toml").write_text("a = \n")
    ran = ldctl(f"teacher train --resume {SYNTHETIC} {PLAIN}")
    assert ran.code == 3
    assert ran.err.startswith("error: runs/teacher-r18/spec.toml: cannot be read (")
    assert ran.err.endswith("): restore it, or start a new run\n")
    assert ran.err.count("\n") == 1


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be a user who may not write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_without_permission(ldctl: Callable[[str], Ran], nobody: None) -> None:
    ran = ldctl(f"teacher train {SYNTHETIC} {PLAIN} -o /no_such_run")
    assert (ran.code, ran.err) == (
        7, "error: /no_such_run: cannot be written (no permission in /): pass another --output\n",
    )  # fmt: skip
    assert not Path("/no_such_run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which a run's files fit, but not a second state beside the first."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5500k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # this process holds the lock of a run there


def test_a_full_disk_loses_nothing(ldctl: Callable[[str], Ran], small_disk: Path, tmp_path: Path) -> None:
    line = f"teacher train {SYNTHETIC} {PLAIN} -q -o"
    ran = ldctl(f"{line} disk/run")
    assert ran.code == 7
    assert ran.err.splitlines()[-1] == (
        "error: disk/run/state.safetensors: cannot be written (No space left on device): free some space or choose "
        "another place; what was saved before is intact, --resume goes on"
    )
    left = sorted(path.name for path in (small_disk / "run").iterdir())
    assert left == [".lock", "best.safetensors", "last.safetensors", "metrics.jsonl", "spec.toml", "state.safetensors"]
    assert checkpoint.load_state(small_disk / "run/state.safetensors").values["step"] == 3
    checkpoint.load(small_disk / "run/last.safetensors")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert ldctl(f"{line} disk/run --resume").code == 0
    assert ldctl(f"{line} whole").code == 0
    runs.same(small_disk / "run", tmp_path / "whole")


# --- interruption ---------------------------------------------------------------------------------------------------


def slow_steps() -> None:
    from ldctl.trainer import Trainer

    original = Trainer.take_step

    def slow(self: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
        time.sleep(0.3)
        return original(self, batch)

    Trainer.take_step = slow  # type: ignore[method-assign]


def wait_for(process: BaseProcess, found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(
    ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    line = f"distill --teacher {teacher} {SYNTHETIC} {STUDENT} -o {tmp_path}/run"
    process = runs.start(runs.command, shlex.split(line), tmp_path / "log", slow_steps)
    log = tmp_path / "run/metrics.jsonl"
    wait_for(process, lambda: log.is_file() and log.read_text().count("\n") > 0)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    step = checkpoint.load_state(tmp_path / "run/state.safetensors").values["step"]
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == f"error: student: stopped at step {step} of 6; repeat the command with --resume"
    ran = ldctl(f"distill --resume -o {tmp_path}/run -q")  # nothing else has to be repeated
    assert ran.code == 0, ran.err
    steps = [record["step"] for record in runs.records(tmp_path / "run") if record["phase"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def hidden_from_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    slow_steps()


def test_a_run_started_by_nohup_goes_on(tmp_path: Path) -> None:
    line = f"teacher train {SYNTHETIC} {PLAIN} --epochs 1 -o {tmp_path}/run"
    process = runs.start(runs.command, shlex.split(line), tmp_path / "log", hidden_from_hangups)
    log = tmp_path / "run/metrics.jsonl"
    wait_for(process, lambda: log.is_file() and log.read_text().count("\n") > 0)
    assert process.pid
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == 0


def piped(arguments: list[str], log: Path, handle: int, setup: Callable[[], None]) -> None:
    """Run `ldctl` with its stderr going into a pipe that the parent reads."""

    def connect() -> None:
        os.dup2(handle, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.close(reader_of[handle])
        setup()

    runs.command(arguments, log, connect)


reader_of: dict[int, int] = {}  # pipes of this process, which a forked one inherits


def test_a_closed_pipe_stops_a_run_that_can_be_resumed(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    """As after `2>&1 | head -4`."""
    reader, writer = os.pipe()
    reader_of[writer] = reader
    line = f"teacher train {SYNTHETIC} {PLAIN} -o {tmp_path}/run"
    process = runs.start(piped, shlex.split(line), tmp_path / "log", writer, slow_steps)
    os.close(writer)
    with os.fdopen(reader) as output:
        while "step 1/" not in output.readline():
            pass
    process.join(60)
    assert process.exitcode == 141
    assert (tmp_path / "log").read_text() == ""
    step = checkpoint.load_state(tmp_path / "run/state.safetensors").values["step"]
    assert step < 6
    ran = ldctl(f"teacher train --resume -o {tmp_path}/run -q")
    assert ran.code == 0, ran.err
    assert ldctl(f"teacher train {SYNTHETIC} {PLAIN} -q -o {tmp_path}/whole").code == 0
    runs.same(tmp_path / "run", tmp_path / "whole")


def program(line: str, **streams: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own, with all that happens at its end."""
    code = f"import sys; sys.argv = ['ldctl', *{shlex.split(line)!r}]\nfrom ldctl.cli import main\nmain()"
    path = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, text=True, timeout=60, **streams
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("line", ["--help", "distill --preset quickstart --dry-run"])
def test_an_output_that_cannot_be_written(line: str) -> None:
    with Path("/dev/full").open("w") as full:
        ran = program(line, stdout=full, stderr=subprocess.PIPE)
        message = "error: stdout or stderr: cannot be written (No space left on device): choose another place\n"
        assert (ran.returncode, ran.stderr) == (7, message)
        assert program("distill --preset nope", stdout=full, stderr=full).returncode == 3
    reader, writer = os.pipe()
    os.close(reader)
    ran = program(line, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_errors_are_red_unless_the_user_wants_no_colour(
    ldctl: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr("typer.secho", lambda text, fg, err: said.append((text, fg, err)))
    ldctl("distill --preset nope.toml")
    monkeypatch.setenv("NO_COLOR", "1")
    ldctl("distill --preset nope.toml")
    text = "error: --preset nope.toml: no such file"
    assert said == [(text, "red", True), (text, None, True)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "),
            "a process that loads images was killed, probably because memory ran out: lower data.workers or --batch; a "
            "training run goes on with --resume --set data.workers=1",
        ),
        (MemoryError(), "out of memory: pass a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: pass a smaller --batch"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"),
            "no room for a batch in the memory that processes share (/dev/shm): lower --batch, the image size or "
            "data.workers (0 needs none of it), or enlarge it, as with docker run --shm-size=2g",
        ),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory"),
            "out of GPU memory: pass a smaller --batch, or --device cpu",
        ),
    ],
)
def test_memory_runs_out(
    ldctl: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engine, "train_teacher", fail)
    ran = ldctl("teacher train")
    assert (ran.code, ran.err) == (8, f"error: {message}\n")


def test_a_start_that_failed_while_it_was_computing_does_not_stand_in_the_way(
    ldctl: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ldctl.trainer import Trainer

    def fail(*_: object) -> None:
        raise MemoryError

    line = f"teacher train {SYNTHETIC} {PLAIN} --epochs 1 -o run -q"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", fail)
        assert ldctl(line).code == 8
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl", "spec.toml"]
    assert ldctl(line).code == 0


def test_two_processes_do_not_write_into_one_folder(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    line = f"teacher train {SYNTHETIC} {PLAIN} -o {tmp_path}/run"
    process = runs.start(runs.command, shlex.split(line), tmp_path / "log", slow_steps)
    log = tmp_path / "run/metrics.jsonl"
    wait_for(process, lambda: log.is_file() and log.read_text().count("\n") > 2)
    before = (tmp_path / "run/spec.toml").read_bytes()
    ran = ldctl(f"teacher train -o {tmp_path}/run --resume -q")
    message = f"error: {tmp_path}/run: another ldctl is writing here (pid {process.pid}): wait for it, or pass another "
    assert (ran.code, ran.err) == (7, f"{SAID}{message}--output\n")
    assert (tmp_path / "run/spec.toml").read_bytes() == before
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert ldctl(f"teacher train -o {tmp_path}/run --resume -q").code == 0


def sleepy_data() -> None:
    def sleep(*_: object, **__: object) -> None:
        print("reading", flush=True)
        time.sleep(60)

    engine.open_data = sleep  # type: ignore[assignment]


def test_interrupted_before_training(tmp_path: Path) -> None:
    line = f"teacher train {SYNTHETIC} {PLAIN} -o {tmp_path}/run"
    process = runs.start(runs.command, shlex.split(line), tmp_path / "log", sleepy_data)
    wait_for(process, lambda: (tmp_path / "log").is_file() and "reading" in (tmp_path / "log").read_text())
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert (tmp_path / "log").read_text() == "reading\nerror: interrupted\n"
    assert not (tmp_path / "run").exists()


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [f"teacher train {PLAIN}", f"distill --teacher t.safetensors --compare {STUDENT}"])
def test_a_printed_spec_loads_back(ldctl: Callable[[str], Ran], tmp_path: Path, command: str) -> None:
    ran = ldctl(f"{command} {SYNTHETIC} --seed 7 -o some/run --dry-run")
    assert (ran.code, ran.err) == (0, "")
    for said in ('output = "some/run"', "seed = 7", "epochs = 2", 'format = "synthetic"', "width = 0.125"):
        assert said in ran.out.splitlines()
    (tmp_path / "again.toml").write_text(ran.out)
    again = ldctl(f"{' '.join(command.split()[: 2 if 'train' in command else 1])} --preset again.toml --dry-run")
    assert again == ran
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.toml"]


def test_options_reach_the_spec(ldctl: Callable[[str], Ran]) -> None:
    out = ldctl("distill -t t.safetensors --student r34 --data d --init w.pth --epochs 3 --batch 8 --dry-run").out
    lines = out.splitlines()
    for said in ('path = "t.safetensors"', "depth = 34", 'path = "d"', 'init = "w.pth"', "epochs = 3", "batch = 8"):
        assert said in lines
    assert 'output = "runs/r34"' in lines
    for command, folder in (("quickstart", "quickstart"), ("pkd", "pkd"), ("pkd --student r18", "pkd-r18")):
        assert f'output = "runs/{folder}"' in ldctl(f"distill --preset {command} --dry-run").out.splitlines()


def test_batch_is_a_number_or_auto(ldctl: Callable[[str], Ran]) -> None:
    assert 'batch = "auto"' in ldctl("teacher train --batch auto --dry-run").out.splitlines()
    ran = ldctl("teacher train --batch many --dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith("Error: Invalid value for '--batch': 'many' is neither a whole number nor auto.\n")
    ran = ldctl("teacher train --batch 0 --set train.accumulate=2")
    message = "error: command line: train.batch: must be greater than or equal to 1, given 0\n"
    assert ran == Ran(3, "", message)
    ran = ldctl("teacher train --set train.batch=atuo")
    assert ran.err == (
        "error: --set train.batch=atuo: train.batch: expected a whole number or 'auto', given \"atuo\"; "
        "did you mean 'auto'?\n"
    )


def test_data_wins_over_a_generated_set(ldctl: Callable[[str], Ran], teacher: Path) -> None:
    assert 'format = "auto"' in ldctl("distill --preset quickstart --data d --dry-run").out.splitlines()
    kept = ldctl("distill --preset quickstart --data d --set data.format=synthetic --dry-run").out
    assert 'format = "synthetic"' in kept.splitlines()
    ran = ldctl(f"eval {teacher} --data nowhere")
    assert (ran.code, ran.err) == (4, NO_DATA)


def test_a_checkpoint_says_all_that_evaluation_needs(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    small_coco(tmp_path / "data")
    ran = ldctl(
        f"teacher train --data {tmp_path}/data --device cpu --batch 4 --epochs 1 {SIZES} {PLAIN} -o t.safetensors -q"
    )
    assert ran.code == 0, ran.err
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "t/best.safetensors").read_bytes()
    ran = ldctl("eval t.safetensors --json --save-detections found.json")
    assert (ran.code, ran.err) == (0, "")
    figures = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert {"ap", "ap50", "ap75", "ap_small", "ar100"} <= set(figures)
    assert set(figures["per_class"]) == {"cat", "dog"}
    speed = figures.pop("speed")
    assert speed["images_per_second"] > 0
    assert 0 < speed["latency_median_ms"] <= speed["latency_p95_ms"]
    assert (speed["batch"], speed["latency_height_px"], speed["latency_width_px"]) == (8, 64, 64)
    assert isinstance(json.loads((tmp_path / "found.json").read_text()), list)
    again = ldctl("eval t.safetensors --json --detections found.json")
    assert json.loads(again.out) == figures
    table = ldctl("eval t.safetensors -q")
    assert table.code == 0
    assert "AP75" in table.out
    assert "dog" in table.out
    assert "images/s, files to boxes, batch 8" in table.out
    assert "input 64 x 64 px" in table.out.splitlines()[-1]
    assert "latency" not in ldctl("eval t.safetensors -q --detections found.json").out


def test_evaluation_keeps_what_is_there(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("mine")
    ran = ldctl(f"eval {teacher} --save-detections found.json -q")
    message = "error: found.json: exists already: pass another --save-detections\n"
    assert (ran.code, ran.out, ran.err) == (7, "", message)
    assert (tmp_path / "found.json").read_text() == "mine"
    ran = ldctl(f"eval {teacher} --save-detections found.json/below.json -q")
    assert ran.code == 7
    assert "found.json/below.json: cannot be written" in ran.err


def test_export_keeps_what_is_there(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    for kind, name in (("mmdet", "mine.pth"), ("onnx", "mine.onnx")):
        (tmp_path / name).write_text("mine")
        ran = ldctl(f"export {teacher} --to {kind} -o {name}")
        assert (ran.code, ran.err) == (7, f"error: {name}: exists already: pass another --output\n")
        assert (tmp_path / name).read_text() == "mine"


def test_resume_refuses_other_data(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    for root, count in (("one", 3), ("other", 4)):
        for split in ("train", "val"):
            write_coco(tmp_path / root, coco_document(count), split, count)
    sizes = "--set data.short_side=[64,64] --set data.long_side=96 --set data.workers=0 --batch 2 --epochs 1 -q"
    assert ldctl(f"teacher train {PLAIN} {sizes} --data one -o run").code == 0
    ran = ldctl(f"teacher train {PLAIN} {sizes} --data other -o run --resume")
    assert ran.code == 5
    assert "run/state.safetensors: the run was started with other images, boxes or another teacher's file" in ran.err


def test_distill_writes_the_file_that_it_is_asked_for(
    ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path
) -> None:
    ran = ldctl(f"distill --teacher {teacher} {SYNTHETIC} {STUDENT} --epochs 1 -o student.safetensors -q")
    assert ran.code == 0, ran.err
    assert checkpoint.load(tmp_path / "student.safetensors").meta.teacher_sha256 == checkpoint.sha256(teacher)


def test_exports(ldctl: Callable[[str], Ran], teacher: Path, tmp_path: Path) -> None:
    ran = ldctl(f"export {teacher} --to mmdet -o student.pth")
    assert ran.code == 0, ran.err
    state = torch.load(tmp_path / "student.pth", weights_only=True)["state_dict"]
    assert ran.out == (
        f"student.pth: {len(state)} entries under mmdet's names; the backbone has 0.125 times the usual "
        "width, so mmdet needs a config with base_channels=8 in its backbone, and `ldctl teacher import` does not read "
        "it\n"
    )
    assert {"backbone.conv1.weight", "bbox_head.gfl_cls.weight"} <= set(state)
    ran = ldctl(f"export {teacher} --images 1 -o student.onnx --set postprocess.score_threshold=0.002")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("student.onnx: ")
    assert "checked on 1 images" in ran.out
    assert (tmp_path / "student.onnx").stat().st_size > 100_000


def test_an_export_without_the_data_is_checked_on_generated_images(ldctl: Callable[[str], Ran], teacher: Path) -> None:
    ran = ldctl(f"export {teacher} --images 2 --data nowhere -o student.onnx --set postprocess.score_threshold=0.002")
    assert (ran.code, ran.err) == (
        0,
        f"{NO_DATA.removeprefix('error: ')}checking the file on generated images instead\n",
    )
    assert "checked on 2 images" in ran.out


@pytest.mark.parametrize("columns", ["0", "1", "20"])
def test_tables_are_whole_on_any_terminal(capsys: pytest.CaptureFixture[str], columns: str) -> None:
    figures = dict.fromkeys(TITLES, 0.123)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", columns)
        evaluation.print_metrics({name: Metrics(**figures, per_class={}) for name in ("teacher", "plain", "student")})
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.count("0.123") for line in lines) == 3 * len(TITLES)
    assert all(any(title in line for line in lines) for title in (*TITLES.values(), "teacher", "plain", "student"))


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign() -> dict[str, torch.Tensor]:
    """A GFL detector with ResNet-18 and 20 classes, as mmdet writes it."""
    return mmdet.to_mmdet(Detector(ModelSpec(backbone=ResNetSpec(depth=18, init="none")), 20).state_dict(), "gfl")


def test_import(ldctl: Callable[[str], Ran], foreign: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": foreign}, tmp_path / "gfl.pth")
    ran = ldctl("teacher import gfl.pth -o gfl.safetensors")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "gfl.safetensors: GFL with ResNet-18, 20 classes, reg_max 16, 256 channels; "
        f"{len(foreign)} entries read, none left over\n"
    )
    meta = checkpoint.load_meta(tmp_path / "gfl.safetensors")
    assert meta.classes[:2] == ("aeroplane", "bicycle")
    assert ldctl("eval gfl.safetensors").err.startswith("error: data/coco: no such folder")
    names = [f"a class with a long name {number}" for number in range(20)]  # longer than a path can be
    ran = ldctl(f"teacher import gfl.pth -o named.safetensors --classes '{','.join(names)}'")
    assert ran.code == 0, ran.err
    assert checkpoint.load_meta(tmp_path / "named.safetensors").classes == tuple(names)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    assert ldctl("teacher import gfl.pth -o read.safetensors --classes names.txt").code == 0
    assert checkpoint.load_meta(tmp_path / "read.safetensors").classes == tuple(names)


@pytest.mark.parametrize("kind", ["gflv2", "atss", "fcos", "retina"])
def test_other_heads_to_mmdet_and_back(ldctl: Callable[[str], Ran], tmp_path: Path, kind: str) -> None:
    """Nothing in a file tells ATSS's from FCOS's head but the names of its layers."""
    head = HeadSpec.model_validate({"kind": kind, "num_convs": 1, "norm": "none" if kind == "retina" else "group"})
    model = ModelSpec(backbone=ResNetSpec(depth=18), head=head, channels=32)
    tensors = Detector(model, 2).state_dict()
    meta = CheckpointMeta(model=model.model_dump(mode="json"), classes=("a", "b"), short_side=64, long_side=64)
    checkpoint.save(tmp_path / "own.safetensors", tensors, meta)
    assert ldctl("export own.safetensors --to mmdet -o own.pth").code == 0
    ran = ldctl("teacher import own.pth -o back.safetensors --classes a,b")
    assert ran.code == 0, ran.err
    assert ran.out.startswith(
        f"back.safetensors: {mmdet.NAMES[kind]} with ResNet-18, 2 classes, reg_max 16, 32 channels;"
    )
    back = checkpoint.load(tmp_path / "back.safetensors")
    assert back.meta.model == model.model_dump(mode="json")
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in tensors.items())


def test_import_lists_all_that_does_not_fit(
    ldctl: Callable[[str], Ran], foreign: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = dict(foreign)
    del state["neck.fpn_convs.0.conv.bias"], state["bbox_head.scales.3.scale"]
    state["bbox_head.reg_conf.0.weight"] = torch.zeros(64, 20, 1, 1)
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(256, 64, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "gfl.pth")
    ran = ldctl("teacher import gfl.pth -o gfl.safetensors")
    assert (ran.code, ran.out) == (5, "")
    assert "missing: bbox_head.reg_conf.2.weight [1, 64, 1, 1]\n" in ran.err  # the layer makes it a GFLv2
    del state["bbox_head.reg_conf.0.weight"]
    state["bbox_head.more"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "gfl.pth")
    ran = ldctl("teacher import gfl.pth -o gfl.safetensors")
    assert (ran.code, ran.out) == (5, "")
    assert ran.err == (
        "error: gfl.pth: 4 entries do not fit a GFL detector with ResNet-18: nothing imported\n"
        "missing: bbox_head.scales.3.scale []\n"
        "missing: neck.fpn_convs.0.conv.bias [256]\n"
        "unexpected: bbox_head.more [2]\n"
        "shape: neck.lateral_convs.0.conv.weight is [256, 64, 1, 1], GFL's is [256, 128, 1, 1]\n"
    )
    assert not (tmp_path / "gfl.safetensors").exists()


def test_import_asks_for_classes(ldctl: Callable[[str], Ran], foreign: dict[str, torch.Tensor], tmp_path: Path) -> None:
    three = {**foreign, "bbox_head.gfl_cls.weight": torch.zeros(3, 256, 3, 3), "bbox_head.gfl_cls.bias": torch.zeros(3)}
    torch.save({"state_dict": three}, tmp_path / "gfl.pth")
    ran = ldctl("teacher import gfl.pth -o gfl.safetensors")
    message = "error: the file has 3 classes and does not name them: pass --classes a,b,c or a text file\n"
    assert (ran.code, ran.err) == (3, message)
    ran = ldctl("teacher import gfl.pth -o gfl.safetensors --classes a,b")
    assert (ran.code, ran.err) == (3, "error: --classes gives 2 different names, the file has 3 classes\n")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    for name in ("none.txt", "names.txt"):
        ran = ldctl(f"teacher import gfl.pth -o gfl.safetensors --classes {name}")
        assert ran.code == 3
        assert ran.err.startswith(f"error: --classes {name}: no text file (")
        assert ran.err.endswith("): pass a,b,c or a file of one name a line\n")
    assert not (tmp_path / "gfl.safetensors").exists()


def test_a_model_from_the_future(ldctl: Callable[[str], Ran], tmp_path: Path) -> None:
    meta = CheckpointMeta(model={"kind": "new"}, classes=("a",), short_side=64, long_side=64)
    checkpoint.save(tmp_path / "new.safetensors", {"a": torch.zeros(1)}, meta)
    ran = ldctl("eval new.safetensors")
    assert (ran.code, ran.err.splitlines()[-1]) == (
        5,
        "error: new.safetensors: holds a model that this version cannot build: update ldctl",
    )


def test_other_backbones_by_name(ldctl: Callable[[str], Ran]) -> None:
    """They take the place of the preset's; only the options given beside them are kept."""
    out = ldctl("distill -t t.safetensors -p ld-main --student mobilenet_v3_small --init none --dry-run").out
    table = out.partition("[student.backbone]\n")[2].partition("\n\n")[0].splitlines()
    assert table == [
        'kind = "torchvision"',
        'name = "mobilenet_v3_small"',
        'init = "none"',
        'norm = "trainable"',
        "frozen_stages = 0",
        "mean = [123.675, 116.28, 103.53]",
        "std = [58.395, 57.12, 57.375]",
    ]
    assert '\noutput = "runs/ld-main-mobilenet_v3_small"\n' in f"\n{out}"
    assert 'output = "runs/teacher-swin_t"\n' in ldctl("teacher train --model swin_t --dry-run").out
    refused = ldctl("teacher train --model mobilenet_v3 --dry-run")
    assert (refused.code, refused.err) == (
        3,
        "error: command line: model.backbone.name: torchvision has no classification network 'mobilenet_v3': did you "
        "mean 'mobilenet_v2'?\n",
    )


def test_mmdet_gets_resnets_only(ldctl: Callable[[str], Ran]) -> None:
    backbone = {"kind": "torchvision", "name": "mobilenet_v3_small", "init": "none"}
    detector = Detector(ModelSpec.model_validate({"backbone": backbone, "channels": 32, "head": {"num_convs": 1}}), 2)
    meta = CheckpointMeta(model=detector.spec.model_dump(mode="json"), classes=("a", "b"), short_side=64, long_side=64)
    checkpoint.save(Path("d.safetensors"), detector.state_dict(), meta)
    ran = ldctl("export d.safetensors --to mmdet")
    assert (ran.code, ran.err) == (
        5,
        "error: d.safetensors: the backbone is torchvision's mobilenet_v3_small, and mmdet's files are written for "
        "ResNets only: use --to onnx\n",
    )
    assert not Path("d.pth").exists()
