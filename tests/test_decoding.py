"""The one decoder: upright pictures of 8 bits out of every format, orientation and depth, the same in every program."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qskd.datasets.pictures.decoding import decode
from qskd.datasets.views import check_image, decode_image
from qskd.deploy.export import detect_program
from qskd.errors import QskdError

GREY = np.linspace(0, 255, 16 * 24).reshape(16, 24).astype(np.uint8)
COLOUR = np.stack([GREY, 255 - GREY, np.roll(GREY, 5, 1)], axis=2)
# How a camera stores the upright picture so that EXIF's turn brings it back: the inverse of each turn.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif(upright: np.ndarray, kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), kind, exif=exif, **options)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Adam7's passes: first row, first column, and the steps between.
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def png16(values: np.ndarray, late: bytes = b"", interlaced: bool = False) -> bytes:
    """[H, W] or [H, W, 2 to 4] of 0..65535, which Pillow does not write. late: EXIF that follows the pixels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.size // (values.shape[0] * values.shape[1])]
    passes = [values[y::down, x::right] for y, x, down, right in PASSES] if interlaced else [values]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in passes for row in part)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, interlaced)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), *([(b"eXIf", late)] if late else []), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def tiff(values: np.ndarray, kind: int, order: str = "<", photometric: int = 1) -> bytes:
    """Uncompressed, one channel or three. kind: SampleFormat, 1 unsigned, 2 signed, 3 floating point. photometric: of one
    channel, 1 where 0 is black and 0 where it is white."""
    channels = values.shape[2] if values.ndim == 3 else 1
    height, width = values.shape[:2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    three = {258: values.dtype.itemsize * 8, 339: kind}
    beside = 8 + 2 + 12 * 10 + 4
    start = beside + 2 * 2 * channels
    tags = {
        256: width,
        257: height,
        259: 1,
        262: 2 if channels == 3 else photometric,
        273: start,
        277: channels,
        278: height,
    }
    tags |= {279: len(data)}
    entries, extra = b"", b""
    for tag in sorted([*tags, *three]):
        if tag in three and channels == 3:
            entries += struct.pack(order + "HHII", tag, 3, 3, beside + len(extra))
            extra += struct.pack(order + "3H", *[three[tag]] * 3)
        elif tag in three:
            entries += struct.pack(order + "HHIHH", tag, 3, 1, three[tag], 0)
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, tags[tag])
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 10)
    return (head + entries + b"\0\0\0\0" + extra).ljust(start, b"\0") + data


