"""Images without annotations: what is read, what a batch says of them, and what is learnt from them."""

import os
import signal
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from datasets import image_dataset, write_image
from jobs import FROZEN, after_step, first_batch, losses_of, on_two_ranks, small_job
from PIL import Image
from torch.testing import assert_close

from ldctl import checkpoint, engine, evaluation
from ldctl.data import DataSpec, as_many_labelled, in_class_order, join, only_labelled, open_dataset, read_unlabelled
from ldctl.data.check import inspect
from ldctl.data.loader import train_batches
from ldctl.data.table import pack
from ldctl.errors import DataError, Interrupted, SpecError
from ldctl.losses import normalizer
from ldctl.models.detector import PostprocessSpec
from ldctl.models.pseudo import pseudo_objects
from ldctl.pairing import SharedClasses
from ldctl.regions import main_region
from ldctl.samples import Dataset, Sample
from ldctl.step import Lesson, assign_labelled, with_pseudo_objects
from ldctl.trainer import Job, Trainer
from ldctl.types import Batch, Pair, Scaled, Targets

LOW = 0.02  # the score of a teacher's best detections after some steps only


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return image_dataset(tmp_path_factory.mktemp("labelled"), [(40, 60), (60, 40), (50, 50), (40, 60)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generated images, which the tests' teacher has not seen, as files."""
    root = tmp_path_factory.mktemp("unlabelled")
    spec = DataSpec.model_validate_json('{"format": "synthetic", "synthetic": {"val": 6, "size": 64, "seed": 9}}')
    dataset = open_dataset(spec, "val")
    for sample in dataset.samples:
        Image.fromarray(dataset.read(sample).permute(1, 2, 0).numpy()).save(root / f"{sample.image_id}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    optim = {"kind": "adamw", "lr": 0.002, "base_batch": 4, "clip_norm": 10.0}
    spec = runs.plain_spec(run, train__epochs=8, train__eval_every=8, data__synthetic__train=20, train__optim=optim)
    engine.train_teacher(spec, quiet=True)
    return run / "last.safetensors"


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_whole_and_its_faults_are_named(tmp_path: Path, labelled: Dataset) -> None:
    write_image(tmp_path / "b.jpg", 64, 48)
    write_image(tmp_path / "below/a.PNG", 40, 80)
    write_image(tmp_path / "small.png", 200, 24)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    found = read_unlabelled(tmp_path, labelled)
    assert [(Path(sample.file).name, sample.width, sample.height) for sample in found.samples] == [
        ("b.jpg", 64, 48), ("a.PNG", 40, 80),
    ]  # fmt: skip
    assert all(not sample.is_labelled and len(sample.label) == 0 for sample in found.samples)
    assert (found.classes, found.name) == (labelled.classes, str(tmp_path))
    said = [str(fault).removeprefix(f"{tmp_path}/") for fault in found.faults]
    assert said[0].startswith("broken.jpg: not a readable image")
    assert said[1] == "small.png: a side is under 32 px: image skipped"
    assert len(said) == 2
    # the check of the image files covers them, too
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[:-200])
    checked = inspect(read_unlabelled(tmp_path, labelled))
    assert [Path(sample.file).name for sample in checked.dataset.samples] == ["a.PNG"]
    assert len(checked.faults) == 3
    assert not checked.dataset.samples[0].is_labelled


def test_a_folder_without_images_is_refused(tmp_path: Path, labelled: Dataset) -> None:
    with pytest.raises(DataError) as caught:
        read_unlabelled(tmp_path / "none", labelled)
    assert str(caught.value) == (
        f"{tmp_path}/none: no such folder: name a folder of images with data.unlabelled, or leave it out"
    )
    with pytest.raises(DataError) as caught:
        read_unlabelled(tmp_path, labelled)
    assert str(caught.value) == (
        f"{tmp_path}: no image to learn from: looked for .jpg, .jpeg, .png, .bmp, .webp, .tif, .tiff: see "
        "data.unlabelled"
    )


def same_images(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    return [(one.image_id, one.file, one.label.tolist()) for one in some] == [
        (one.image_id, one.file, one.label.tolist()) for one in others
    ]


def test_joined_and_parted(folder: Path, labelled: Dataset) -> None:
    both = join(labelled, read_unlabelled(folder, labelled))
    assert [sample.is_labelled for sample in both.samples] == [True] * 4 + [False] * 6
    assert same_images(only_labelled(both).samples, labelled.samples)
    assert only_labelled(both).fingerprint == labelled.fingerprint != both.fingerprint
    assert only_labelled(labelled) is labelled is as_many_labelled(labelled)
    as_many = as_many_labelled(both)
    assert same_images(as_many.samples, [*labelled.samples, *labelled.samples, *labelled.samples][:10])
    assert len({one.fingerprint for one in (labelled, both, as_many)}) == 3
    turned = in_class_order(both, ("b", "a"))
    assert [sample.is_labelled for sample in turned.samples] == [sample.is_labelled for sample in both.samples]
    # an image that nobody annotated is not one that was annotated as empty
    bare = pack(replace(sample, is_labelled=True) for sample in both.samples[4:])
    assert join(labelled, replace(both, samples=bare)).fingerprint != both.fingerprint


def test_generated_images_go_with_files(folder: Path) -> None:
    generated = open_dataset(DataSpec(format="synthetic"), "train")
    unlabelled = read_unlabelled(folder, generated)
    both = join(generated, unlabelled)
    for part, sample in ((generated, both.samples[0]), (unlabelled, both.samples[-1])):
        assert torch.equal(both.read(sample), part.read(sample))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_say_which_images_are_labelled(folder: Path, labelled: Dataset, workers: int) -> None:
    both = join(labelled, read_unlabelled(folder, labelled))
    spec = DataSpec(short_side=(64, 64), long_side=100, workers=workers)
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for batch in train_batches(both, spec, batch_size=5, seed=0, epoch=0):
        assert batch.is_labelled is not None
        for row, is_labelled in enumerate(batch.is_labelled.tolist()):
            kinds[is_labelled].append(batch.image_id[row])
            assert batch.targets.is_object[row].any() <= is_labelled
    assert sorted(kinds[True]) == [1000, 1001, 1002, 1003]
    assert sorted(kinds[False]) == list(range(6))
    assert all(batch.is_labelled is None for batch in train_batches(labelled, spec, batch_size=2, seed=0, epoch=0))
    alone = read_unlabelled(folder, labelled)
    assert not any(
        batch.is_labelled.any()
        for batch in train_batches(alone, spec, batch_size=3, seed=0, epoch=0)
        if batch.is_labelled is not None
    )


# --- losses ---------------------------------------------------------------------------------------------------------

TERMS = ("ld/main", "ld/vlr", "binary_kd/all")


def taught_job(teacher: Path, **values: object) -> Job:
    job = small_job(teacher, **FROZEN, **values)
    assert job.teaching
    job.detector.train()  # which keeps the norms still
    pseudo = PostprocessSpec(score_threshold=LOW, max_detections=1000)
    return replace(job, teaching=replace(job.teaching, pseudo=pseudo))


def part_of(batch: Batch, rows: slice) -> Batch:
    targets = Targets(*(value[rows] for value in vars(batch.targets).values()))
    return Batch(batch.images[rows], batch.size_hw[rows], batch.original_hw[rows], batch.image_id[rows], targets)


def lesson_of(job: Job, batch: Batch) -> Lesson:
    """Return what terms look at, where the teacher sees the student's images whatever its scale."""
    assert job.teaching
    assert batch.is_labelled is not None
    images = job.detector.normalize(batch.images, batch.size_hw)
    pair = Pair(job.detector(images), job.teaching.teacher(images))
    assigned = assign_labelled(job.detector, pair.student.locations, batch)
    main = main_region(pair.student, assigned)
    lesson = Lesson(pair, batch.targets, assigned, normalizer("synced", assigned, main))
    return with_pseudo_objects(lesson, job.detector, job.teaching, batch, batch.is_labelled, parts=1)


def half_labelled(batch: Batch) -> Batch:
    """Forget the objects of the last two of four images."""
    is_labelled = torch.tensor([True, True, False, False])
    targets = replace(batch.targets, is_object=batch.targets.is_object & is_labelled[:, None])
    return replace(batch, targets=targets, is_labelled=is_labelled)


def test_detection_losses_do_not_see_unlabelled_images(teacher: Path) -> None:
    job = taught_job(teacher)
    whole = first_batch(job)
    found, expected = losses_of(job, half_labelled(whole)), losses_of(job, part_of(whole, slice(2)))
    for name in ("qfl", "giou", "dfl"):
        assert expected[name] > 0
        assert_close(found[name], expected[name], rtol=1e-6, atol=0)


def test_terms_take_the_teachers_detections_for_objects(teacher: Path) -> None:
    """As if they had been annotated."""
    job = taught_job(teacher)
    assert job.teaching
    batch = half_labelled(first_batch(job))
    assert batch.is_labelled is not None
    assert job.teaching.pseudo
    dense = job.teaching.teacher(job.detector.normalize(batch.images, batch.size_hw))
    pseudo = pseudo_objects(dense, batch.size_hw, ~batch.is_labelled, job.teaching.pseudo)
    assert pseudo.is_object[2:].sum() > 2
    targets = Targets(*(torch.cat((getattr(batch.targets, key), getattr(pseudo, key)), dim=1) for key in vars(pseudo)))
    annotated = replace(batch, targets=targets, is_labelled=None)
    found, expected = losses_of(job, batch), losses_of(job, annotated)
    for name in TERMS:
        assert expected[name] > 0
        assert torch.equal(found[name], expected[name]), name
    assert found["qfl"] != expected["qfl"]
    nothing = replace(batch, targets=replace(targets, is_object=targets.is_object & False), is_labelled=None)
    assert losses_of(job, nothing)["ld/vlr"] == 0


def test_without_a_labelled_image_detection_losses_are_zero(teacher: Path) -> None:
    job = taught_job(teacher)
    batch = first_batch(job)
    nothing = replace(batch.targets, is_object=batch.targets.is_object & False)
    batch = replace(batch, targets=nothing, is_labelled=torch.zeros(4, dtype=torch.bool))
    job.detector.train()
    losses = Trainer(job).take_step(batch)
    assert [losses[name] for name in ("qfl", "giou", "dfl")] == [0, 0, 0]
    assert all(losses[name] > 0 for name in TERMS)
    parts = taught_job(teacher, train__accumulate=2)
    parts.detector.train()
    cut = Trainer(parts).take_step(batch)
    assert [cut[name] for name in ("qfl", "giou", "dfl")] == [0, 0, 0]
    for name in ("ld/main", "ld/vlr"):
        assert_close(cut[name], losses[name], rtol=1e-4, atol=0)


def test_boxes_of_a_teacher_at_another_scale_are_the_students(teacher: Path) -> None:
    job = taught_job(teacher)
    assert job.teaching
    batch = half_labelled(first_batch(job))
    one, two = (
        lesson_of(replace(job, teaching=replace(job.teaching, scale=scale)), batch).targets for scale in (1.0, 2.0)
    )
    most = batch.targets.gt_label.shape[1]
    assert torch.equal(two.gt_xyxy[:, most:] * 2, one.gt_xyxy[:, most:])
    assert torch.equal(two.gt_xyxy[:, :most], batch.targets.gt_xyxy)


def test_pseudo_objects_are_of_shared_classes(teacher: Path) -> None:
    """And labelled as the student counts."""
    job = taught_job(teacher)
    assert job.teaching
    batch = half_labelled(first_batch(job))
    most = batch.targets.gt_label.shape[1]
    whole = lesson_of(job, batch).targets
    shared = SharedClasses(torch.tensor([3, 0]), torch.tensor([0, 1]))
    some = lesson_of(replace(job, teaching=replace(job.teaching, shared=shared)), batch).targets
    is_found, is_pseudo = whole.is_object.clone(), some.is_object.clone()
    is_found[:, :most] = is_pseudo[:, :most] = False
    assert set(whole.gt_label[is_found].tolist()) == {0, 1, 2, 3}
    assert set(some.gt_label[is_pseudo].tolist()) == {3, 0}
    for own, other in ((3, 0), (0, 1)):
        ours = some.gt_xyxy[is_pseudo & (some.gt_label == own)]
        assert torch.equal(ours, whole.gt_xyxy[is_found & (whole.gt_label == other)])


ALL_TERMS = [
    {"kind": "ld"},
    {"kind": "ld", "region": "vlr"},
    {"kind": "kd"},
    {"kind": "binary_kd"},
    {"kind": "crosskd_cls"},
    {"kind": "crosskd_box"},
    {"kind": "pkd"},
    {"kind": "cwd"},
    {"kind": "cwd", "on": "cls"},
    {"kind": "imitation"},
    {"kind": "imitation", "region": "finegrained"},
]


def test_everything_at_once(teacher: Path) -> None:
    """A teacher at twice the size that shares half of the classes, in another order, and half of the images labelled.

    The order of the teacher's classes does not matter, whatever the term.
    """
    job = taught_job(teacher, distill__terms=ALL_TERMS, distill__cut=1)
    assert job.teaching
    batch = half_labelled(first_batch(job))
    twice = batch.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    batch = replace(batch, for_teacher=Scaled(twice, batch.size_hw * 2))
    shared = SharedClasses(torch.tensor([0, 2]), torch.tensor([3, 1]))
    teaching = replace(job.teaching, scale=2.0, shared=shared)
    losses = losses_of(replace(job, teaching=teaching), batch)
    assert len(losses) == 3 + len(ALL_TERMS)
    for name, loss in losses.items():
        assert 0 < loss < 1000, name
    turned = deepcopy(teaching.teacher)
    for name in ("weight", "bias"):  # classes 0, 1, 2, 3 become 2, 0, 3, 1
        values = getattr(turned.head.cls, name).data
        values.copy_(values[[1, 3, 0, 2]].clone())
    moved = SharedClasses(shared.student, torch.tensor([1, 0]))
    again = losses_of(replace(job, teaching=replace(teaching, teacher=turned, shared=moved)), batch)
    for name, loss in losses.items():
        assert_close(again[name], loss, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    wrong = losses_of(replace(job, teaching=replace(teaching, teacher=turned)), batch)
    assert abs(wrong["kd/main"] / losses["kd/main"] - 1) > 1e-3


# --- runs -----------------------------------------------------------------------------------------------------------


def with_more(folder: Path, **values: object) -> dict[str, object]:
    return {"data__unlabelled": str(folder), "distill__pseudo_score": LOW, **values}


def test_a_run_on_unlabelled_images_alone_learns(teacher: Path, folder: Path, tmp_path: Path) -> None:
    values = with_more(folder, data__unlabelled_only=True, train__epochs=15, train__eval_every=15, train__log_every=2)
    values["train__optim"] = {"kind": "adamw", "lr": 0.002, "base_batch": 4, "clip_norm": 10.0}
    engine.distill(runs.distill_spec(tmp_path / "run", teacher, **values), quiet=True)
    found = runs.trace(tmp_path / "run")
    assert all(record[name] == 0 for record in found for name in ("qfl", "giou", "dfl"))
    first, last = found[1], found[-1]
    for name in ("ld/vlr", "binary_kd/all"):
        assert last[name] < 0.8 * first[name], (name, first, last)
    best = tmp_path / "run/best.safetensors"
    assert checkpoint.load_meta(best).classes == ("disc", "box", "triangle", "cross")
    found_again = evaluation.evaluate(engine.eval_spec(best, {}, []), quiet=True).metrics
    assert found_again.ap == pytest.approx(checkpoint.load_meta(best).metrics["ap"], abs=1e-9)


def test_faults_of_unlabelled_images_are_told_before_the_first_step(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "more/0.png", 64, 64)
    cut = write_image(tmp_path / "more/1.png", 64, 64)
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "more/2.jpg").write_bytes(b"")
    engine.distill(
        runs.distill_spec(tmp_path / "run", teacher, **with_more(tmp_path / "more", train__epochs=1)), quiet=True
    )
    faults = (tmp_path / "run/data_faults.txt").read_text().splitlines()
    assert [fault.removeprefix(f"{tmp_path}/more/").split(":")[0] for fault in faults] == ["2.jpg", "1.png"]
    said = capsys.readouterr().err.splitlines()
    assert {f"data: {fault}" for fault in faults} <= set(said)
    assert f"unlabelled: 1 images from {tmp_path}/more" in said


def test_an_assistant_knows_the_datas_classes(teacher: Path, folder: Path, tmp_path: Path) -> None:
    """Whatever its teacher knows; and it sees the student's images at the student's scale."""
    loaded = checkpoint.load(teacher)
    other = loaded.meta.model_copy(update={"classes": ("Cross", "b", "c", "disc")})
    checkpoint.save(tmp_path / "other.safetensors", loaded.tensors, other)
    assistant = {"model": runs.MODEL, "train": {**runs.TRAIN, "epochs": 1}}
    values = with_more(folder, assistant=assistant, train__epochs=1, teacher__scale=2.0, teacher__classes={"box": "c"})
    spec = runs.distill_spec(tmp_path / "run", tmp_path / "other.safetensors", **values)
    results = engine.distill(spec, quiet=True)
    assert list(results) == ["assistant", "student"]
    for name in ("run", "run/assistant"):
        assert checkpoint.load_meta(tmp_path / name / "best.safetensors").classes == (
            "disc",
            "box",
            "triangle",
            "cross",
        )
    said = (tmp_path / "run/spec.toml").read_text().splitlines()
    assert said[2] == (
        "# classes: the teacher knows 3 of the data's 4: disc, box (its c), cross (its Cross); terms on classes leave "
        "out triangle"
    )
    again = engine.distill(spec, resume=True, quiet=True)
    assert {name: one.ap for name, one in again.items()} == {name: one.ap for name, one in results.items()}


def test_resumed_with_unlabelled_images_is_the_whole_run(
    teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = with_more(folder, train__ema={"warmup": 2}, train__save_every=2)
    engine.distill(runs.distill_spec(tmp_path / "whole", teacher, **values), quiet=True)
    assert runs.records(tmp_path / "whole")[-1]["step"] == 2 * 4  # 10 labelled images and 6 others, 4 at once
    spec = runs.distill_spec(tmp_path / "run", teacher, **values)
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            engine.distill(spec, quiet=True)
    engine.distill(spec, resume=True, quiet=True)
    runs.same(tmp_path / "run", tmp_path / "whole")


def test_two_ranks_are_one_rank_with_unlabelled_images(teacher: Path, folder: Path, tmp_path: Path) -> None:
    values = with_more(folder, train__epochs=1, train__log_every=1, **FROZEN)
    engine.distill(runs.distill_spec(tmp_path / "one", teacher, **values), quiet=True)
    spec = runs.distill_spec(tmp_path / "two", teacher, **values)
    assert on_two_ranks(lambda _: engine.distill(spec, quiet=True)) == [0, 0]
    for ours, theirs in zip(runs.trace(tmp_path / "two"), runs.trace(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-8)
        assert theirs["ld/vlr"] > 0


def test_the_plain_student_has_the_same_steps_on_labelled_images(
    teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = with_more(folder, train__epochs=1, train__log_every=1, compare=True)
    spec = runs.distill_spec(tmp_path / "run", teacher, **values)
    results = engine.distill(spec, quiet=True)
    assert list(results) == ["teacher", "plain", "student"]
    said = capsys.readouterr().err.splitlines()
    assert f"unlabelled: 6 images from {folder}" in said
    assert "plain: trains on the labelled images alone, for as many steps as the student" in said
    plain, student = (runs.records(tmp_path / name) for name in ("run/plain", "run"))
    assert [(record["phase"], record["step"]) for record in plain] == [
        (record["phase"], record["step"]) for record in student
    ]
    assert "unlabelled =" not in (tmp_path / "run/plain/spec.toml").read_text()
    again = engine.distill(spec, resume=True, quiet=True)
    assert {name: one.ap for name, one in again.items()} == {name: one.ap for name, one in results.items()}


def test_a_teacher_that_shares_no_class_says_nothing_of_unlabelled_images(
    teacher: Path, folder: Path, tmp_path: Path
) -> None:
    loaded = checkpoint.load(teacher)
    other = loaded.meta.model_copy(update={"classes": ("a", "b", "c", "d")})
    checkpoint.save(tmp_path / "other.safetensors", loaded.tensors, other)
    values = with_more(folder, distill__terms=[{"kind": "ld"}])
    with pytest.raises(SpecError) as caught:
        engine.distill(runs.distill_spec(tmp_path / "run", tmp_path / "other.safetensors", **values), quiet=True)
    assert str(caught.value) == (
        "data.unlabelled: what is in these images is what the teacher finds of the classes that it shares with the "
        "data, and it shares none: say which are the same with --set 'teacher.classes={...}', or leave it out"
    )
    assert not (tmp_path / "run").exists()
