"""Run specs: defaults, combinations that are refused, presets by name, and the reference's configuration."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Deviations

from ldctl import preset_files, spec
from ldctl.classes import match_names
from ldctl.distill import CWD, KD, LD, PKD, BinaryKD, CrossKDBox, CrossKDClass, Imitation, Term
from ldctl.distillation import DistillationSpec
from ldctl.errors import SpecError
from ldctl.models.base import MEAN, STD
from ldctl.spec import DistillSpec, EvalSpec, TeacherSpec, TrainSpec


def load(*assignments: str) -> DistillSpec:
    return spec.load(DistillSpec, None, {"teacher.path": "t.safetensors"}, assignments)


def test_default_terms() -> None:
    terms = DistillationSpec().terms
    assert [term.name for term in terms] == ["ld/main", "ld/vlr", "binary_kd/all"]
    assert terms == (
        LD(region="main", weight=0.25, temperature=10.0),
        LD(region="vlr", weight=0.0625, temperature=10.0),
        BinaryKD(region="all", weight=1.0, beta=1.0),
    )
    assert (DistillationSpec().vlr, DistillationSpec().gamma, DistillationSpec().normalize) == ("diou", 0.25, "synced")
    assert load().distill == DistillationSpec()


def test_defaults_are_the_references_configuration(shared: Path, deviations: Deviations) -> None:
    path = shared / "oracle/mmdet_hyperparameters.json"
    theirs = json.loads(path.read_text())["ld/ld_r18-gflv1-r101_fpn_1x_coco.py"]
    head, train = theirs["model"]["bbox_head"], theirs["train_pipeline"]
    warmup, steps = theirs["param_scheduler"]
    ours = load("train.schedule.milestones=[8,11]")
    optimizer = theirs["optim_wrapper"]["optimizer"]
    pairs = [
        (ours.train.optim.kind.upper(), optimizer["type"]),
        (ours.train.optim.lr, optimizer["lr"]),
        (ours.train.optim.momentum, optimizer["momentum"]),
        (ours.train.optim.weight_decay, optimizer["weight_decay"]),
        (ours.train.optim.base_batch, theirs["auto_scale_lr"]["base_batch_size"]),
        (ours.train.epochs, theirs["train_cfg"]["max_epochs"]),
        (ours.train.eval_every, theirs["train_cfg"]["val_interval"]),
        (ours.train.schedule.warmup_steps, warmup["end"]),
        (ours.train.schedule.warmup_factor, warmup["start_factor"]),
        (ours.train.schedule.gamma, steps["gamma"]),
        (list(ours.train.schedule.milestones or ()), steps["milestones"]),
        (ours.train.losses.qfl, head["loss_cls"]["loss_weight"]),
        (ours.train.losses.dfl, head["loss_dfl"]["loss_weight"]),
        (ours.train.losses.giou, head["loss_bbox"]["loss_weight"]),
        (ours.student.head.reg_max, head["reg_max"]),
        (ours.student.head.num_convs, head["stacked_convs"]),
        (ours.student.channels, head["feat_channels"]),
        (ours.student.backbone.frozen_stages, theirs["model"]["backbone"]["frozen_stages"]),
        (ours.student.backbone.norm == "frozen", theirs["model"]["backbone"]["norm_eval"]),
        (list(MEAN), theirs["model"]["data_preprocessor"]["mean"]),
        (list(STD), theirs["model"]["data_preprocessor"]["std"]),
        (ours.postprocess.score_threshold, theirs["model"]["test_cfg"]["score_thr"]),
        (ours.postprocess.nms_iou, theirs["model"]["test_cfg"]["nms"]["iou_threshold"]),
        (ours.postprocess.candidates_per_level, theirs["model"]["test_cfg"]["nms_pre"]),
        (ours.postprocess.max_detections, theirs["model"]["test_cfg"]["max_per_img"]),
        ([ours.data.long_side, ours.data.short_side[1]], next(s["scale"] for s in train if s["type"] == "Resize")),
        (ours.data.flip, next(s["prob"] for s in train if s["type"] == "RandomFlip")),
    ]
    main = ours.distill.terms[0]
    assert isinstance(main, LD)
    pairs += [(main.weight, head["loss_ld"]["loss_weight"]), (main.temperature, head["loss_ld"]["T"])]
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    deviations.record("configuration: values that differ", path.name, len(wrong))
    assert wrong == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "train.accumulate=3",
            "--set train.accumulate=3: train: batch 16 does not divide into 3 micro-batches (accumulate)",
        ),
        ("train.epochs=0", "--set train.epochs=0: train.epochs: must be greater than or equal to 1, given 0"),
        (
            'distill.terms=[{kind="ld"},{kind="ld"}]',
            '--set distill.terms=[{kind="ld"},{kind="ld"}]: distill: two terms are called ld/main: '
            "give each region to a term once",
        ),
        (
            "distill.terms=[]",
            "--set distill.terms=[]: distill.terms: must not be empty",
        ),
        (
            "distill.terms.0.weight=0",
            "--set distill.terms.0.weight=0: distill.terms.0.weight: must be greater than 0, given 0",
        ),
        (
            "distill.terms.0.kind=pkdd",
            "--set distill.terms.0.kind=pkdd: distill.terms.0.kind: expected 'ld', 'kd', 'binary_kd', 'bckd_box', "
            "'crosskd_cls', 'crosskd_box', 'imitation', 'pkd' or 'cwd', given \"pkdd\"; did you mean 'pkd'?",
        ),
        (
            'teacher.classes={cat="animal", dog="animal"}',
            '--set teacher.classes={cat="animal", dog="animal"}: teacher.classes: the teacher\'s animal cannot stand '
            "for two classes: name each once",
        ),
        (
            "teacher.scale=1.5",
            "--set teacher.scale=1.5: teacher.scale: 1.5 times the student's size puts the teacher's locations at "
            "other places than the student's: take 0.5, 1 or 2",
        ),
        (
            "teacher.classes.cat=1",
            "--set teacher.classes.cat=1: teacher.classes.cat: expected text in quotes, given 1",
        ),
        (
            "student.backbone.depth=19",
            "--set student.backbone.depth=19: student.backbone.depth: expected 18, 34, 50 or 101, given 19",
        ),
    ],
)
def test_what_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(assignment)
    assert message in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ("data.unlabelled_only=true",),
            "--set data.unlabelled_only=true: data: unlabelled_only, but no such images: name their folder with --set "
            "data.unlabelled=DIR",
        ),
        (
            ("data.unlabelled=more", "data.unlabelled_only=true", "compare=true"),
            "compare trains a plain student, which cannot learn from images without annotations: leave out compare or "
            "data.unlabelled_only",
        ),
    ],
)
def test_images_without_annotations_do_not_go_with_everything(assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(*assignments)
    assert str(caught.value) == message


def test_images_without_annotations_need_a_teacher() -> None:
    unlabelled = {"data.unlabelled": "more"}
    with pytest.raises(SpecError) as caught:
        spec.load(TeacherSpec, None, unlabelled, [])
    assert str(caught.value) == (
        "data.unlabelled: only a teacher can say what is in images without annotations: use `ldctl distill`, or leave "
        "it out"
    )
    own = {**unlabelled, "teacher.model.backbone.depth": 18}
    spec.load(DistillSpec, None, own, [])
    with pytest.raises(SpecError) as caught:
        spec.load(DistillSpec, None, own, ["data.unlabelled_only=true"])
    assert str(caught.value) == (
        "data.unlabelled_only leaves no annotated image to train a teacher on: pass --teacher FILE, or leave it out"
    )


def test_a_teacher_sees_no_images_under_32_px() -> None:
    load("teacher.scale=0.5", "data.short_side=[64,80]")
    with pytest.raises(SpecError) as caught:
        load("teacher.scale=0.5", "data.short_side=[48,80]")
    assert str(caught.value) == (
        "teacher.scale 0.5 with data.short_side [48, 80] shows the teacher images under 32 px: pass --set "
        "teacher.scale=1, or larger images"
    )


def test_softmax_over_one_class_is_refused() -> None:
    both = DistillationSpec(terms=(LD(), KD()))
    one, two = (match_names(names, ("a", "b"), {}) for names in (("a", "c"), ("a", "b")))
    both.check_classes(two)
    DistillationSpec().check_classes(one)
    with pytest.raises(SpecError, match=r'^distill\.terms\.1: "kd" takes a softmax over classes'):
        both.check_classes(one)


@pytest.mark.parametrize(
    ("terms", "index", "kind", "left"),
    [
        ((LD(weight=0.5), BinaryKD()), 1, "binary_kd", '[{kind = "ld", weight = 0.5}]'),
        ((KD(), LD(region="vlr"), LD()), 0, "kd", '[{kind = "ld", region = "vlr"}, {kind = "ld"}]'),
        ((BinaryKD(),), 0, "binary_kd", '[{kind = "ld"}]'),
        ((PKD(), CWD(on="cls")), 1, "cwd", '[{kind = "pkd"}]'),
        ((CWD(), CrossKDClass()), 1, "crosskd_cls", '[{kind = "cwd"}]'),
        ((CrossKDBox(), Imitation(region="main")), 0, "crosskd_box", '[{kind = "imitation", region = "main"}]'),
        ((Imitation(region="gi"),), 0, "imitation", '[{kind = "ld"}]'),
    ],
)
def test_terms_on_classes_without_a_shared_class_are_refused(
    terms: tuple[Term, ...], index: int, kind: str, left: str
) -> None:
    none = match_names(("cat", "dog"), ("disc",), {})
    with pytest.raises(SpecError) as caught:
        DistillationSpec(terms=terms).check_classes(none)
    assert str(caught.value) == (
        f'distill.terms.{index}: "{kind}" compares class scores, but the teacher knows none of the data\'s classes '
        "(the data has cat, dog; the teacher disc): say which are the same with --set "
        '\'teacher.classes={"cat"="..."}\', or keep to terms that do not look at classes with --set '
        f"'distill.terms={left}'"
    )
    again = load(f"distill.terms={left}")
    again.distill.check_classes(none)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "student.head.reg_max=8",
            "the teacher has reg_max 16, the student 8, and distributions over different bins cannot be compared: "
            "pass --set student.head.reg_max=16",
        ),
        (
            "student.head.kind=fcos",
            'the teacher has a head "gfl", the student "fcos", whose locations lie half a stride apart, so "ld" would '
            "compare distances from different places: pass --set student.head.kind=gfl, or compare boxes instead: "
            """--set 'distill.terms=[{kind = "bckd_box"}, {kind = "binary_kd"}]'""",
        ),
        (
            "assistant.model.head.kind=fcos",
            'the teacher has a head "gfl", the assistant "fcos", whose locations lie half a stride apart, so "ld" '
            "would compare distances from different places: pass --set assistant.model.head.kind=gfl, or compare boxes "
            """instead: --set 'distill.terms=[{kind = "bckd_box"}, {kind = "binary_kd"}]'""",
        ),
        (
            'distill={cut=4,terms=[{kind="crosskd_box"}]}',
            "distill.cut is 4, but a head's towers have fewer layers (teacher 4, student 2): "
            "pass --set distill.cut=2, the largest that works",
        ),
    ],
)
def test_heads_that_cannot_be_compared(assignment: str, message: str) -> None:
    heads = ["teacher.model.backbone.depth=50", "student.head.num_convs=2"]
    assert spec.load(DistillSpec, None, {}, heads).distill == DistillationSpec()
    with pytest.raises(SpecError) as caught:
        spec.load(DistillSpec, None, {}, [*heads, assignment])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("terms", "kind", "options"),
    [
        (
            '[{kind="ld"},{kind="ld",region="vlr"},{kind="kd",weight=0.5},{kind="imitation",region="main"}]',
            "fcos",
            """--set 'distill.terms=[{kind = "bckd_box"}, {kind = "kd", weight = 0.5}, """
            """{kind = "imitation", region = "main"}]'""",
        ),
        (
            '[{kind="bckd_box",weight=2.0},{kind="ld"}]',
            "fcos",
            """--set 'distill.terms=[{kind = "bckd_box", weight = 2.0}]'""",
        ),
        (
            '[{kind="ld"},{kind="crosskd_cls"}]',
            "fcos",
            """--set 'distill.terms=[{kind = "bckd_box"}, {kind = "crosskd_cls"}]' --set distill.cut=2""",
        ),
        (
            '[{kind="ld"},{kind="binary_kd"}]',
            "retina",
            """--set 'distill.terms=[{kind = "crosskd_box"}, {kind = "crosskd_cls"}]' --set distill.cut=2""",
        ),
        (
            '[{kind="imitation"},{kind="pkd"}]',
            "retina",
            """--set 'distill.terms=[{kind = "imitation", region = "finegrained"}, {kind = "pkd"}]'""",
        ),
    ],
)
def test_terms_that_are_suggested_work(terms: str, kind: str, options: str) -> None:
    run = ["teacher.model.backbone.depth=50", "student.head.num_convs=2", f"student.head.kind={kind}"]
    with pytest.raises(SpecError) as caught:
        spec.load(DistillSpec, None, {}, [*run, f"distill.terms={terms}"])
    assert str(caught.value).endswith(f": {options}")
    pasted = [word for word in shlex.split(options) if word != "--set"]
    found = spec.load(DistillSpec, None, {}, [*run, *pasted])
    assert found.fault_of_heads(found.teacher.model) is None