WIDE, WIDE_COLOUR = GREY.astype(np.uint16), COLOUR.astype(np.uint16)
ALPHA = np.full((16, 24, 1), 77, np.uint16)
PALETTE = Image.fromarray(COLOUR).quantize(16)
# What is in the file, and the upright 8-bit picture in it.
KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "8-bit grey": (encoded(Image.fromarray(GREY), "PNG"), GREY),
    "16-bit grey PNG": (png16(WIDE * 257), GREY),
    "12 bits in 16": (png16(np.where(WIDE == 255, 4095, WIDE * 16)), GREY),
    "8 bits in 16": (png16(WIDE), GREY),
    "16-bit grey TIFF": (encoded(Image.fromarray(WIDE * 257), "TIFF"), GREY),
    "16-bit grey TIFF, the other order of bytes": (tiff(WIDE * 257, 1, ">"), GREY),
    "16-bit signed TIFF": (tiff((WIDE * 64).astype(np.int16), 2), GREY),
    "32-bit TIFF": (encoded(Image.fromarray((WIDE * 257).astype(np.int32)), "TIFF"), GREY),
    "16-bit colour PNG": (png16(WIDE_COLOUR * 257), COLOUR),
    "12 bits in 16, colour": (png16(np.where(WIDE_COLOUR == 255, 4095, WIDE_COLOUR * 16)), COLOUR),
    "16-bit colour and transparency": (png16(np.concatenate([WIDE_COLOUR * 257, ALPHA], 2)), COLOUR),
    "16-bit grey and transparency": (png16(np.concatenate([WIDE[..., None] * 257, ALPHA], 2)), GREY),
    "12 bits in 16, grey and transparency": (
        png16(np.concatenate([np.where(WIDE == 255, 4095, WIDE * 16)[..., None], ALPHA * 257], 2)), GREY),
    "12 bits in 16, grey and transparency, interlaced": (
        png16(np.concatenate([np.where(WIDE == 255, 4095, WIDE * 16)[..., None], ALPHA * 257], 2), interlaced=True), GREY),
    "8-bit TIFF whose 0 is white": (tiff(255 - GREY, 1, photometric=0), GREY),
    "16-bit TIFF whose 0 is white": (tiff((255 - WIDE) * 257, 1, photometric=0), GREY),
    "16-bit TIFF whose 0 is white, the other order of bytes": (tiff((255 - WIDE) * 257, 1, ">", photometric=0), GREY),
    "12 bits in 16, whose 0 is white": (tiff(4095 - np.where(WIDE == 255, 4095, WIDE * 16), 1, photometric=0), GREY),
    "float TIFF whose 0 is white": (tiff(1 - GREY.astype(np.float32) / 255, 3, photometric=0), GREY),
    "float TIFF whose 0 is white, the other order of bytes": (
        tiff(1 - GREY.astype(np.float32) / 255, 3, ">", photometric=0), GREY),
    "16-bit colour TIFF": (tiff(WIDE_COLOUR * 257, 1), COLOUR),
    "16-bit colour TIFF, the other order of bytes": (tiff(WIDE_COLOUR * 257, 1, ">"), COLOUR),
    "float TIFF": (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY),
    "1 bit": (encoded(Image.fromarray(GREY).convert("1"), "PNG"), np.asarray(Image.fromarray(GREY).convert("1")) * 255),
    "palette with transparency": (encoded(PALETTE, "PNG", transparency=bytes(range(16))), np.asarray(PALETTE.convert("RGB"))),
    "grey with transparency": (encoded(Image.merge("LA", [Image.fromarray(GREY)] * 2), "PNG"), GREY),
    "colour with transparency": (encoded(Image.fromarray(np.concatenate([COLOUR, COLOUR[..., :1]], 2)), "PNG"), COLOUR),
    "CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    "turned 16-bit PNG": (png16(STORED[6](WIDE) * 257, b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"), GREY),
    **{f"{kind} turned {n}": (with_exif(COLOUR, kind, n), COLOUR) for kind in ("PNG", "TIFF") for n in range(2, 9)},
    **{f"WebP turned {n}": (with_exif(COLOUR, "WEBP", n, lossless=True), COLOUR) for n in range(2, 9)},
}  # fmt: skip
REFUSED: dict[str, tuple[bytes, str]] = {
    "more than 16 bits": (tiff(WIDE.astype(np.int32) * 70000, 2), "values from 0 to 17850000"),
    "negative": (tiff(WIDE.astype(np.int16) - 9, 2), "values from -9 to 246"),
    "floats of 0 to 255": (tiff(GREY.astype(np.float32), 3), r"floating-point pixels from 0 to 255"),
    "no number": (tiff(np.where(GREY > 9, np.nan, 0).astype(np.float32), 3), "floating-point pixels"),
    "no picture": (b"hello", "not a readable image"),
    "cut short": (encoded(Image.fromarray(COLOUR), "PNG")[:-60], "broken"),
    "a bomb": (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 20000, 8, 2, 0, 0, 0))
        + _chunk(b"IEND", b""),
        "30,000 x 20,000 pixels",
    ),
}


