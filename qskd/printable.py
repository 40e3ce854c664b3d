"""Text of others, made fit for a terminal, a log and a picture: names and values come from files that anyone may have written.

A terminal obeys escape codes, so control characters are shown as what they are (`\\x1b`); lone surrogates can't be encoded at
all; and a name of a million characters would push everything else off the screen.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

LONGEST_WORD = 300  # characters of a message's word, a path most often: file systems allow 255 for each part
LONGEST_LINE = 4000  # a message that names a hundred fields still fits
MOST_LINES, LONGEST_TEXT = 400, 40_000  # a traceback that a worker left behind still fits
LONGEST_NAME = 200  # of one name among others
# All control characters but tab and line feed, what turns the direction of writing round, line separators that are no line
# feeds, and lone surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _cut(text: str, longest: int) -> str:
    """Its beginning and its end, which tells one path from another."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 1]}…{text[-end:]}"


def escaped(text: str) -> str:
    """All of the text, with control characters shown, not obeyed. Line feeds and tabs stay."""
    return _HIDDEN.sub(_escaped, text)


def printable(text: str) -> str:
    """The text with control characters shown, not obeyed, and overlong words, lines and lists of lines cut. Line feeds stay.

    What is printable already comes back as it is.
    """
    lines = _HIDDEN.sub(_escaped, text[: 2 * LONGEST_LINE * MOST_LINES]).split("\n")
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines = [*lines[: half - 1], "…", *lines[-half:]]
    shorter = (_cut(_LONG_WORD.sub(lambda word: _cut(word[0], LONGEST_WORD), line), LONGEST_LINE) for line in lines)
    return _cut("\n".join(shorter), LONGEST_TEXT)


def one_line(text: str, longest: int = LONGEST_NAME) -> str:
    """A name on one line: runs of white space as one space, control characters shown, the middle cut out beyond `longest`."""
    return _cut(_HIDDEN.sub(_escaped, " ".join(_cut(text, 8 * longest).split())), longest)


def shown_path(path: object) -> str:
    """A path on one line, whole: its name may hold line feeds, which would look like lines of ours."""
    return escaped(str(path)).replace("\n", "\\n").replace("\t", "\\t")


class _Bounded(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = LONGEST_NAME
        self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no more than 4300 digits
            return f"an integer of {x.bit_length()} bits"


def shown_value(value: Any) -> str:
    """`repr` of a value that was read, of bounded length and depth."""
    return _cut(_Bounded().repr(value), 5 * LONGEST_NAME)