@pytest.mark.parametrize(
    "assignments",
    [
        ["student.head.kind=atss"],
        ["student.head.kind=gflv2"],
        ["teacher.model.head.kind=fcos", "student.head.kind=fcos"],
        ["student.head.kind=fcos", 'distill.terms=[{kind="bckd_box"},{kind="binary_kd"}]'],
        ["student.head.kind=fcos", 'distill.terms=[{kind="crosskd_box"},{kind="crosskd_cls"}]'],
    ],
)
def test_heads_of_different_kinds_that_can_be_compared(assignments: list[str]) -> None:
    found = spec.load(DistillSpec, None, {}, ["teacher.model.backbone.depth=50", *assignments])
    assert found.fault_of_heads(found.teacher.model) is None


def test_a_teacher_comes_from_somewhere() -> None:
    message = "^teacher: no teacher: pass --teacher FILE, or say in [teacher.model] what to train first$"
    with pytest.raises(SpecError, match=re.escape(message[1:-1])):
        spec.load(DistillSpec, None, {}, [])
    own = ["teacher.model.backbone.depth=101"]
    with pytest.raises(SpecError) as caught:
        spec.load(DistillSpec, None, {}, [*own, "teacher.classes.cat=tabby"])
    assert str(caught.value) == (
        "--set teacher.model.backbone.depth=101: teacher: classes are named for a teacher's file: pass --teacher FILE, "
        "or leave out teacher.classes"
    )
    found = spec.load(DistillSpec, None, {}, own)
    assert found.teacher.model
    assert (found.teacher.path, found.teacher.model.backbone.depth) == (None, 101)
    assert found.teacher.train == TrainSpec()


