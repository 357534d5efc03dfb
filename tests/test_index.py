"""Samples as columns, the index of a large annotation file, and the memory of checked images."""

import hashlib
import json
import multiprocessing
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import box, coco_document, image_dataset, write_coco
from safetensors.torch import save

from ldctl.data import DataSpec, check, in_class_order, index, open_dataset
from ldctl.data.check import inspect
from ldctl.data.coco import read_coco
from ldctl.data.raw import Split
from ldctl.data.table import fingerprint, joined, pack, relabelled
from ldctl.errors import DataError
from ldctl.samples import Dataset, Sample

FIELDS = tuple(Sample.__dataclass_fields__)


def content(samples: Sequence[Sample]) -> list[tuple[object, ...]]:
    values = ([getattr(sample, name) for name in FIELDS] for sample in samples)
    return [tuple((v.dtype, v.tolist()) if isinstance(v, np.ndarray) else v for v in row) for row in values]


def assert_same(one: Dataset, other: Dataset) -> None:
    assert content(one.samples) == content(other.samples)
    for name in ("name", "classes", "category_id", "fingerprint", "faults", "read"):
        assert getattr(one, name) == getattr(other, name)


def parsed(root: Path, split: Split = "train") -> Dataset:
    """Open without an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "WORTHWHILE", 10**9)
        return open_dataset(DataSpec(path=str(root)), split)


def opened(root: Path, split: Split = "train") -> Dataset:
    """Open with an index, however small the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "WORTHWHILE", 0)
        return open_dataset(DataSpec(path=str(root)), split)


