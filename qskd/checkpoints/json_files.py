"""JSON that others wrote, read in bounded memory: whatever is in the file, the answer is an object or a QskdError."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from qskd.errors import QskdError
from qskd.untrusted import parse_json

MOST_BYTES = 16 * 2**20  # a configuration of thousands of classes has well under 1 MiB, an index of shards too
_SHOWN = 100
_NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")  # control, half a character, breaks of lines and paragraphs
SAVE_AGAIN = "save the checkpoint again with save_pretrained, or choose another"


def shown(value: Any) -> str:
    """A value as a message may have it: cut short, line breaks and control characters escaped."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print more than 4300 digits
        return f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, dict | list):
        return (
            f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries" if value else str(value)
        )
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def is_printable(text: str, most: int) -> bool:
    """Whether a terminal, a file of lines and a log can have it as it is: at most `most` characters, and none of control."""
    if len(text) > most:
        return False
    # Python's own answer takes a fortieth of the time, but is no for joiners, private characters and such, too.
    return text.isprintable() or not any(unicodedata.category(one) in _NOT_PRINTED for one in text)


def first_line(error: BaseException) -> str:
    """What an exception says, as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:300]) + ("..." if len(text) > 300 else "")


def read_json_file(path: str | Path, most_bytes: int = MOST_BYTES, remedy: str = SAVE_AGAIN) -> dict[str, Any]:
    """The object that a JSON file holds. QskdError, with this remedy, where it holds something else, or is larger than
    `most_bytes`."""
    where = str(path)

    def refused(found: str) -> QskdError:
        return QskdError(where, found, f"a JSON object of at most {most_bytes // 2**20} MiB", remedy)

    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise QskdError(where, f"cannot be read: {error.strerror or error}", "a file that can be read") from error
    if len(content) > most_bytes:
        raise refused(f"more than {most_bytes} bytes")
    said = parse_json(content, where, f"a JSON object of at most {most_bytes // 2**20} MiB", remedy)
    if not isinstance(said, dict):
        raise refused(f"JSON, but {shown(said)}")
    return said
