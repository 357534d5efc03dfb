"""How the pixels of a JPEG are decoded: in full by either library, or at a fraction of the size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldctl.data import DataSpec, images
from ldctl.data.augment import View, show
from ldctl.data.images import read_image, read_sample
from ldctl.data.loader import eval_batches, train_batches
from ldctl.data.table import pack
from ldctl.errors import DataError
from ldctl.samples import Dataset, Sample
from ldctl.types import Batch

HEIGHT, WIDTH = 304, 400  # of the large images: an eighth is a whole number of pixels
ORIENTATION = 0x0112


def smooth(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a picture of slow waves, another in each channel and not symmetric in any way."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(2 * np.pi * (a * x / width + b * y / height) + c) for a, b, c in ((1, 0.5, 0), (0.3, 1, 1), (1, 1, 2))
    ]
    return np.uint8(127.5 + 120 * np.stack(waves, axis=-1))


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", orientation: int = 1, **options: object) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif, **options)
    return path


def sample(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Sample:
    xyxy = np.array([[10, 20, 200, 100], [0, 0, width, height]], dtype=np.float32)
    return Sample(7, str(path), height, width, xyxy, np.array([0, 1]), np.ones(2, np.float32), np.zeros(2, np.bool_))


def by_pillow(path: Path) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "decode_jpeg", None)
        return read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_both_libraries_decode_to_the_same_pixels(
    tmp_path: Path, mode: str, options: dict[str, object], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 60, (37, 51, 3), dtype=np.uint8)
    file = save(tmp_path / "x.jpg", smooth(37, 51) // 2 + noise, mode, orientation, **options)
    expected = by_pillow(file)
    monkeypatch.setattr(images, "_rgb", None)
    assert torch.equal(read_image(file), expected)


def test_what_torchvision_cannot_decode_is_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: torch.Tensor, mode: object) -> torch.Tensor:
        raise RuntimeError("no")

    file = save(tmp_path / "x.jpg", smooth())
    expected = read_image(file)
    monkeypatch.setattr(images, "decode_jpeg", refuse)
    assert torch.equal(read_image(file), expected)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    monkeypatch.undo()
    with pytest.raises(DataError, match="damaged or cut short"):
        read_image(file)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pixel_of_a_fraction_is_the_mean_of_those_that_it_stands_for(
    tmp_path: Path, mode: str, orientation: int
) -> None:
    file = save(tmp_path / "x.jpg", smooth(), mode, orientation, quality=98, subsampling=0)
    whole = read_image(file)
    height, width = whole.shape[1:]
    for fraction in (2, 4, 8):
        part = read_sample(sample(file, height, width), (height // fraction, width // fraction))
        assert part.shape == (3, height // fraction, width // fraction)
        means = torch.nn.functional.avg_pool2d(whole.float(), fraction)
        assert (part.float() - means).abs().max() <= 4
        assert (part.float() - means).abs().mean() <= 1


@pytest.mark.parametrize(
    ("size_hw", "least_hw", "fraction"),
    [
        *(((304, 400), least, 1) for least in ((153, 200), (152, 201), (500, 500))),
        *(((304, 400), least, 2) for least in ((152, 200), (77, 100), (76, 101))),
        *(((304, 400), least, 4) for least in ((76, 100), (39, 50))),
        *(((304, 400), least, 8) for least in ((38, 50), (1, 1))),
        *(((300, 404), (1, 1), 4), ((302, 400), (1, 1), 2), ((301, 400), (1, 1), 1), ((304, 401), (1, 1), 1)),
    ],
)
def test_no_fewer_pixels_than_are_shown_and_whole_ones(
    tmp_path: Path, size_hw: tuple[int, int], least_hw: tuple[int, int], fraction: int
) -> None:
    file = save(tmp_path / "x.jpg", smooth(*size_hw))
    part = read_sample(sample(file, *size_hw), least_hw)
    assert part.shape[1:] == tuple(side // fraction for side in size_hw)
    if fraction == 1:
        assert torch.equal(part, read_image(file))


def test_other_formats_and_sizes_are_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(smooth()).save(file)
    assert torch.equal(read_sample(sample(file), (10, 10)), read_image(file))
    turned = sample(save(tmp_path / "x.jpg", smooth(), orientation=6))  # boxes drawn on the stored pixels
    assert read_sample(turned, (152, 200)).shape == (3, 152, 200)
    with pytest.raises(DataError, match="but its annotation says"):
        read_sample(replace(turned, height=152, width=200), (10, 10))


def test_training_may_show_less_of_a_large_jpeg_and_evaluation_never(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{index}.jpg", smooth()) for index in range(4)]
    samples = pack(replace(sample(file), image_id=index) for index, file in enumerate(files))
    dataset = Dataset("large", ("a", "b"), (1, 2), samples, read_sample, "")
    spec = DataSpec(short_side=(64, 150), long_side=210, workers=0)
    scaled = spec.model_copy(update={"scaled_jpeg": True})

    def train(spec: DataSpec) -> list[Batch]:
        return list(train_batches(dataset, spec, batch_size=2, seed=0, epoch=0))

    for one, other in zip(train(scaled), train(spec), strict=True):
        assert torch.equal(one.size_hw, other.size_hw)
        assert torch.equal(one.original_hw, other.original_hw)
        assert torch.equal(one.targets.gt_xyxy, other.targets.gt_xyxy)
        difference = (one.images.int() - other.images.int()).abs().float()
        assert 0 < difference.max() <= 8  # rounding, and what JPEG does to the channels' colour
        assert difference.mean() < 1
    for one, other in zip(*(eval_batches(dataset, either, batch_size=2) for either in (scaled, spec)), strict=True):
        assert torch.equal(one.images, other.images)


def test_a_teacher_at_a_larger_scale_sees_all_that_it_would(tmp_path: Path) -> None:
    file = save(tmp_path / "x.jpg", smooth())
    dataset = Dataset("one", ("a", "b"), (1, 2), pack([sample(file)]), read_sample, "")
    spec = DataSpec(short_side=(80, 80), long_side=110, workers=0, flip=0, scaled_jpeg=True)
    (batch,) = train_batches(dataset, spec, batch_size=1, seed=0, epoch=0, teacher_scale=2.0)
    height, width = batch.for_teacher.size_hw[0].tolist()
    assert height > HEIGHT // 2  # a half would not do
    expected = show(read_image(file), View(height, width, is_flipped=False))
    assert torch.equal(batch.for_teacher.images[0, :, :height, :width], expected)
