"""A COCO file read piece by piece: of a file of gigabytes one entry is in memory at a time, and a few megabytes of text.

Whatever is out of the ordinary (no JSON, another encoding, a key twice, a list that is none) is `Irregular`: the reader then parses
the file as a whole, which says what is wrong, where in it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

LISTS = ("images", "annotations", "categories")
_PIECE = 2**22  # bytes
_WINDOW = 2**17  # characters
_SPACE = " \t\n\r"


class Irregular(Exception):
    """Not a plain COCO file in UTF-8."""


class CocoFile:
    """Its lists, each entry as JSON has it. `images` is gone through first, to its end; `categories`, how many annotations there
    are, and the file's sha256 are known then. Whatever reading raises (OSError) passes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.categories: list[Any] = []
        self.num_annotations = 0
        self.sha256 = ""

    def images(self) -> Iterator[Any]:
        text, seen = _Text(self._path), set[str]()
        for key, entries in _entries(text, seen):
            if key == "images":
                yield from entries
            elif key == "categories":
                self.categories += entries
            else:
                self.num_annotations += len(entries)
        if not seen.issuperset(LISTS):
            raise Irregular
        self.sha256 = text.digest.hexdigest()

    def annotations(self) -> Iterator[Any]:
        text = _Text(self._path)
        for key, entries in _entries(text, set()):
            if key == "annotations":
                yield from entries
        if text.digest.hexdigest() != self.sha256:  # written to meanwhile: what was read is of two files
            raise Irregular


class ListFile:
    """A file that is one list, as COCO's results are. Its sha256 is known when it was gone through."""

    def __init__(self, path: Path) -> None:
        self._path, self.sha256 = path, ""

    def entries(self) -> Iterator[list[Any]]:
        """Some at once. `Irregular` and OSError as of `CocoFile`."""
        text = _Text(self._path)
        try:
            if text.next_mark() != "[":
                raise Irregular
            yield from _elements(text)
            if text.next_mark():
                raise Irregular
        except (ValueError, RecursionError):
            raise Irregular from None
        finally:
            text.close()
        self.sha256 = text.digest.hexdigest()


class _Text:
    """The file's text from where it was read to, and all of it hashed."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # a pipe can be read but once
            raise Irregular
        self._file = path.open("rb")
        self.digest = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self.held, self.at, self.is_all = "", 0, False

    def close(self) -> None:
        self._file.close()

    def more(self) -> None:
        """Hold more than now: as much again, so that a long entry is not looked through again and again."""
        piece = self._file.read(max(_PIECE, len(self.held) - self.at))
        self.digest.update(piece)
        if not piece:
            self.is_all = True
        self.held, self.at = self.held[self.at :] + self._decoder.decode(piece, not piece), 0

    def next_mark(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            held, at = self.held, self.at
            while at < len(held) and held[at] in _SPACE:
                at += 1
            self.at = at
            if at < len(held) or self.is_all:
                return held[at : at + 1]
            self.more()

    def take(self, marks: str) -> str:
        """The next character that is no space, one of these."""
        found = self.next_mark()
        if not found or found not in marks:
            raise Irregular
        self.at += 1
        return found

    def value(self) -> Any:
        self.next_mark()
        while True:
            try:
                value, end = _SCAN(self.held, self.at)
                if end < len(self.held) or self.is_all:  # else a number may go on
                    self.at = end
                    return value
            except (JSONDecodeError, StopIteration):
                if self.is_all:
                    raise Irregular from None
            self.more()


_SCAN: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def _entries(text: _Text, seen: set[str]) -> Iterator[tuple[str, list[Any]]]:
    """(list, some of its entries) of all of LISTS. seen: gets the keys."""
    try:
        text.take("{")
        while True:
            if text.next_mark() != '"':
                raise Irregular
            key = text.value()
            if key in seen:
                raise Irregular
            seen.add(key)
            text.take(":")
            if text.next_mark() == "[":
                yield from ((key, entries) for entries in _elements(text) if key in LISTS)
            elif key in LISTS:
                raise Irregular
            else:
                text.value()
            if text.take(",}") == "}":
                break
        if text.next_mark():
            raise Irregular
    except (ValueError, RecursionError):  # UTF-8 that is none; a number of thousands of digits; nested too deep
        raise Irregular from None
    finally:
        text.close()


def _elements(text: _Text) -> Iterator[list[Any]]:
    """A list's entries, as many at once as are found to be whole."""
    text.take("[")
    if text.next_mark() == "]":
        text.at += 1
        return
    one_by_one = 0  # characters from here to the end for which that is to be so
    while True:
        text.next_mark()
        before = text.at, len(text.held)
        several = [] if one_by_one > 0 else _several(text)
        yield several or [text.value()]
        if not several:  # what was held may be less, and more, than before
            passed = text.at - before[0] if len(text.held) == before[1] else _WINDOW
            one_by_one = (one_by_one if one_by_one > 0 else _WINDOW) - passed
        if text.take(",]") == "]":
            return


def _several(text: _Text) -> list[Any]:
    """The entries from here to an end of one, within a window; none where what looks like an end lies in an entry. It can't be
    taken for one by mistake: a beginning of a list that is a whole list when it is closed holds whole entries."""
    end = max(text.held.rfind(mark, text.at, text.at + _WINDOW) for mark in ("}, {", "},{", "},\n", "},\r\n"))
    if end < 0:
        return []
    try:
        entries: list[Any] = json.loads(f"[{text.held[text.at : end + 1]}]")
    except JSONDecodeError:
        return []
    text.at = end + 1
    return entries
