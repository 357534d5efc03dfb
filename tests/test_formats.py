"""Readers of COCO, VOC and YOLO data sets, what they find wrong, and images of every kind as RGB."""

import json
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import box, coco_document, write_coco, write_image
from PIL import Image
from pydantic import ValidationError

from ldctl.data import DataSpec, check_classes, in_class_order, open_dataset
from ldctl.data.images import read_image
from ldctl.data.raw import is_inside
from ldctl.data.yolo import parse_yaml
from ldctl.errors import DataError
from ldctl.samples import Dataset


def boxes_of(dataset: Dataset) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    return {
        Path(sample.file).name: sorted(
            (dataset.classes[label], tuple(xyxy))
            for label, xyxy in zip(sample.label.tolist(), sample.xyxy.tolist(), strict=True)
        )
        for sample in dataset.samples
    }


# --- real data --------------------------------------------------------------------------------------------------


def test_bccd_is_the_same_as_voc_and_as_coco(shared: Path) -> None:
    # its JSON already holds VOC's numbers less 1, so both readers must give the very same boxes
    root = shared / "data" / "bccd"
    per_class: Counter[str] = Counter()
    dropped = 0
    for name in ("train", "val", "test"):
        voc = open_dataset(DataSpec(path=str(root), format="voc", val=name), "val")
        coco = open_dataset(DataSpec(path=str(root), format="coco", val=name), "val")
        assert boxes_of(voc) == boxes_of(coco)
        assert len(voc.samples) == len((root / "ImageSets" / "Main" / f"{name}.txt").read_text().split())
        assert [fault.problem for fault in voc.faults] == [fault.problem for fault in coco.faults]
        dropped += len(coco.faults)
        for found in boxes_of(voc).values():
            per_class.update(label for label, _ in found)
    assert sum(per_class.values()) + dropped == 4888
    assert dropped == 2
    assert set(per_class) == {"RBC", "WBC", "Platelets"}


@pytest.mark.parametrize(
    ("name", "num_classes", "split", "num_images"),
    [("instances", 80, "val", 300), ("super", 12, "train", 1700), ("person", 1, "val", 300)],
)
def test_coco_person_is_found(shared: Path, name: str, num_classes: int, split: str, num_images: int) -> None:
    root = shared / "data" / "coco_person"
    file = f"annotations/{name}_{split}.json"
    dataset = open_dataset(DataSpec(path=str(root), train=file, val=file), split)
    assert (len(dataset.samples), len(dataset.classes)) == (num_images, num_classes)
    kept = sum(len(sample.label) for sample in dataset.samples)
    assert kept == len(json.loads((root / file).read_text())["annotations"]) - len(dataset.faults)
    sample = dataset.samples[0]
    assert dataset.read(sample).shape == (3, sample.height, sample.width)


def test_coco128_keeps_crowds_gaps_and_mask_areas(shared: Path) -> None:
    file = "annotations/instances.json"
    spec = DataSpec(path=str(shared / "data" / "coco128"), train=file, val=file)
    train, val = open_dataset(spec, "train"), open_dataset(spec, "val")
    assert (len(train.samples), len(val.samples)) == (126, 128)
    assert sum(int(sample.is_crowd.sum()) for sample in val.samples) == 10
    assert train.category_id[:13] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14)
    assert train.classes[11] == "stop sign"
    raw = json.loads((shared / "data" / "coco128" / file).read_text())
    first = next(entry for entry in raw["annotations"] if entry["image_id"] == val.samples[0].image_id)
    assert val.samples[0].area[0] == np.float32(first["area"])
    x, y, width, height = first["bbox"]
    np.testing.assert_allclose(val.samples[0].xyxy[0], (x, y, x + width, y + height), rtol=1e-6)


def test_a_split_without_the_usual_name_is_asked_for(shared: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(shared / "data" / "coco128")), "train")
    message = str(caught.value)
    assert "annotations/instances_train2017.json" in message
    assert "there is annotations/instances.json: name one with data.train" in message
    assert "\n" not in message


# --- COCO -------------------------------------------------------------------------------------------------------


