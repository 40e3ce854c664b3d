"""Odd values and texts for fuzz tests, and what every one of them must end in."""

from __future__ import annotations

import copy
import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from PIL import Image

from qskd.errors import QskdError

MOST_MB = 1500  # that all examples of a file together may add to the process
EXAMPLES = int(os.environ.get("QSKD_FUZZ_EXAMPLES", "40"))  # of each property; thousands to look for new faults
SEED = os.environ.get("QSKD_FUZZ_SEED", "")  # empty: the same examples each time
DEEP = "@deep@"  # in the JSON text it becomes a list in lists, deeper than json.dumps would write
NAMES = (
    *(
        "",
        " ",
        "cat",
        "a" * 300,
        "b" * 100_000,
        "a/" * 3000 + "c",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x00",
        "a\x00b",
    ),
    *(
        "line\nbreak",
        "carriage\rreturn",
        "tab\tstop",
        "\ud800",
        "x\udfffy",
        "[red]markup[/red]",
        "[/nothing]",
        "$x^{2",
        "日本",
    ),
    *("<script>alert(1)</script>", "a|b", "../up", "/etc/passwd", "..", ".", "CON", "\u202egnp.exe", "\u2028", "%s{0}"),
    *("🦊" * 50, "-rf", "~", "https://host/x", "s3://bucket/x", "file:///etc", "\ufeff", "é", "null", "1e999", "a: b"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70, -(2**63), 10**12, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
)
# Bytes that are no JSON, or not the JSON that is asked for.
RAW = (
    *(
        b"",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"\xff",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"{",
        b"\x00" * 9,
        b"NaN",
    ),
    *(b"[" * 200_000, b'{"a":' * 200_000, b'{"images": null, "annotations": [], "categories": []}', b"1" * 5000),
    b'{"images": [], "images": [], "annotations": [], "categories": [{"id": 1, "name": "\xed\xa0\x80"}]}',
)
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.text(max_size=12))
VALUES = st.one_of(
    SCALARS,
    st.just(DEEP),
    st.lists(SCALARS, max_size=5),
    st.dictionaries(st.sampled_from(["id", "name", "a", ""]), SCALARS, max_size=3),
    st.lists(st.lists(SCALARS, max_size=2), max_size=2),
)


def bounded(test: Callable[..., Any]) -> Callable[..., Any]:
    """Hypothesis's settings: the same examples each time, a limit for each, nothing kept on disk."""
    found = settings(
        max_examples=EXAMPLES,
        derandomize=not SEED,
        deadline=timedelta(seconds=20),
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(test)
    return seed(int(SEED))(found) if SEED else found


def every(decorators: Iterable[Any]) -> Callable[[Any], Any]:
    """All of them, one after the other."""
    return lambda test: functools.reduce(lambda inner, decorator: decorator(inner), decorators, test)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested dicts and lists."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [*([path] if path else []), *(found for key, value in inner for found in places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with a few values replaced, by some of VALUES, dropped, or put under another key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = places(tree)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        node = tree
        for key in path:
            node = node[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "repeat"]))
        if how == "drop":
            del node[last]
        elif how == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(NAMES))] = node.pop(last)
        elif how == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        else:
            node[last] = draw(VALUES)
    return tree


def with_depth(text: str) -> str:
    return text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)


COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 8, "height": 6},
        {"id": 9, "file_name": "b.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 2.5], "area": 7.5, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 2, "bbox": [0.5, 0, 7, 6], "iscrowd": 1},
    ],
    "categories": [{"id": 5, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
}


def picture_folder(folder: Path) -> Path:
    """A new folder with the pictures that COCO lists."""
    folder.mkdir()
    for entry in COCO["images"]:
        Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(folder / entry["file_name"])
    return folder


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]")


def ends_well(action: Callable[[], Any]) -> Any:
    """The action's result, or None after a QskdError whose message is short, and harmless to a terminal."""
    try:
        return action()
    except QskdError as error:
        said = str(error)
        assert len(said) < 4 * 40_000 + 100
        assert not _CONTROL.search(said), repr(said)
        said.encode()
        return None


def resident_mb() -> float:
    """The most that this process held so far."""
    scale = 1024 if sys.platform != "darwin" else 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
