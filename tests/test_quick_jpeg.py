"""JPEGs that simplejpeg decodes for a GPU's reader: Pillow's pixels, bit for bit, and Pillow itself for all that is not plain."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qskd.config import ResizeConfig
from qskd.datasets.pictures.cuts import planned
from qskd.datasets.pictures.quick_jpeg import decoded_into, state
from qskd.datasets.views import View, decode_image
from qskd.errors import QskdError
from tests.test_decoding import with_exif

SAMPLE = Path(__file__).parents[2] / "shared" / "coco-sample"
RANDOM = np.random.default_rng(3)
PHOTOGRAPH = np.cumsum(np.cumsum(RANDOM.integers(-4, 5, (61, 83, 3)), 0), 1).clip(0, 255).astype(np.uint8)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def quick(encoded: bytes, size: tuple[int, int] = (61, 83)) -> np.ndarray | None:
    out = np.empty(3 * size[0] * size[1], np.uint8)
    return out.reshape(*size, 3) if decoded_into(encoded, size, out) else None


def pillows(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_it_is_at_work_here() -> None:
    assert state() == "ok"


@pytest.mark.parametrize("quality", [5, 50, 95, 100])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
def test_pixels_are_pillows(quality: int, options: dict[str, Any]) -> None:
    encoded = jpeg(Image.fromarray(PHOTOGRAPH), quality=quality, **options)
    found = quick(encoded)
    assert found is not None
    assert (found == pillows(encoded)).all()


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the COCO sample is not beside the repository")
def test_pixels_of_photographs_are_pillows() -> None:
    quickly = 0
    for path in sorted(SAMPLE.rglob("*.jpg")):
        expected = pillows(encoded := path.read_bytes())
        found = quick(encoded, expected.shape[:2])
        quickly += found is not None
        assert found is None or (found == expected).all(), path.name
    assert quickly > 100


def not_plain() -> dict[str, bytes]:
    colour = Image.fromarray(PHOTOGRAPH)
    whole = jpeg(colour)
    png = io.BytesIO()
    colour.save(png, "PNG")
    return {
        "grey": jpeg(colour.convert("L")),
        "cmyk": jpeg(colour.convert("CMYK")),
        "rgb, not ycbcr": jpeg(colour, keep_rgb=True),
        "lying on its side": with_exif(PHOTOGRAPH, "JPEG", 6),
        "mirrored": with_exif(PHOTOGRAPH, "JPEG", 2),
        "without its end": whole[:-2],
        "cut": whole[: len(whole) // 2],
        "nothing": b"",
        "no picture": b"\xff\xd8\xff" + bytes(50),
        "png": png.getvalue(),
        "of another size": jpeg(colour.resize((40, 30))),
    }


@pytest.mark.parametrize("kind", not_plain())
def test_what_is_not_plain_is_left_to_pillow(kind: str) -> None:
    assert quick(not_plain()[kind]) is None


@pytest.mark.parametrize("kind", ["plain", *not_plain()])
def test_a_reader_ships_the_same_with_and_without_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = not_plain().get(kind, jpeg(Image.fromarray(PHOTOGRAPH)))
    plan = planned((61, 83), View.IDENTITY, [ResizeConfig(size=32)], finish=False)
    assert plan.is_raw

    def shipped() -> tuple[object, bytes]:
        out = np.zeros(plan.nbytes, np.uint8)
        try:
            size: object = plan.fill(encoded, "here", out)
        except QskdError as error:
            return str(error), b""
        return size, out.tobytes() if size == plan.size else b""

    with_it = shipped()
    monkeypatch.setattr("qskd.datasets.pictures.cuts.decoded_into", lambda *_: False)
    assert shipped() == with_it


def test_without_the_library_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    state.cache_clear()
    try:
        assert "not there" in state()
        assert quick(jpeg(Image.fromarray(PHOTOGRAPH))) is None
    finally:
        state.cache_clear()


def test_a_library_of_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    exact = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **kwargs: exact(*args, **kwargs) ^ 1)
    state.cache_clear()
    try:
        assert "other pixels" in state()
    finally:
        monkeypatch.undo()
        state.cache_clear()
    assert state() == "ok"


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"subsampling": 2, "progressive": True}])
def test_of_damaged_files_it_decodes_those_alone_whose_pixels_are_pillows(options: dict[str, Any]) -> None:
    random, whole = np.random.default_rng(1), jpeg(Image.fromarray(PHOTOGRAPH), quality=85, **options)
    quickly = 0
    for _ in range(200):
        damaged = bytearray(whole)
        at = int(random.integers(2, len(whole)))
        damaged[at : at + int(random.integers(0, 2))] = random.bytes(int(random.integers(0, 4)))
        found = quick(bytes(damaged))
        if found is not None:
            quickly += 1
            assert (found == np.asarray(decode_image(bytes(damaged), "here"))).all()
    assert 20 < quickly < 200