def test_coco_reads_what_stands_there(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_document())
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert dataset.classes == ("cat", "dog")  # in the order of the ids, not of the file
    assert dataset.category_id == (1, 7)
    assert [sample.image_id for sample in dataset.samples] == [10, 11, 12]
    assert [sample.label.tolist() for sample in dataset.samples] == [[0], [1], [0]]
    assert dataset.samples[1].xyxy.tolist() == [[5, 5, 25, 15]]
    assert dataset.faults == ()
    assert Path(dataset.samples[1].file) == tmp_path / "train2017" / "1.jpg"


def test_all_faults_of_an_annotation_file_are_listed_at_once(tmp_path: Path) -> None:
    document = coco_document()
    document["images"] += [
        {"id": 10, "file_name": "2.jpg", "width": 64, "height": 48},
        {"id": 20, "file_name": "../secret.jpg", "width": 64, "height": 48},
        {"id": 21, "file_name": "/etc/passwd", "width": 64, "height": 48},
        {"id": "22", "file_name": "x.jpg", "width": 64, "height": 48},
        {"id": 23, "file_name": "x.jpg", "width": 0, "height": 48},
        "nonsense",
        {"id": 10**30, "file_name": "x.jpg", "width": 64, "height": 48},
    ]
    document["annotations"] += [
        box(200, 10, [float("nan"), 1, 10, 10]),
        box(201, 10, [1, 1, float("inf"), 10]),
        box(202, 10, [1, 1, -5, 10]),
        box(203, 10, [1, 1, 10, 0]),
        box(204, 10, [70, 1, 10, 10]),
        box(205, 10, [1, 1, 0.5, 10]),
        box(206, 10, [1, 1, 10, 10], area=0),
        box(207, 10, [50, 40, 30, 30]),
        box(208, 10, [1, 1, 10, 10], category=99),
        box(209, 99, [1, 1, 10, 10]),
        box(210, 10, [1, 1, 10]),
        box(211, 10, ["1", 1, 10, 10]),
        box(100, 10, [4, 5, 20, 10]),
        box(100, 11, [4, 5, 20, 10]),
        box(212, 20, [1, 1, 10, 10]),
        box(213, 10, [1e300, 1, 10, 10]),
        box(214, 10, [10**400, 1, 10, 10]),
        box(215, 10, [True, 1, 10, 10]),
        3,
        box(216, 10**30, [1, 1, 10, 10]),
        box(217, 10, [1, 1, 10, 10], iscrowd="no"),
        box(218, 11, [1, 1, 10, 10], iscrowd=True),
    ]
    write_coco(tmp_path, document)
    train = open_dataset(DataSpec(path=str(tmp_path)), "train")
    found = {fault.item.split(" of ")[0]: (fault.problem.split(" (")[0], fault.action) for fault in train.faults}
    drop, gone = "box dropped", "annotation dropped"
    assert found == {
        "image 10": ("2.jpg has the id of 0.jpg", "the second image skipped"),
        "image entry 4 (counted from 0)": (
            'file_name "../secret.jpg" is not a path inside the data set',
            "image skipped",
        ),
        "image entry 5 (counted from 0)": (
            'file_name "/etc/passwd" is not a path inside the data set',
            "image skipped",
        ),
        "image entry 6 (counted from 0)": ('its id "22" is not a whole number of at most 64 bits', "image skipped"),
        "image entry 7 (counted from 0)": ("width 0 and height 48 are not a size in pixels", "image skipped"),
        "image entry 9 (counted from 0)": (
            f"its id {10**30} is not a whole number of at most 64 bits",
            "image skipped",
        ),
        "image entry 8 (counted from 0)": ('"nonsense" is not an object', "image skipped"),
        "annotation 200": ("the box is not finite", drop),
        "annotation 201": ("the box is not finite", drop),
        "annotation 202": ("the box has no area", drop),
        "annotation 203": ("the box has no area", drop),
        "annotation 204": ("the box lies outside the image", drop),
        "annotation 205": ("the box is under 1 px wide or high", drop),
        "annotation 206": ("the object's area is not positive", drop),
        "annotation 207": ("the box reaches beyond the image", "kept; clipped in training"),
        "annotation 208": ("there is no category with id 99", gone),
        "annotation 209": ("there is no image with id 99", gone),
        "annotation 210": ("bbox [1, 1, 10] is not four numbers", gone),
        "annotation 211": ('bbox ["1", 1, 10, 10] is not four numbers', gone),
        "annotation 100": ("the id is used before", "kept"),
        "annotation 213": ("the box is not finite", drop),
        "annotation 214": ("the box is not finite", drop),
        "annotation 215": ("bbox [true, 1, 10, 10] is not four numbers", gone),
        "annotation entry 21 (counted from 0)": ("3 is not an object", gone),
        "annotation 217": ('iscrowd "no" is neither 0 nor 1', gone),
    }
    repeats = [fault.action for fault in train.faults if fault.item.startswith("annotation 100")]
    assert repeats == ["annotation dropped: it repeats the first", "kept"]
    assert [sample.is_crowd.tolist() for sample in train.samples] == [[False] * 2, [False, False, True], [False]]
    assert all("\n" not in str(fault) and str(tmp_path) in str(fault) for fault in train.faults)
    assert str(train.faults[-1]).startswith(
        f"{tmp_path}/annotations/instances_train2017.json: annotation 207 of 0.jpg: "
    )


