"""Names in any script are drawn with a font that has them, or shown by number, which is said."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import ImageFont
from test_evaluation import tricky

from qskd.evaluation.details import evaluate_in_detail
from qskd.pictures import fonts
from qskd.pictures.evaluated import confusion_picture
from qskd.pictures.plots import draw_boxes

CAT = "猫"


def make_font(path: Path, letters: str) -> None:
    """Each letter is a full square."""
    names = {letter: f"letter{ord(letter)}" for letter in letters}
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(letter): name for letter, name in names.items()})
    builder.setupGlyf(dict.fromkeys((".notdef", *names.values()), glyph))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names.values()), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's fonts are: nowhere else."""
    for name in ("X11FontDirectories", "OSXFontDirectories"):
        monkeypatch.setattr(font_manager, name, [str(tmp_path)])
    monkeypatch.setattr(font_manager, "_get_fontconfig_fonts", lambda: [])
    caches = (fonts._file_of, fonts._others, fonts._tell)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def white(picture: np.ndarray) -> int:
    """Pixels of letters, on a caption of a dark colour: label 4 is blue."""
    return int((picture > 250).all(-1).sum())


def drawn(name: str) -> np.ndarray:
    image = np.full((400, 400, 3), 100, np.uint8)
    return draw_boxes(image, [[50, 100, 300, 300]], [4], None, ["", "", "", "", name])


def test_latin_cyrillic_greek_and_arabic_names_need_no_other_font() -> None:
    for name in ("Straßenbahn, œuvre", "кошка", "γάτα", "قطة", "cafe\u0301", ""):
        path = fonts.font_file(name)
        assert path is not None
        assert Path(path).name == "DejaVuSans.ttf"
        assert fonts.shown_name(name, 3) == name


def test_a_name_that_dejavu_lacks_is_drawn_with_a_font_of_this_machines(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "broken.ttf").write_bytes(b"no font")
    make_font(folder / "other.ttf", "abc")
    make_font(folder / "digitless.ttf", CAT)
    make_font(folder / "squares.ttf", CAT + "0123456789.#")
    assert fonts.font_file(CAT) == str(folder / "squares.ttf")
    assert fonts.shown_name(CAT, 3) == CAT
    font = fonts.font_for(CAT, 20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.size == 20
    assert white(drawn(CAT)) > 50 > white(drawn("i"))  # a full square
    assert not caplog.records


def test_class_names_of_a_matrix_are_drawn_with_a_font_that_has_them(folder: Path) -> None:
    make_font(folder / "squares.ttf", CAT + "0123456789.#")
    said = evaluate_in_detail(*tricky(0))
    named = replace(said, classes=tuple(replace(one, name=CAT * (place + 1)) for place, one in enumerate(said.classes)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter that it has no picture for
        picture = confusion_picture(named)
    assert (picture < 128).all(-1).sum() > (confusion_picture(said) < 128).all(-1).sum()  # full squares


def test_a_name_that_no_font_has_is_shown_by_number_and_that_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qskd"):
        assert fonts.shown_name(f"{CAT} cat", 4) == "#4"
        assert fonts.font_for(CAT, 20) is None
        np.testing.assert_array_equal(drawn(CAT), drawn("#4"))
    assert len(caplog.records) == 1
    assert "CJK" in caplog.text
    assert CAT in caplog.text
    assert "~/.fonts" in caplog.text
