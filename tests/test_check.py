"""The inspection of image files before the first step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import coco_document, image_dataset, write_coco, write_image
from PIL import Image

from ldctl.data import DataSpec, images, open_dataset
from ldctl.data.check import inspect
from ldctl.data.images import check_file, read_image
from ldctl.data.table import fingerprint
from ldctl.errors import DataError
from ldctl.samples import Dataset


def damaged_dataset(root: Path) -> Dataset:
    """Six images: whole, missing, truncated, no image, of another size, empty file; a bad box in the first."""
    document = coco_document(6)
    document["annotations"].append({"id": 1, "image_id": 10, "category_id": 1, "bbox": [1, 1, 0, 0], "area": 1})
    write_coco(root, document, num_images=6)
    folder = root / "train2017"
    (folder / "1.jpg").unlink()
    content = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(content[: len(content) // 2])
    (folder / "3.jpg").write_bytes(b"hello")
    write_image(folder / "4.jpg", 48, 64)
    (folder / "5.jpg").write_bytes(b"")
    return open_dataset(DataSpec(path=str(root)), "train")


def test_everything_is_found_in_one_go(tmp_path: Path) -> None:
    dataset = damaged_dataset(tmp_path)
    result = inspect(dataset)
    folder = tmp_path / "train2017"
    assert [(fault.file, fault.item, fault.action) for fault in result.faults] == [
        (f"{tmp_path}/annotations/instances_train2017.json", "annotation 1 of 0.jpg", "box dropped"),
        *((f"{folder}/{i}.jpg", f"image {10 + i}", "image skipped") for i in range(1, 6)),
    ]
    problems = [fault.problem for fault in result.faults[1:]]
    for problem, said in zip(
        problems,
        (
            "no such image",
            "runcated",
            "not a readable image",
            "is 48 x 64 px, but its annotation says 64 x 48",
            "not a",
        ),
        strict=True,
    ):
        assert said in problem
        assert str(tmp_path) not in problem
    assert [sample.image_id for sample in result.dataset.samples] == [10]
    assert result.dataset.faults == result.faults
    samples = result.dataset.samples
    assert (
        result.dataset.fingerprint == fingerprint(dataset.classes, dataset.category_id, samples) != dataset.fingerprint
    )


def test_a_data_set_without_one_usable_image_is_refused(tmp_path: Path) -> None:
    dataset = image_dataset(tmp_path, [(48, 64)] * 2)
    for sample in dataset.samples:
        Path(sample.file).unlink()
    with pytest.raises(DataError, match=r"not one image can be used; the first of 2 faults is .*0\.png") as caught:
        inspect(dataset)
    assert "\n" not in str(caught.value)


def test_a_sound_data_set_is_unchanged(tmp_path: Path) -> None:
    # more images than a thread takes at once
    dataset = image_dataset(tmp_path, [(48, 64)])
    dataset = replace(dataset, samples=dataset.samples.take(np.zeros(600, np.int64)))
    result = inspect(dataset)
    assert result.faults == ()
    assert result.dataset == dataset


def test_generated_images_have_no_files_to_look_at() -> None:
    dataset = open_dataset(DataSpec(format="synthetic"), "val")
    assert inspect(dataset).dataset is dataset


def test_real_photos_pass_and_the_truncated_one_does_not(shared: Path) -> None:
    spec = DataSpec(path=str(shared / "data" / "bccd"), format="coco")
    result = inspect(open_dataset(spec, "val"))
    assert len(result.dataset.samples) == 87
    assert [fault.problem.split(" (")[0] for fault in result.faults] == ["the box has no area"]
    with pytest.raises(DataError, match="cut short"):
        check_file(shared / "data" / "broken" / "truncated.jpg")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_no_truncated_file_passes(tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"x.{suffix}"
    NOISE.save(file)
    check_file(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError):
        check_file(file)
    # a download that reserved its space first
    file.write_bytes(content[: int(len(content) * share)] + bytes(len(content)))
    if suffix in ("jpg", "png"):  # elsewhere zeros may be pixels
        with pytest.raises(DataError):
            check_file(file)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_png_damaged_in_the_middle_does_not_pass(tmp_path: Path, share: float) -> None:
    file = tmp_path / "x.png"
    NOISE.save(file)
    content = bytearray(file.read_bytes())
    content[int(len(content) * share)] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png: the image is damaged: .*: replace or remove it$"):
        check_file(file)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_whole_file_is_not_decoded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"x.{suffix}"
    NOISE.save(file)

    def fail(path: Path) -> None:
        raise AssertionError(f"decoded {path}")

    monkeypatch.setattr(images, "read_image", fail)
    assert check_file(file).upright_hw == (48, 64)
    file.write_bytes(file.read_bytes() + bytes(100))  # padding
    check_file(file)
    file.write_bytes(file.read_bytes() + b"camera maker's notes")
    with pytest.raises(AssertionError, match="decoded"):
        check_file(file)


def test_strange_but_readable_files_pass(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    NOISE.save(file)
    file.write_bytes(file.read_bytes() + b"camera maker's notes")
    check_file(file)
    assert read_image(file).shape == (3, 48, 64)