def test_evaluation_keeps_what_cocos_evaluation_counts(tmp_path: Path) -> None:
    document = coco_document()
    document["images"].append({"id": 50, "file_name": "3.jpg", "width": 64, "height": 48})
    document["images"].append({"id": 51, "file_name": "4.jpg", "width": 31, "height": 48})
    document["annotations"] += [
        box(1, 10, [1, 1, 0.5, 10]),
        box(2, 11, [1, 1, 5, 5], area=0),
        box(3, 12, [1, 1, 5, 5], ignore=1),
        box(4, 12, [1, 1, 5, 5], iscrowd=1),
        box(5, 51, [1, 1, 5, 5]),
    ]
    for split in ("train", "val"):
        write_coco(tmp_path, document, split)
    train, val = (open_dataset(DataSpec(path=str(tmp_path)), split) for split in ("train", "val"))
    assert {sample.image_id: len(sample.label) for sample in train.samples} == {10: 1, 11: 1, 12: 2}
    assert {sample.image_id: len(sample.label) for sample in val.samples} == {10: 2, 11: 2, 12: 3, 50: 0, 51: 1}
    assert train.samples[2].is_crowd.tolist() == [False, True]
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (
            f'{{"images": [{"9" * 5000}]}}',
            "holds a number of thousands of digits: write or download the file again",
        ),
        ("[1, 2]", "list instead of an object: name another with data.train and data.val"),
        ('{"images": []}', 'no list "categories"'),
        ('{"images": {}, "annotations": [], "categories": []}', 'no list "images"'),
        ('{"images": [], "annotations": [], "categories": []}', "no classes: there is nothing to detect: name them"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no image with a box"),
        (f'{{"images": [], "annotations": [], "categories": [{{"id": {2**63}, "name": "a"}}]}}', "category 0 (counted"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "category 0 (counted from 0) needs"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category id 1 is given to a and b",
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_two_categories_of_one_name_stay_two(tmp_path: Path) -> None:
    document = coco_document()
    document["categories"] = [{"id": 1, "name": "cell"}, {"id": 7, "name": "cell"}]
    write_coco(tmp_path, document)
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert dataset.classes == ("cell", "cell (id 7)")
    assert len(dataset.faults) == 1


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "JPEGImages", "", "annotations"])
def test_images_are_found_in_the_usual_folders(tmp_path: Path, folder: str) -> None:
    path = write_coco(tmp_path, coco_document(), num_images=0)
    write_image(tmp_path / folder / "2.jpg")  # the others may be missing
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert {Path(sample.file).parent for sample in dataset.samples} == {tmp_path / folder}
    (tmp_path / folder / "2.jpg").unlink()
    with pytest.raises(DataError, match="none of its images") as caught:
        open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert str(path) in str(caught.value)
    assert str(tmp_path / "images" / "train2017") in str(caught.value)


def test_splits_must_agree_on_classes(tmp_path: Path) -> None:
    other = coco_document()
    other["categories"] = [{"id": 7, "name": "dog"}, {"id": 1, "name": "cow"}]
    turned = coco_document()
    turned["categories"] = [{"id": 1, "name": "dog"}, {"id": 7, "name": "cat"}]
    write_coco(tmp_path, coco_document(), "train")
    spec = DataSpec(path=str(tmp_path))
    train = open_dataset(spec, "train")
    check_classes(train, train)
    for document, said in ((other, "instances_train2017.json has cat; only"), (turned, "in another order")):
        write_coco(tmp_path, document, "val")
        with pytest.raises(DataError, match="do not have the same classes") as caught:
            check_classes(train, open_dataset(spec, "val"))
        assert said in str(caught.value)