def is_parsed(root: Path, split: Split = "train") -> bool:
    """Open with an index, and tell whether it took reading the annotations."""
    calls = []

    def noted(*args: Path) -> object:
        calls.append(args)
        return read_coco(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "read_coco", noted)
        dataset = opened(root, split)
    assert_same(dataset, parsed(root, split))
    return bool(calls)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images, one in a folder of its own with a name beyond ASCII; 11 boxes, a crowd, and faults of three kinds."""
    document = coco_document(6)
    document["images"][5]["file_name"] = "one more/f\u00fcnf.jpg"
    document["annotations"] += [box(200 + i, 10 + i, [1, 2, 30 + i, 20.5], category=7, area=7.5) for i in range(5)]
    document["annotations"] += [
        box(300, 11, [0, 0, 9, 9], iscrowd=1),
        box(301, 12, [5, 5, 0, 3]),
        box(302, 99, [0] * 4),
        box(303, 10, [2, 2, 9, 9], area=0),
    ]
    document["images"].append({"id": 77, "file_name": "../x.jpg", "width": 64, "height": 48})
    write_coco(tmp_path, document, num_images=6)
    (tmp_path / "train2017" / "one more").mkdir()
    (tmp_path / "train2017" / "5.jpg").rename(tmp_path / "train2017" / "one more" / "f\u00fcnf.jpg")
    return tmp_path


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "annotations").iterdir())


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_give_back_what_was_packed(tmp_path: Path) -> None:
    plain = list(image_dataset(tmp_path, [(40, 60), (60, 40), (50, 50), (32, 90)]).samples)
    plain[2] = replace(plain[2], is_labelled=False, file="a b/\u00e9\udcff.jpg", area=plain[2].area + 0.5)
    samples = pack(plain)
    assert content(samples) == content(plain)
    assert content(samples[1:3]) == content(plain[1:3])
    assert content(samples[::-1][:2]) == content(plain[::-1][:2])
    assert content([samples[-1]]) == content([plain[-1]])
    rows = np.array([3, 0, 0, 2])
    some, expected = samples.take(rows), [plain[row] for row in rows]
    assert content(some) == content(expected)
    assert some.width.tolist() == [sample.width for sample in expected]
    assert some.height.tolist() == [sample.height for sample in expected]
    assert some.is_labelled.tolist() == [sample.is_labelled for sample in expected]
    assert some.num_objects.tolist() == [len(sample.label) for sample in expected]
    assert content(some.take(some.is_labelled)) == content(expected[:3])
    turned = relabelled(relabelled(some, np.array([1, 2])), np.array([7, 8, 9]))
    assert content(turned) == content([replace(sample, label=sample.label + 8) for sample in expected])
    assert content(pack(turned)) == content(turned)
    for position in (4, -5):
        with pytest.raises(IndexError):
            some[position]
    assert len(pack([])) == 0


def test_joined_columns_are_those_of_all_images(root: Path) -> None:
    """Of a mapped table, of some of its images with other labels, and of images without a folder in common."""
    mapped = opened(root).samples
    some = relabelled(mapped.take(np.array([4, 0, 0])), np.array([1, 0]))
    others = pack([replace(sample, file="elsewhere/x.jpg", is_labelled=False) for sample in mapped[:2]])
    both = joined(mapped, some, mapped[:0], others)
    assert content(both) == content([*mapped, *some, *others])
    columns, expected = (vars(samples.table) for samples in (both, pack([*mapped, *some, *others])))
    for name in columns.keys() - {"prefix", "reopen"}:
        np.testing.assert_array_equal(columns[name], expected[name])
        assert columns[name].dtype == expected[name].dtype


def test_a_fingerprint_is_of_what_the_images_hold_not_of_how_they_are_stored(tmp_path: Path) -> None:
    def mark(samples: Sequence[Sample]) -> str:
        return fingerprint(("a", "b"), (1, 2), pack(samples))

    samples = image_dataset(tmp_path, [(40, 60), (60, 40), (50, 50)]).samples
    some = relabelled(samples.take(np.array([2, 1, 1])), np.array([1, 0]))
    assert fingerprint(("a", "b"), (1, 2), some) == mark(list(some))
    first, *others = samples
    changes = {
        "image_id": 1,
        "file": "x",
        "height": 1,
        "width": 1,
        "xyxy": first.xyxy + 1,
        "label": first.label + 1,
        "area": first.area + 1,
        "is_crowd": ~first.is_crowd,
        "is_labelled": False,
    }
    assert set(changes) == set(FIELDS)
    marks = {mark([replace(first, **{name: value}), *others]) for name, value in changes.items()}
    assert len(marks | {mark(samples), mark(others), mark([*others, first])}) == len(changes) + 3


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_holds_what_the_annotations_say(root: Path, split: Split) -> None:
    annotations = root / "annotations" / "instances_train2017.json"
    if split == "val":
        annotations = annotations.rename(root / "annotations" / "instances_val2017.json")
        (root / "train2017").rename(root / "val2017")
    for _ in range(2):
        assert_same(opened(root, split), parsed(root, split))
    assert files(root) == [annotations.name, f"{annotations.name}.{split}.ldctl"]
    assert len(opened(root, split).faults) == {"train": 4, "val": 3}[split]
    assert not is_parsed(root, split)


def test_small_files_get_no_index(root: Path) -> None:
    open_dataset(DataSpec(path=str(root)), "train")
    assert files(root) == ["instances_train2017.json"]


def test_the_splits_of_one_file_have_an_index_each(root: Path) -> None:
    spec = DataSpec(path=str(root), val="train2017")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "WORTHWHILE", 0)
        for _ in range(2):
            train, val = open_dataset(spec, "train"), open_dataset(spec, "val")
            assert (len(train.samples[0].label), len(val.samples[0].label)) == (2, 3)
    assert len(files(root)) == 3


def test_a_data_set_may_move_and_be_named_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(root)
    monkeypatch.chdir(root.parent)
    assert not is_parsed(Path(root.name))
    monkeypatch.chdir(root)
    assert not is_parsed(Path())
    assert opened(Path()).samples[0].file == "train2017/0.jpg"
    (root / "train2017").rename(root / "images")
    assert not is_parsed(root)
    assert Path(opened(root).samples[0].file) == root / "images" / "0.jpg"
    (root / "images").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"none of its images \(0\.jpg, \.\.\.\) is in any of"):
        opened(root)


def test_another_annotation_file_gets_another_index(root: Path) -> None:
    file = root / "annotations" / "instances_train2017.json"
    opened(root)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert is_parsed(root)
    assert not is_parsed(root)
    status, text = file.stat(), file.read_text()
    file.write_text(text.replace("7.5", "8.5"))  # as long, and as old
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert is_parsed(root)
    file.write_text(text + " ")
    assert is_parsed(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "VERSION", index.VERSION + 1)
        assert is_parsed(root)


def flip(position: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(len(data) * position)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"hello",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        *(flip(position) for position in (0, 0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999)),
    ],
)
def test_a_damaged_index_is_made_anew(root: Path, damage: Callable[[bytes], bytes]) -> None:
    opened(root)
    file = root / "annotations" / "instances_train2017.json.train.ldctl"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert is_parsed(root)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("names", lambda names: np.frombuffer(names.tobytes().replace(b"0.jpg1", b"..//x1"), np.uint8)),
        ("names", lambda names: np.frombuffer(names.tobytes().replace(b"0.jpg1", b"/.jpg1"), np.uint8)),
        ("first_byte", lambda starts: starts + 1),
        ("first_object", lambda starts: np.where(starts == starts[1], 10**6, starts)),
        ("first_object", lambda starts: starts[:-1]),
        ("names", lambda names: np.where(names == ord("0"), 0, names)),
        ("names", lambda names: np.where(names == ord("0"), 0xC3, names)),
        ("first_byte", lambda starts: np.where(starts == starts[1], starts[2], starts)),
        ("first_byte", lambda starts: np.where(starts == starts[-2], starts[-1], starts)),
        ("first_byte", lambda starts: np.where(starts == starts[-2], starts[-1] - 7, starts)),  # within a character
        ("label", lambda label: label - 1),
        ("label", lambda label: label + 1),
        ("xyxy", lambda xyxy: xyxy.astype(np.float64)),
        ("xyxy", lambda xyxy: xyxy * np.float32("nan")),
        ("area", lambda area: area[:-1]),
        ("area", lambda area: area * np.float32("nan")),
        ("height", lambda height: height[:, None]),
        ("height", lambda height: -height),
        ("width", lambda width: width * 0),
        ("image_id", lambda image_id: image_id[0]),
        ("label", lambda label: label[0]),
    ],
)
def test_no_index_is_trusted_blindly(root: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    opened(root)
    stored = index.load(index_file(root), index.About, index._COLUMNS)
    assert stored is not None
    changed = np.asarray(change(stored.arrays[name]), dtype=None if name != "names" else np.uint8)
    assert changed.shape != stored.arrays[name].shape or (changed != stored.arrays[name]).any() or name == "xyxy"
    tensors = {key: torch.tensor(value) for key, value in (stored.arrays | {name: changed}).items()}
    forge(index_file(root), stored.about.model_dump_json(), tensors)
    assert is_parsed(root)
    assert not is_parsed(root)


def index_file(root: Path) -> Path:
    return root / "annotations" / "instances_train2017.json.train.ldctl"


def forge(file: Path, text: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file with a checksum that is right, whatever is in it."""
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    content = {name: tensor.clone() for name, tensor in tensors.items()}
    file.write_bytes(save(content, {"ldctl-index": f"{checksum:08x} {text}"}))