def test_assignments_win_over_options_over_files(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[train]\nepochs = 1\nbatch = 2\nseed = 3\n")
    found = spec.load(TeacherSpec, str(file), {"train.batch": 4, "train.seed": 4}, ["train.seed=5"])
    assert (found.train.epochs, found.train.batch, found.train.seed) == (1, 4, 5)


def test_flags_are_left_as_they_are() -> None:
    flags = {"checkpoint": "x", "data": {"path": "a"}}
    found = spec.load(EvalSpec, None, flags, ["data.path=b", "data.flip=0.0"])
    assert found.data.path == "b"
    assert flags == {"checkpoint": "x", "data": {"path": "a"}}


def test_presets_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert preset_files.find_preset("quickstart") == preset_files.preset_folder() / "quickstart.toml"
    (tmp_path / "quickstart.toml").write_text("")
    assert preset_files.find_preset(str(tmp_path / "quickstart.toml")) == tmp_path / "quickstart.toml"
    names = ", ".join(preset_files.preset_names())
    with pytest.raises(SpecError) as caught:
        preset_files.find_preset("quick")
    assert (
        str(caught.value)
        == f"--preset quick: no such preset; did you mean quickstart? There are {names}, or give a .toml file"
    )
    with pytest.raises(SpecError, match=r"^--preset xyzzy: no such preset; there are bckd, "):
        preset_files.find_preset("xyzzy")
    with pytest.raises(SpecError) as caught:
        preset_files.find_preset(str(tmp_path))
    assert str(caught.value) == f"--preset {tmp_path}: a folder: give a .toml file in it, or the name of a preset"


def test_a_preset_of_another_command_is_refused() -> None:
    for cls, name, command in (
        (DistillSpec, "small-teacher", "ldctl teacher train"),
        (TeacherSpec, "small", "ldctl distill"),
    ):
        with pytest.raises(SpecError) as caught:
            spec.load(cls, name, {"output": "run"}, [])
        assert str(caught.value) == f"{preset_files.preset_folder()}/{name}.toml: this preset is for `{command}`"


def test_faults_of_items_are_not_told_twice() -> None:
    with pytest.raises(SpecError) as caught:
        spec.load(
            DistillSpec, None, {"teacher.path": "t"}, ['distill.terms=[{kind="ld",weight=-1},{kind="kd",weight=-1}]']
        )
    lines = str(caught.value).splitlines()
    assert [line.partition("]: ")[2] for line in lines] == [
        f"distill.terms.{index}.weight: must be greater than 0, given -1" for index in (0, 1)
    ]


def test_the_command_line_is_blamed_for_what_it_changed(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[train]\nbatch = 4\n\n[data]\nlong_side = 100\n")
    for flags, assignments in (({}, ["train.accumulate=3"]), ({"train.batch": 7}, ["train.accumulate=3"])):
        with pytest.raises(SpecError) as caught:
            spec.load(TeacherSpec, str(tmp_path / "own.toml"), flags, assignments)
        batch = flags.get("train.batch", 4)
        assert str(caught.value).splitlines() == [
            f"{tmp_path}/own.toml:4: data: short_side [800, 800] and long_side 100: needs 32 <= low <= high <= "
            "long_side",
            f"command line: train: batch {batch} does not divide into 3 micro-batches (accumulate)",
        ]


@pytest.mark.parametrize("key", ["output", "data.path"])
def test_empty_paths_are_refused(key: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec.load(TeacherSpec, None, {key: ""}, [])
    assert str(caught.value) == f"command line: {key}: must not be empty"


def test_endless_numbers_are_refused(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "own.toml").write_text(f"[train]\nseed = {digits}\n")
    for file, assignments in ((str(tmp_path / "own.toml"), []), (None, [f"train.seed={digits}"])):
        with pytest.raises(SpecError, match=r"a number of thousands of digits; mend it$"):
            spec.load(TeacherSpec, file, {}, assignments)


def test_installed_presets_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/only.toml").write_text("")
    monkeypatch.setattr(preset_files.resources, "files", lambda _: tmp_path)
    assert preset_files.preset_names() == ("only",)