def test_the_fingerprint_knows_every_box_but_no_folder(tmp_path: Path) -> None:
    write_coco(tmp_path / "a", coco_document())
    before = open_dataset(DataSpec(path=str(tmp_path / "a")), "train").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_dataset(DataSpec(path=str(tmp_path / "b")), "train").fingerprint == before
    document = coco_document()
    document["annotations"][2] = box(102, 12, [6, 5, 20, 10.5])
    write_coco(tmp_path / "b", document)
    assert open_dataset(DataSpec(path=str(tmp_path / "b")), "train").fingerprint != before


# --- VOC --------------------------------------------------------------------------------------------------------

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><part><name>head</name></part>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_voc(root: Path, sets: dict[str, dict[str, str]]) -> None:
    """Write image sets: for each image the inner XML of its annotation; images are 64 x 48."""
    for name, images in sets.items():
        for image, xml in images.items():
            write_image(root / "JPEGImages" / f"{image}.jpg")
            (root / "Annotations").mkdir(exist_ok=True)
            size = "" if "<size>" in xml else "<size><width>64</width><height>48</height></size>"
            (root / "Annotations" / f"{image}.xml").write_text(f"<annotation>{size}{xml}</annotation>")
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(images) + "\n")


def test_voc_takes_one_off_and_marks_difficult(tmp_path: Path) -> None:
    first = OBJECT.format("dog", 0, 5, 6, 30, 40) + OBJECT.format("cat", 1, 1, 1, 64, 48)
    write_voc(tmp_path, {"train": {"a": first}, "val": {"b": OBJECT.format("ant", 0, 2, 2, 9, 9)}})
    train, val = (open_dataset(DataSpec(path=str(tmp_path)), split) for split in ("train", "val"))
    assert train.classes == val.classes == ("ant", "cat", "dog")  # of both splits; a part's name is no class
    sample = train.samples[0]
    assert sample.xyxy.tolist() == [[4, 5, 29, 39], [0, 0, 63, 47]]
    assert sample.label.tolist() == [2, 1]
    assert sample.is_crowd.tolist() == [False, True]
    assert sample.area.tolist() == [25 * 34, 63 * 47]
    assert train.read(sample).shape == (3, 48, 64)


def test_voc_faults_are_listed(tmp_path: Path) -> None:
    write_voc(
        tmp_path,
        {
            "train": {
                "a": OBJECT.format("cat", 0, 5, 6, 30, 40) + OBJECT.format("cat", 0, "x", 6, 30, 40),
                "b": OBJECT.format("", 0, 5, 6, 30, 40)
                + OBJECT.format("cat", 0, 30, 6, 5, 40)
                + "<object><name>dog</name></object>"
                + OBJECT.format("cat", 0, 5, 6, 30, 40),
                "c": "<size><width>0</width><height>0</height></size>" + OBJECT.format("cat", 0, 5, 6, 30, 40),
                "d": "",
                "e": "",
            },
            "val": {"a": OBJECT.format("cat", 0, 5, 6, 30, 40)},
        },
    )
    (tmp_path / "Annotations" / "d.xml").write_text("<annotation>")
    (tmp_path / "Annotations" / "e.xml").write_text("<!DOCTYPE x [<!ENTITY a 'b'>]><annotation/>")
    listed = tmp_path / "ImageSets" / "Main" / "train.txt"
    listed.write_text(listed.read_text() + "f\n../../g\na\n\n")
    write_voc(tmp_path, {"val": {"a": OBJECT.format("cat", 0, 5, 6, 30, 40) + OBJECT.format("cat", 0, "x", 6, 30, 40)}})
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert dataset.classes == ("cat",)
    assert [(Path(fault.file).name, fault.item, fault.problem[:22]) for fault in dataset.faults] == [
        ("train.txt", "line 8", "a is listed before"),
        ("b.xml", "object 1 of b.jpg", "no name"),
        ("b.xml", "object 3 of b.jpg", "no bndbox"),
        ("d.xml", "", "not valid XML: no elem"),
        ("e.xml", "", "declares a document ty"),
        ("f.xml", "", "no annotation: No such"),
        ("ImageSets", "../../g", "not the name of an ima"),
        ("a.xml", "object 2 of a.jpg", "the box is not finite "),
        ("b.xml", "object 2 of b.jpg", "the box has no area (f"),
    ]
    assert str(dataset.faults[1]) == f"{tmp_path}/Annotations/b.xml: object 1 of b.jpg: no name: box dropped"
    # c says no size: it is read from the image
    assert [(Path(sample.file).stem, sample.height, len(sample.label)) for sample in dataset.samples] == [
        ("a", 48, 1),
        ("b", 48, 1),
        ("c", 48, 1),
    ]