def forge_about(root: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Write the index of a data set with other things to say of its columns."""
    stored = index.load(index_file(root), index.About, index._COLUMNS)
    assert stored is not None
    text = json.dumps(change(json.loads(stored.about.model_dump_json())))
    forge(index_file(root), text, {key: torch.tensor(value) for key, value in stored.arrays.items()})


def test_what_is_forged_is_used_where_nothing_is_changed(root: Path) -> None:
    """Else the tests here would say nothing."""
    opened(root)
    forge_about(root, lambda about: about)
    assert not is_parsed(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda _: None,
        lambda _: {},
        lambda about: about | {"more": 1},
        lambda about: {key: value for key, value in about.items() if key != "classes"},
        lambda about: about | {"classes": 3},
        lambda about: about | {"classes": []},
        lambda about: about | {"category_id": [1]},
        lambda about: about | {"category_id": ["1", "7"]},
        lambda about: about | {"fingerprint": None},
        lambda about: about | {"faults": [["item", "problem"]]},
        lambda about: about | {"probes": []},
        lambda about: about | {"made_of": list(about["made_of"].values())},
    ],
)
def test_no_index_is_trusted_in_what_it_says_of_its_columns(
    root: Path, change: Callable[[dict[str, object]], object]
) -> None:
    opened(root)
    forge_about(root, change)
    assert is_parsed(root)
    assert not is_parsed(root)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_types_that_numpy_does_not_know_are_passed_over(root: Path, dtype: torch.dtype) -> None:
    opened(root)
    stored = index.load(index_file(root), index.About, index._COLUMNS)
    assert stored is not None
    tensors = {key: torch.tensor(value) for key, value in stored.arrays.items()}
    for more in ({"area": tensors["area"].to(dtype)}, {"another": torch.zeros(3, dtype=dtype)}):
        forge(index_file(root), stored.about.model_dump_json(), tensors | more)
        assert is_parsed(root)


@pytest.mark.parametrize("name", ["1..jpg", "ab:c.jpg", "a\0b.jpg", "\udcff.jpg"])
def test_names_that_an_index_cannot_vouch_for_are_parsed_each_time(tmp_path: Path, name: str) -> None:
    """And nothing is written for that."""
    document = coco_document()
    document["images"][0]["file_name"] = name
    write_coco(tmp_path, document)
    assert is_parsed(tmp_path)
    assert is_parsed(tmp_path)
    assert files(tmp_path) == ["instances_train2017.json"]


# Of what a reader makes of the file below, by the version of the index. An index that was made under other rules is
# used as long as its version is the same: whoever changes what is read, raises `index.VERSION`, and adds a line here.
READ = {1: "5caeb2c895731838281abf31e98aa2586c07019bed4011b6d377a513406d05cb"}


def test_other_rules_of_reading_are_another_version(root: Path) -> None:
    annotations = root / "annotations" / "instances_train2017.json"
    shown = []
    for split in ("train", "val"):
        dataset = open_dataset(
            DataSpec(path=str(root), train=f"annotations/{annotations.name}", val="train2017"), split
        )
        faults = [(fault.item, fault.problem, fault.action) for fault in dataset.faults]
        table = dataset.samples.table
        columns = [(name, getattr(table, name).tolist()) for name in index._COLUMNS]
        shown.append((dataset.classes, dataset.category_id, dataset.fingerprint, faults, columns))
    mark = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    assert mark == READ.get(index.VERSION), "raise ldctl.data.index.VERSION: an index may hold what the old rules gave"


def test_without_a_place_to_write_everything_works(root: Path) -> None:
    (root / "annotations" / "instances_train2017.json.train.ldctl").mkdir()
    assert is_parsed(root)
    assert is_parsed(root)
    assert len(files(root)) == 2  # nothing half written either


def test_no_index_of_a_file_that_changes_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: Path) -> object:
        raw = read_coco(*args)
        args[-1].write_text(json.dumps(coco_document()))
        return raw

    monkeypatch.setattr(index, "read_coco", touched)
    assert len(opened(root).samples) == 6
    assert files(root) == ["instances_train2017.json"]


def _open_and_mark(root: Path) -> str:
    return opened(root).fingerprint


def test_processes_may_make_it_at_once(root: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        marks = pool.map(_open_and_mark, [root] * 8, chunksize=1)
    assert set(marks) == {parsed(root).fingerprint}
    assert len(files(root)) == 2
    assert not is_parsed(root)


def test_a_process_that_is_started_afresh_maps_the_same_file(root: Path) -> None:
    dataset = in_class_order(opened(root), ("dog", "cat"))
    dataset = replace(dataset, samples=dataset.samples.take(np.array([2, 0])))
    sent = pickle.dumps(dataset)
    assert_same(pickle.loads(sent), dataset)
    assert_same(pickle.loads(pickle.dumps(pickle.loads(sent))), dataset)
    assert content(pickle.loads(pickle.dumps(parsed(root).samples))) == content(parsed(root).samples)
    names = dataset.samples.table.names.tobytes()
    assert names not in sent
    document = coco_document()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    opened(root)
    assert dataset.samples[0].image_id == 12  # what is mapped stays what it was
    with pytest.raises(DataError, match=r"\.json\.train\.ldctl: was replaced while it was in use: repeat the command"):
        pickle.loads(sent)


# --- the memory of checked images -----------------------------------------------------------------------------------


def looked_at(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Inspect, and return which files were read for that."""
    names = []

    def noted(path: Path) -> object:
        names.append(path.name)
        return real(path)

    real = check.check_file
    monkeypatch.setattr(check, "check_file", noted)
    result = inspect(dataset)
    monkeypatch.setattr(check, "check_file", real)
    fresh = inspect(replace(dataset, checked=None))
    assert result.faults == fresh.faults
    assert_same(result.dataset, fresh.dataset)
    return sorted(names)


def test_a_sound_file_is_looked_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "train2017"
    (folder / "3.jpg").write_bytes(b"hello")
    (folder / "4.jpg").unlink()
    dataset = opened(root)
    everything = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "f\u00fcnf.jpg"]
    assert looked_at(dataset, monkeypatch) == everything
    assert looked_at(opened(root), monkeypatch) == ["3.jpg", "4.jpg"]  # to say again what is wrong
    status, data = (folder / "1.jpg").stat(), (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(data[:-20] + bytes(20))  # as long, and as old
    os.utime(folder / "1.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "2.jpg").unlink()
    (folder / "3.jpg").write_bytes(data)
    assert looked_at(opened(root), monkeypatch) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert looked_at(opened(root), monkeypatch) == ["1.jpg", "2.jpg", "4.jpg"]
    memory = root / "annotations" / "instances_train2017.json.train.checked.ldctl"
    memory.write_bytes(memory.read_bytes()[:-1])
    assert looked_at(opened(root), monkeypatch) == everything
    assert looked_at(replace(opened(root), fingerprint="another"), monkeypatch) == everything
    forgeries = (
        ("[]", {"stamp": torch.zeros(6, 3, dtype=torch.int64)}),
        (json.dumps({"made_of": dataset.fingerprint}), {"stamp": torch.tensor(3)}),
        (json.dumps({"made_of": dataset.fingerprint}), {"stamp": torch.zeros(5, 3, dtype=torch.int64)}),
        (json.dumps({"made_of": dataset.fingerprint}), {"stamp": torch.zeros(6, 3, dtype=torch.bfloat16)}),
    )
    for text, tensors in forgeries:
        forge(memory, text, tensors)
        assert looked_at(opened(root), monkeypatch) == everything
    memory.unlink()
    memory.mkdir()
    assert looked_at(opened(root), monkeypatch) == everything
    assert looked_at(parsed(root), monkeypatch) == everything
