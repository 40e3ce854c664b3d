"""A font for a text: DejaVu Sans, which matplotlib brings along, or for scripts that it lacks one of this machine's own."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

from qskd.printable import one_line

log = logging.getLogger("qskd")
# Letters of their own width; combining marks and the like are drawn with what stands before them.
_NO_GLYPH = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}
_BESIDE = "0123456789.#"  # scores and numbers stand beside names
_LAST = ("bold", "italic", "oblique", "black", "light", "thin", "condensed", "mono", "serif")


@lru_cache
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, size in pixels."""
    return ImageFont.truetype(_own(bold), size)


def font_for(text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont | None:
    """One that has every letter of the text, or None, with a warning, where no font here has."""
    path = font_file(text, bold)
    return None if path is None else _load(path, size)


def shown_name(name: str, number: int) -> str:
    """A class's name, or, where no font here has it, its number."""
    return f"#{number}" if name and font_file(name) is None else name


def font_file(text: str, bold: bool = False) -> str | None:
    """The file of that font."""
    return _file_of("".join(sorted(_letters(text))), bold)


@lru_cache(maxsize=4096)
def _file_of(letters: str, bold: bool) -> str | None:
    wanted = frozenset(map(ord, letters))
    for path in [_own(bold), *([_own(False)] if bold else []), *(_others() if not wanted <= _has(_own(False)) else ())]:
        if wanted <= _has(path):
            return path
    missing = "".join(letter for letter in letters if ord(letter) not in _has(_own(False)))
    _tell(" and ".join(sorted({unicodedata.name(letter, "unknown").split()[0] for letter in missing})), missing[:12])
    return None


def _letters(text: str) -> set[str]:
    return set(_BESIDE) | {letter for letter in one_line(text) if unicodedata.category(letter) not in _NO_GLYPH}


@lru_cache
def _tell(scripts: str, some: str) -> None:
    """Once for each."""
    log.warning(
        "no font here has %s (%s): pictures show such classes by number, #0 on. Put a font that has them into ~/.fonts or "
        "install one (Debian: fonts-noto-core, fonts-noto-cjk)",
        *(some, scripts),
    )


@lru_cache
def _own(bold: bool) -> str:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@lru_cache
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache
def _others() -> tuple[str, ...]:
    """This machine's fonts, the plain ones first. Looked for when first needed: it takes a moment."""
    from matplotlib import font_manager

    def rank(path: str) -> tuple[int, str]:
        name = Path(path).name.lower()
        return sum(word in name.replace("sansserif", "") for word in _LAST), name

    return tuple(sorted(set(font_manager.findSystemFonts()), key=rank))


@cache
def _has(path: str) -> frozenset[int]:
    """Its letters; none of a file that is no font, or has them as pictures of one size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        ImageFont.truetype(path, 16)
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