def test_voc_years_are_joined(tmp_path: Path) -> None:
    cat = OBJECT.format("cat", 0, 5, 6, 30, 40)
    for year, images in (("VOC2007", ("a", "b")), ("VOC2012", ("c",))):
        write_voc(tmp_path / year, {"trainval": dict.fromkeys(images, cat)})
    write_voc(tmp_path / "VOC2007", {"test": {"z": cat}})
    spec = DataSpec(path=str(tmp_path), train="VOC2007/trainval+VOC2012/trainval", val="VOC2007/test")
    train, val = open_dataset(spec, "train"), open_dataset(spec, "val")
    assert [Path(sample.file).stem for sample in train.samples] == ["a", "b", "c"]
    assert [Path(sample.file).stem for sample in val.samples] == ["z"]
    with pytest.raises(DataError, match="no such image set \\(there are: test, trainval\\)"):
        open_dataset(DataSpec(path=str(tmp_path), train="VOC2007/none"), "train")


def test_voc_never_pairs_overlapping_sets(tmp_path: Path) -> None:
    cat = OBJECT.format("cat", 0, 5, 6, 30, 40)
    write_voc(tmp_path, {"trainval": {"a": cat, "b": cat}, "val": {"b": cat}, "test": {"c": cat}})
    spec = DataSpec(path=str(tmp_path))
    names = {split: {Path(s.file).stem for s in open_dataset(spec, split).samples} for split in ("train", "val")}
    assert names == {"train": {"a", "b"}, "val": {"c"}}


# --- YOLO -------------------------------------------------------------------------------------------------------


def write_yolo(root: Path, yaml: str, labels: dict[str, str], split: str = "images/train") -> None:
    """Write 64 x 48 images and their label files."""
    (root / "data.yaml").write_text(yaml)
    for name, text in labels.items():
        write_image(root / split / f"{name}.jpg")
        label = root / Path(split.replace("images", "labels")) / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)


def test_yolo_reads_shares_of_the_image(tmp_path: Path) -> None:
    write_yolo(tmp_path, "names: [cat, dog]\n", {"a": "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.5 0.5\n", "b": ""})
    write_yolo(tmp_path, "names: [cat, dog]\n", {"c": "1 0.5 0.5 1 1"}, "images/val")
    train, val = (open_dataset(DataSpec(path=str(tmp_path)), split) for split in ("train", "val"))
    assert len(train.samples) == 1  # nothing to learn from the other
    assert train.samples[0].xyxy.tolist() == [[24, 12, 40, 36], [0, 0, 32, 24]]
    assert train.samples[0].label.tolist() == [1, 0]
    assert val.samples[0].xyxy.tolist() == [[0, 0, 64, 48]]
    assert (train.classes, train.category_id, train.faults) == (("cat", "dog"), (0, 1), ())


def test_yolo_faults_are_listed(tmp_path: Path) -> None:
    lines = ["0 0.5 0.5 0.25 0.5", "2 0.5 0.5 0.2 0.2", "0.5 0.5 0.5 0.2 0.2", "0 0.5", "x 1 1 1 1"]
    lines += ["0 nan 0.5 0.2 0.2", "0 40 30 20 10", "0 0.5 0.5 0.2 0", "-1 0.5 0.5 0.2 0.2", "0 0.9 0.5 0.4 0.5"]
    write_yolo(tmp_path, "names: [cat, dog]\n", {"a": "\n".join(lines), "b": lines[0]})
    (tmp_path / "images" / "train" / "b.jpg").write_bytes(b"no image")
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    problems = [(fault.item.removesuffix(" of a.jpg"), fault.problem.split(" (")[0][:30]) for fault in dataset.faults]
    assert problems == [
        ("line 2", "class 2 is not among the 2 of "),
        ("line 3", "class 0.5 is not among the 2 o"),
        ("line 4", "'0 0.5' is not a class and fou"),
        ("line 5", "'x 1 1 1 1' is not a class and"),
        ("line 9", "class -1 is not among the 2 of"),
        ("", "not a readable image: its byte"),
        ("line 6", "the box is not finite"),
        ("line 8", "the box has no area"),
        ("line 7", "the box lies outside the image"),
        ("line 10", "the box reaches beyond the ima"),
    ]
    assert [len(sample.label) for sample in dataset.samples] == [2]


