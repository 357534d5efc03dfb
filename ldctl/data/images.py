"""Pixels of image files, and what can be told of a file without decoding it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ldctl.errors import DataError
from ldctl.samples import Sample

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # its makers mean to remove it; Pillow gives the same pixels
    decode_jpeg = None

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_TAIL_BYTES = 4096  # enough for the padding that cameras and file systems leave behind an image
_ZERO_BYTES = 16  # a run that compressed data does not end in
_FRACTIONS = (8, 4, 2)  # of its size at which JPEG can be decoded
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


# EXIF orientation: whether rows and columns change places, and which axes are then mirrored, to turn an image upright.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file say.

    Attributes:
        upright_hw: Height and width in pixels, turned as EXIF says.
        stored_hw: Height and width in pixels, as stored.
        format: Pillow's name of the file format.
    """

    upright_hw: tuple[int, int]
    stored_hw: tuple[int, int]
    format: str


def read_sample(sample: Sample, least_hw: tuple[int, int] | None = None) -> UInt8[Tensor, "3 H W"]:
    """Read the pixels of a sample whose `file` is a path, of the sample's size.

    The image is turned upright as its EXIF orientation says, as OpenCV and annotation tools do; but not when only the
    stored size is the annotation's: then the boxes were drawn on the stored pixels.

    Args:
        sample: The image.
        least_hw: If given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that is not below this height
            and width and a whole number of pixels, so that boxes stay where they are. Each pixel is then about the mean
            of those that it stands for.

    Raises:
        DataError: The file cannot be read, or has another size than the annotations say: boxes would be misplaced.
    """
    with _open(Path(sample.file)) as image:
        header = _header(image)
        check_size(sample, header)
        turn = header.upright_hw == (sample.height, sample.width)
        if least_hw and turn and _orientation(image) in _QUARTER_TURNS:
            least_hw = least_hw[::-1]
        fraction = _fraction(header.stored_hw, least_hw) if least_hw and header.format == "JPEG" else 1
        if fraction > 1:
            height, width = header.stored_hw
            image.draft(None, (width // fraction, height // fraction))
        return _pixels(image, sample.file, turn=turn, is_whole=fraction == 1)


def _fraction(size_hw: tuple[int, int], least_hw: tuple[int, int]) -> int:
    """Return by how much to divide a size so that it stays whole and not below another one."""
    sides = tuple(zip(size_hw, least_hw, strict=True))
    return next((f for f in _FRACTIONS if all(side % f == 0 and side // f >= least for side, least in sides)), 1)


def read_image(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Read an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped.

    Raises:
        DataError: The file is missing, damaged, no image, or has more than 178,956,970 pixels.
    """
    with _open(path) as image:
        return _pixels(image, str(path), turn=True)


def read_header(path: Path) -> Header:
    """Read size and format; decodes nothing.

    Raises:
        DataError: The file is missing or no image.
    """
    with _open(path) as image:
        return _header(image)


def check_size(sample: Sample, header: Header) -> None:
    """Refuse an image that has not the size in its annotation, neither upright nor as stored.

    Raises:
        DataError: Names both sizes.
    """
    if (sample.height, sample.width) not in (header.upright_hw, header.stored_hw):
        height, width = header.upright_hw
        raise DataError(
            f"{sample.file}: the image is {width} x {height} px, but its annotation says "
            f"{sample.width} x {sample.height}: mend the annotation or leave the image out"
        )


def check_file(path: Path) -> Header:
    """Tell whether an image can be read, decoding as little as that takes.

    A JPEG costs its first and last bytes: a whole one ends in its end marker. A PNG that ends in its end marker is read
    through, to compare the checksums of its chunks. What has no such marker, or is of another format, is decoded, by
    what also reads it in training; a strange but readable file therefore passes.

    Not seen: damage between the first and last bytes of a JPEG, that is wrong or missing pixel data before the end
    marker. It carries no checksum; decoding reports some of it, and turns the rest into wrong pixels.

    Raises:
        DataError: The file is missing, truncated, damaged or no image.
    """
    header = read_header(path)
    last = _LAST_BYTES.get(header.format)
    if last is None or not _last_bytes(path, _TAIL_BYTES).rstrip(b"\0").endswith(last):
        if last is not None:
            _check_zeros(path, last)
        read_image(path)
    if header.format == "PNG":
        _check_sums(path)
    return header


def _check_sums(path: Path) -> None:
    """Refuse a PNG of which a chunk does not match its checksum, which decoding would not notice."""
    with _open(path) as image:
        try:
            image.verify()
        except Exception as error:  # as in `_open`
            problem = _one_line(error, path)
            raise DataError(f"{path}: the image is damaged: {problem}: replace or remove it") from error


def _check_zeros(path: Path, last: bytes) -> None:
    """Refuse a file whose missing end is zeros, as a broken download leaves it: JPEG decodes them to grey."""
    content = _last_bytes(path, None)
    written = content.rstrip(b"\0")
    if len(content) - len(written) >= _ZERO_BYTES and not written.endswith(last):
        raise DataError(f"{path}: the image is cut short: its last bytes are zeros: replace or remove it")


def _open(path: Path) -> Image.Image:
    """Open an image; Pillow refuses one whose header asks for more than 178,956,970 pixels (a decompression bomb)."""
    try:
        return Image.open(path, formats=_FORMATS)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image: copy it there or leave it out of the annotations") from None
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise DataError(f"{path}: not a readable image: {_one_line(error, path)}: replace or remove it") from error


def _pixels(image: Image.Image, name: str, *, turn: bool, is_whole: bool = True) -> UInt8[Tensor, "3 H W"]:
    try:
        is_transposed, mirrored = _TURNS.get(_orientation(image), (False, ())) if turn else (False, ())
        is_plain = decode_jpeg and is_whole and image.format == "JPEG" and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(name) if is_plain else None
        if pixels is None:
            pixels = torch.from_numpy(_rgb(image, name)).permute(2, 0, 1)
    except DataError:
        raise
    except Exception as error:  # as above
        problem = _one_line(error, Path(name))
        raise DataError(f"{name}: the image is damaged or cut short: {problem}: replace or remove it") from error
    if is_transposed:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(mirrored) if mirrored else pixels


def _decode_jpeg(name: str) -> UInt8[Tensor, "3 H W"] | None:
    """Decode a JPEG of three or one channels by torchvision, to the same pixels as Pillow in half the time.

    Returns:
        None for what it cannot decode: Pillow can, or says what is wrong.
    """
    try:
        content = torch.from_numpy(np.fromfile(name, dtype=np.uint8))
        pixels: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels


def _rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise DataError(f"{name}: more than 16 bits per pixel: save it with 8 bits")
        grey = (deep >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{name}: floating-point pixels: save it with 8 bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may hold transparency, which a direct conversion warns of
    # np.array, not asarray: torch needs memory that it may write to
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _header(image: Image.Image) -> Header:
    width, height = image.size
    upright = (width, height) if _orientation(image) in _QUARTER_TURNS else (height, width)
    return Header(upright_hw=upright, stored_hw=(height, width), format=image.format or "")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where the header has none."""
    if "exif" not in image.info:  # asking a PNG for EXIF that it has not would decode it whole
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing of the pixels
        return 1


def _last_bytes(path: Path, count: int | None) -> bytes:
    """Return the end of a file; all of it without a count."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0 if count is None else max(size - count, 0))
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}: check the disk and the permissions") from error


def _one_line(error: Exception, path: Path) -> str:
    """Say what went wrong without repeating the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "its bytes are of no known format"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(repr(str(path)), "the file").replace(str(path), "the file")