@pytest.fixture(scope="module")
def detect() -> SimpleNamespace:
    """The exported detect.py, as its text says it."""
    names: dict[str, Any] = {"__name__": "detect"}
    exec(compile(detect_program(), "detect.py", "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_seen_as_it_is_by_every_program(kind: str, detect: SimpleNamespace) -> None:
    data, expected = KINDS[kind]
    expected = np.broadcast_to(expected[..., None], COLOUR.shape) if expected.ndim == 2 else expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(data, "x")
        seen = check_image(data, "x")
    assert found.mode == "RGB"
    rounding = 1 if "12 bits" in kind or "signed" in kind else 0  # 4095 / 16 is no whole number
    np.testing.assert_allclose(np.asarray(found).astype(int), expected, rtol=0, atol=rounding)
    np.testing.assert_array_equal(np.asarray(detect.decode(data).rgb), np.asarray(found))
    assert seen.upright == (24, 16)
    assert (seen.orientation != 1) == ("turned" in kind)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_seen_upright(orientation: int) -> None:
    data = with_exif(np.kron(COLOUR, np.ones((4, 4, 1), np.uint8)), "JPEG", orientation, quality=100, subsampling=0)
    found = np.asarray(decode_image(data, "x")).astype(int)
    assert np.abs(found - np.kron(COLOUR, np.ones((4, 4, 1), np.uint8))).mean() < 4
    seen = check_image(data, "x")
    assert (seen.upright, seen.orientation) == ((96, 64), orientation)
    assert seen.stored == ((64, 96) if orientation >= 5 else (96, 64))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_one_program_refuses_all_refuse(kind: str, detect: SimpleNamespace) -> None:
    data, found = REFUSED[kind]
    refusing: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: decode_image(data, "photo.png"), QskdError),
        (lambda: check_image(data, "photo.png"), QskdError),
        (lambda: detect.decode(data), detect.PictureError),
    ]
    for call, error in refusing:
        with pytest.raises(error, match=found) as raised:
            call()
        assert "expected" in str(raised.value)


def test_a_bomb_is_refused_with_its_size_the_limit_and_what_to_do() -> None:
    with pytest.raises(QskdError) as raised:
        check_image(REFUSED["a bomb"][0], "huge.png")
    said = str(raised.value)
    assert said.startswith("huge.png: 30,000 x 20,000 pixels")
    assert "at most 178,956,970 pixels" in said
    assert "cut it into tiles" in raised.value.remedy


def test_a_small_part_of_the_range_is_told_and_a_whole_one_is_not() -> None:
    notes = {kind: decode(data).note for kind, (data, _) in KINDS.items()}
    assert "0 to 4095 are used: read as 12 bits" in notes["12 bits in 16"]
    assert "read as 12 bits" in notes["12 bits in 16, colour"]
    assert "read as 8 bits" in notes["8 bits in 16"]
    assert {kind for kind, note in notes.items() if note} == {
        "12 bits in 16",
        "12 bits in 16, colour",
        "12 bits in 16, grey and transparency",
        "12 bits in 16, grey and transparency, interlaced",
        "12 bits in 16, whose 0 is white",
        "8 bits in 16",
        "16-bit signed TIFF",
    }
    dark = encoded(Image.fromarray(GREY.astype(np.float32) / 2550), "TIFF")
    assert "only 0 to 0.1 is used" in decode(dark).note


@pytest.mark.parametrize("kind", ["grey", "colour", "transparent", "float"])
def test_a_range_that_a_hot_pixel_alone_needs_is_told_and_not_clipped(kind: str) -> None:
    values = {"grey": WIDE * 16, "colour": WIDE_COLOUR * 16, "transparent": np.stack([WIDE * 16, WIDE], 2)}
    scale: Any = 65535
    if kind == "float":
        hot, scale = GREY.astype(np.float32) / 255 / 16, 1.0
    else:
        hot = values[kind]
    hot[3, 3] = scale
    data = tiff(hot, 3) if kind == "float" else png16(hot)
    found = decode(data)
    assert found.rgb.getpixel((3, 3)) == (255, 255, 255)
    assert np.asarray(found.rgb).reshape(-1, 3).max(axis=1).tolist().count(255) == 1
    said = f"{3 if kind == 'colour' else 1} of {1152 if kind == 'colour' else 384} values"
    assert said in found.note
    assert "nearly all of the picture lies in a quarter of the range" in found.note


def test_two_hot_pixels_of_a_small_picture_are_a_picture() -> None:
    hot = WIDE * 16
    hot[3, 3:5] = 65535
    assert decode(png16(hot)).note == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0"])
def test_broken_exif_is_no_broken_picture(exif: bytes) -> None:
    data = encoded(Image.fromarray(COLOUR), "JPEG", exif=exif)
    assert decode_image(data, "x").size == (24, 16)
    assert check_image(data, "x").orientation == 1


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_there_is_not_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert decode(encoded(Image.fromarray(COLOUR), "JPEG", exif=exif)).orientation == 1