ROBOFLOW = """train: ../train/images
val: ../valid/images

nc: 3
names: ['a b', "c, d",
  'e#f']

roboflow:
  workspace: someone
  names: 5
"""
BLOCK = """# a comment
path: .  # here
train: train/images
val:
- valid/images
names:
  0: a b
  1: c, d
  2: e#f
download: |
  import os
"""


@pytest.mark.parametrize("yaml", [ROBOFLOW, BLOCK])
def test_yolo_files_of_exporters_are_understood(tmp_path: Path, yaml: str) -> None:
    write_yolo(tmp_path, yaml, {"x": "2 0.5 0.5 0.25 0.5"}, "train/images")
    write_yolo(tmp_path, yaml, {"y": "1 0.5 0.5 0.25 0.5"}, "valid/images")
    for split, name in (("train", "x"), ("val", "y")):
        dataset = open_dataset(DataSpec(path=str(tmp_path / "data.yaml")), split)
        assert dataset.classes == ("a b", "c, d", "e#f")
        assert [Path(sample.file).stem for sample in dataset.samples] == [name]
        assert len(dataset.samples[0].label) == 1


def test_yolo_lists_of_images_stay_inside(tmp_path: Path) -> None:
    write_yolo(tmp_path, "train: train.txt\nnames: [cat]\n", {"a": "0 0.5 0.5 0.5 0.5", "b": "0 0.5 0.5 0.5 0.5"})
    (tmp_path / "train.txt").write_text("./images/train/b.jpg\n../outside.jpg\n")
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert [Path(sample.file).name for sample in dataset.samples] == ["b.jpg"]
    assert [fault.item for fault in dataset.faults] == ["line 2"]


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train: images/train\n", "no class names"),
        ("names: [a, a]\n", "names holds a twice"),
        ("names: [a]\nnc: 2\n", "nc is 2, but there are 1 names"),
        ("names:\n  0: a\n  2: b\n", "numbered 0 to 1, each once: fill the gaps"),
        ("nc: 3\nnames: 3\n", 'data.yaml, line 2: names is 3, not a list: write "names: [cat, dog]"'),
        ("path: nowhere\nnames: [a]\n", "data.yaml: path: nowhere: there is no folder "),
        ("names: [a]\nwhat is this\n", "line 2: not `key: value`"),
        ("names: [a]\ntrain: elsewhere\n", "no images of the split train: looked in"),
    ],
)
def test_a_wrong_yaml_is_one_line(tmp_path: Path, yaml: str, said: str) -> None:
    write_yolo(tmp_path, yaml, {"a": "0 0.5 0.5 0.5 0.5"})
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert said in str(caught.value)
    assert str(tmp_path / "data.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_keys_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("license: CC\nnames: {0: 'a', 1: b}\nkpt_shape: [17,\n3]\ntest:\n")
    assert parse_yaml(tmp_path / "x.yaml") == {"names": [("0", "a"), ("1", "b")], "test": []}


# --- which data set ---------------------------------------------------------------------------------------------


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(tmp_path / "none")), "train")
    assert str(caught.value) == (
        f"{tmp_path}/none: no such folder: put a COCO, VOC or YOLO data set there or name one with --data; "
        "`ldctl distill --preset quickstart` needs none"
    )


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(tmp_path)), "val")
    for said in ("annotations/instances_val2017.json", "ImageSets/Main/*.txt", "data.yaml"):
        assert said in str(caught.value)
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(path=str(tmp_path), format="yolo"), "val")
    assert str(caught.value) == (
        f"{tmp_path}: no val split: looked for YOLO's data.yaml: "
        "mend data.path, or name an annotation file with data.val"
    )


