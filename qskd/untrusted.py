"""Text that anyone may have written -> plain values, or a QskdError: the one place where JSON and YAML are read with limits.

Parsers raise a dozen kinds of exceptions on odd text, and an alias of aliases makes gigabytes of a line. Here each failure
becomes the project's own error, and what is given back is of bounded depth and size, so that who reads on need not care.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

import yaml

from qskd.errors import QskdError
from qskd.printable import one_line, shown_value

DEEPEST = 64  # levels of lists and mappings; a recipe has 5, a manifest 4. Python's own limit lies between 300 and 1000
LARGEST_YAML = 2**20  # characters: a class map of 20,000 names fits, and it is read in two seconds
MOST_NODES = (
    200_000  # of a YAML document with its aliases written out: more than so many characters hold without aliases
)
LONGEST_NUMBER = 100  # characters: 64-bit integers have 20. Python refuses to write integers of more than 4300 digits
LARGEST_MANIFEST = 2**28  # bytes: of ten million images with a problem noted for each tenth
# What YAML 1.1 takes a plain word for, by its tag: no, off and yes; 1, 010 and 1:30; 1.5; 2024-01-31; null and ~.
READ_AS = {"bool": "true or false", "int": "a number", "float": "a number", "timestamp": "a date", "null": "nothing"}
_EXPECTED_JSON, _EXPECTED_YAML = "a JSON file", "a YAML file"
# What a parser raises when the text is to blame. A constructor of YAML's asks for an attribute or an entry that isn't there.
_READERS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def _told(where: str, what: str, expected: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except _READERS as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        reason = " ".join(said.split()) or type(error).__name__
        raise QskdError(where, f"not {what}: {reason}", expected, remedy) from None


def parse_json(
    text: str | bytes, where: str, expected: str = _EXPECTED_JSON, remedy: str = "", what: str = "JSON"
) -> Any:
    """A small document's value. QskdError naming `where` for what is no JSON, nested too deep, or names a key twice.

    Bytes may be UTF-8, UTF-16 or UTF-32. what: the text isn't, in the message: "not a manifest".
    """
    with _told(where, what, expected, remedy):
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        _check_depth(value)
        return value


def parse_large_json(text: str | bytes, where: str, expected: str = _EXPECTED_JSON, remedy: str = "") -> Any:
    """The same at the parser's full speed, for files of hundreds of megabytes: of equal keys the last counts, as elsewhere,
    and depth is the parser's own limit. Values must be looked at with care (`qskd.printable.shown_value`)."""
    with _told(where, "JSON", expected, remedy):
        return json.loads(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown_value(twice)} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"lists and objects nested more than {DEEPEST} deep")
        level = [inner for node in level for inner in (node.values() if isinstance(node, dict) else node)]


# libyaml's parser is five times as fast; its values are the same.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(
    text: str, where: str, expected: str = _EXPECTED_YAML, remedy: str = "", *, text_keys: bool = True
) -> Any:
    """A document's value, whose mappings have text for keys (text_keys=False: any). QskdError naming `where` for what is no YAML,
    has tags of programs' own, names a key twice or has one that YAML takes for something else (`no`, `1`), or is too long, too
    deep or, with its aliases written out, too large."""
    if len(text) > LARGEST_YAML:
        raise QskdError(where, f"{len(text)} characters", f"{expected} of at most {LARGEST_YAML}", remedy)
    with _told(where, "YAML", expected, remedy):
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if text_keys:
                _check_keys(node, where)
            _measure(node, {}, 1)
            return loader.construct_document(node)
        finally:
            loader.dispose()


def _check_keys(root: yaml.Node, where: str) -> None:
    """Every key is text: `no: circle` is a mapping of False, which no field or class is called."""
    todo, seen = [(root, "")], set[int]()
    while todo:
        node, path = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else ""
                kind = READ_AS.get(key.tag.rpartition(":")[2]) if isinstance(key, yaml.ScalarNode) else None
                if kind and node.tag.endswith(":map"):
                    written = one_line(name) or "(nothing)"
                    line = f" (line {key.start_mark.line + 1})" if key.start_mark.line else ""
                    found = f"{path or 'the whole'} has the key {written}{line}, which YAML takes for {kind} unless it is quoted"
                    raise QskdError(where, found, "text for a key", f'write it in quotes: "{one_line(name)}"')
                todo.append((value, f"{path}.{one_line(name)}".lstrip(".")))
        elif isinstance(node, yaml.SequenceNode):
            todo += [(inner, path) for inner in node.value]


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """How many nodes there are below and with this one, and on how many levels, aliases written out.

    known: of nodes seen; (0, 0) while one is open.
    """
    if id(node) in known:
        size, levels = known[id(node)]
        if not size:
            raise ValueError("an alias for something that it is itself part of")
    else:
        known[id(node)] = 0, 0
        inner = _inner(node)
        if inner and depth >= DEEPEST:
            levels = DEEPEST  # refused below
        else:
            below = [_measure(child, known, depth + 1) for child in inner]
            size, levels = 1 + sum(each for each, _ in below), 1 + max((each for _, each in below), default=0)
            known[id(node)] = size, levels
            if size > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES} values, with its aliases written out")
    if depth + levels - 1 > DEEPEST:
        raise ValueError(f"lists and mappings nested more than {DEEPEST} deep")
    return known[id(node)]


def _inner(node: yaml.Node) -> list[yaml.Node]:
    """The nodes of a list or mapping; complains of a key that is there twice, and of a number that none can be."""
    if isinstance(node, yaml.MappingNode):
        names = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if names and (most := names.most_common(1)[0])[1] > 1:
            raise ValueError(f"the key {shown_value(most[0][1])} is there twice")
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(node.value)} characters")
    return []


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number that a float can hold, and not a boolean."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of 400 digits
        return False
