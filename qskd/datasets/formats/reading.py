"""What importers read beside their labels: small text files, class names, pictures' sizes, the pictures of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from qskd.datasets.pictures.decoding import IMAGE_FORMATS, orientation_of, says_orientation
from qskd.errors import QskdError
from qskd.printable import shown_path, shown_value
from qskd.untrusted import parse_json, parse_yaml

LARGEST_TEXT = 2**24  # bytes: a label file of 200,000 objects
# Those that no program here decodes are listed too: the reader says so of each, where silence would lose them.
_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .mpo .heic .heif .avif .jp2 .dng .pfm .ppm .pgm"
PICTURES = set(_SUFFIXES.split())


def read_text(path: Path, expected: str, largest: int = LARGEST_TEXT) -> str:
    """A small file's text (UTF-8, a mark at its beginning left out). QskdError when it is no file, too large, or no text."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            raise QskdError(str(path), "no such file", expected, "check the path")
        if (size := path.stat().st_size) > largest:
            raise QskdError(str(path), f"{size} bytes", f"{expected}, of at most {largest}")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise QskdError(str(path), f"can't be read: {reason}", expected, "save it as UTF-8 text") from None


def class_name(value: Any, where: str) -> str:
    """A class name that YAML read. QskdError for what YAML made of a name that should have been written in quotes."""
    if isinstance(value, str) and value:
        return value
    found = f"{shown_value(value)} where a class's name is expected"
    remedy = "write it in quotes: YAML reads no, yes, on, off as truth values, 1 and 010 as numbers and null as nothing"
    raise QskdError(where, found, "text", remedy)


def names_of(value: Any, where: str) -> dict[int, str]:
    """Class index -> name, of a list or a mapping of names as YAML or JSON gives it."""
    expected = "a list of names, or a mapping of class numbers to names"
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise QskdError(where, shown_value(value), expected)
    names: dict[int, str] = {}
    for key, name in value.items():
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31 or number in names:
            raise QskdError(where, f"the class number {shown_value(key)}", expected)
        names[number] = class_name(name, f"{where}, class {number}")
    if len(set(names.values())) < len(names):
        doubled = Counter(names.values()).most_common(1)[0][0]
        raise QskdError(where, f"the name {shown_value(doubled)} is there twice", "one name for each class")
    return names


def read_class_names(path: Path) -> dict[int, str]:
    """Class number -> name: of a text file with a name a line, or of YAML or JSON (`names:`, a list or a mapping)."""
    expected = "class names: a text file with one a line, or YAML or JSON with a list or a mapping"
    text = read_text(path, expected)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
        # names: {0: cat, 1: dog}, as ultralytics writes them
        is_json, where = suffix == ".json", str(path)
        value = parse_json(text, where, expected) if is_json else parse_yaml(text, where, expected, text_keys=False)
        return names_of(value.get("names", value) if isinstance(value, dict) else value, str(path))
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise QskdError(str(path), f"line {lines.index('') + 1} is empty", expected, "remove it, or write the name")
    return names_of(lines, str(path))


def picture_size(file: Path | BinaryIO, where: str) -> tuple[int, int, bool]:
    """(width, height, whether EXIF asks for a quarter turn) of the picture as stored, by its head alone. QskdError when broken."""
    try:
        if isinstance(file, Path) and not os.path.isfile(file):  # a pipe would block
            raise FileNotFoundError
        with Image.open(file, formats=IMAGE_FORMATS) as picture:
            turned = may_be_turned(picture, file) and orientation_of(picture) >= 5
            return picture.width, picture.height, turned and picture.format != "TIFF"  # whose size Pillow turns itself
    except Exception as error:  # Pillow's plugins raise almost anything on broken headers
        missing = isinstance(error, FileNotFoundError)
        found = "no such file" if missing else f"not a readable image ({type(error).__name__})"
        expected = f"a whole {', '.join(IMAGE_FORMATS)} file"
        raise QskdError(where, found, expected, "replace or remove the picture, or pass `--on-error skip`") from None


def may_be_turned(picture: Image.Image, file: Path | BinaryIO) -> bool:
    """False of a PNG that says nothing of it anywhere: Pillow would decode it all to look for EXIF behind the pixels."""
    if picture.format != "PNG":
        return True
    if isinstance(file, Path):
        return says_orientation(file.read_bytes())
    here = file.tell()
    file.seek(0)
    said = says_orientation(file.read())
    file.seek(here)
    return said


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and those in it, by name, in an order that is the same everywhere."""
    found = [path for path in _files_below(folder) if path.suffix.lower() in PICTURES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _files_below(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    # Linked folders are gone into: pictures that lie elsewhere are then refused by name, not lost.
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield from (Path(place) / name for name in files if not name.startswith("."))


def some(values: Iterable[Any], limit: int = 12) -> str:
    """A list for a message, cut."""
    words = [shown_path(value) for value in values]
    return ", ".join(words[:limit]) + (f", ... ({len(words)} in all)" if len(words) > limit else "")


_SAME = ("val", "valid", "validation", "dev")  # what tools call one and the same split


def choose_split(there: Iterable[str], given: str | None, where: str) -> str:
    """The split that `--split` names, or the only one. QskdError with what to type when it is neither."""
    names = sorted(there)
    if given is None:
        if len(names) == 1:
            return names[0]
        raise QskdError(where, f"splits {some(names)}", "one of them", f"add `--split {names[-1]}`")
    for name in (given, *(_SAME if given in _SAME else ())):
        if name in names:
            return name
    raise QskdError("--split", given, f"{some(names) or 'none'}: the splits of {where}")