def test_the_annotation_files_that_are_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b", "c", "d", "e", "super_val", "z"):
        (tmp_path / f"annotations/{name}.json").write_text("{}")
    files = ", ".join(f"annotations/{name}.json" for name in "abcde")
    there = f"{files} and 2 more: name one with data.val"
    for value, hint in (("super_val.json", "did you mean annotations/super_val.json? There"), ("none.json", "there")):
        with pytest.raises(DataError) as caught:
            open_dataset(DataSpec(path=str(tmp_path), format="coco", val=value), "val")
        assert str(caught.value) == f"{tmp_path}: no val split: looked for COCO's {value}: {hint} is {there}"


def test_the_generated_data_set_needs_no_folder() -> None:
    dataset = open_dataset(DataSpec(path="/nowhere", format="synthetic"), "val")
    assert len(dataset.samples) == DataSpec().synthetic.val


@pytest.mark.parametrize("sides", [(31, 800), (800, 600), (800, 1400)])
def test_sizes_that_cannot_be_are_refused(sides: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="needs 32 <= low <= high <= long_side"):
        DataSpec(short_side=sides)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *((name, True) for name in ("a.jpg", "a/b.jpg", "./a", "a..b")),
        *((name, False) for name in ("", "..", "a/../b", "/a", "C:\\a", "C:a", "a\\..\\..\\b", "\\\\host\\a")),
    ],
)
def test_names_stay_inside_the_data_set(name: str, inside: bool) -> None:
    assert is_inside(name) is inside


# --- pixels -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def as_pil(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(RGB[..., 0].astype(np.uint16) * 256 + 77)
    return Image.fromarray(RGB).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        *((mode, "png", 0) for mode in ("RGB", "L", "P", "1", "LA", "RGBA", "I;16")),
        *(("RGB", suffix, 0) for suffix in ("bmp", "tiff")),
        *((mode, "jpg", 90) for mode in ("CMYK", "L")),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    image = as_pil(mode)
    image.save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 20, 30)
    expected = np.repeat(RGB[..., :1], 3, axis=2) if mode == "I;16" else np.asarray(image.convert("RGB"))
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= tolerance
    assert pixels.float().std() > 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 200  # top left
    turns = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turns |= {5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1)}
    turns |= {8: np.rot90(upright, -1)}  # stored so that the EXIF turn undoes it
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turns[orientation])).save(tmp_path / "x.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "x.jpg")
    assert pixels.shape == (3, 16, 32)
    assert (pixels.permute(1, 2, 0).numpy().astype(int) - upright).__abs__().max() < 10


def test_pixels_as_stored_where_the_annotation_says_so(tmp_path: Path) -> None:
    document = coco_document()
    write_coco(tmp_path, document)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "train2017" / "1.jpg"
    stored = np.asarray(Image.open(file))
    Image.fromarray(stored).save(file, exif=exif, quality=95)
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    assert dataset.read(dataset.samples[1]).shape == (3, 48, 64)  # upright it would be 64 high
    assert read_image(file).shape == (3, 64, 48)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such image"),
        (b"", "x.jpg: not a readable image"),
        (b"hello", "x.jpg: not a readable image: its bytes are of no known format: "),
    ],
)
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "x.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_image(file)
    assert str(caught.value).count(str(file)) == 1
    assert "\n" not in str(caught.value)


def test_truncated_and_oversized_images_are_refused(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged or cut short"):
        read_image(shared / "data" / "broken" / "truncated.jpg")
    header = struct.pack(">II5B", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    png = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))
    with pytest.raises(DataError, match="decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_document())
    write_image(tmp_path / "train2017" / "1.jpg", 80, 48)
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match="is 80 x 48 px, but its annotation says 64 x 48"):
        dataset.read(dataset.samples[1])


def test_class_order_changes_labels_and_category_ids_alike(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_document())
    dataset = open_dataset(DataSpec(path=str(tmp_path)), "train")
    turned = in_class_order(dataset, tuple(reversed(dataset.classes)))
    assert turned.classes == ("dog", "cat")
    assert turned.category_id == (7, 1)
    for before, after in zip(dataset.samples, turned.samples, strict=True):
        names = [dataset.classes[label] for label in before.label]
        assert [turned.classes[label] for label in after.label] == names
        assert [turned.category_id[label] for label in after.label] == [dataset.category_id[i] for i in before.label]
