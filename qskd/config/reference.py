"""The tables of docs/recipe.md, made of the configuration itself: types and defaults from its fields, meanings from their
comments, what a section is from its docstring.

python -m qskd.config.reference docs/recipe.md      # in a clone: renews what stands between the page's marks

A comment belongs to a field that it stands behind, or above without a line between. So it is written once, where whoever
changes the field sees it, and pydantic's own descriptions are not needed.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from qskd.config import Config
from qskd.config.distillation import DEFAULT, MethodSettings, settings_class
from qskd.config.section import Section
from qskd.distillation.find import method_names

RECIPE = "configs/finetuned_rtdetr.yaml"
RECIPE_MARKS = ("<!-- qskd.config.reference: recipe -->", "<!-- end of recipe -->")
FIELD_MARKS = ("<!-- qskd.config.reference: fields -->", "<!-- end of fields -->")
KINDS = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}


def comments_of(section: type[Section]) -> dict[str, str]:
    """Field name -> its comment, as one line; empty where there is none. What a section inherits keeps its comment."""
    found: dict[str, str] = {}
    for each in reversed([kind for kind in section.__mro__ if issubclass(kind, Section) and kind is not Section]):
        said = _own_comments(each)
        found |= {name: comment for name, comment in said.items() if comment or name not in found}
    return found


def _own_comments(section: type[Section]) -> dict[str, str]:
    source = inspect.getsource(section)
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            found[node.target.id] = " ".join(comments[line] for line in range(first, last + 1) if line in comments)
    return found


def sections_of(section: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted path, class) of a section and of those in it, in the order of their fields. What a method other than the
    default one has under `distillation` comes with the method's name behind the path."""
    yield path, section
    for name, field in section.model_fields.items():
        if (inner := _section_in(field.annotation)) is None:
            continue
        inside = f"{path}.{name}".lstrip(".") + (".NAME" if get_origin(field.annotation) is dict else "")
        if inner is not MethodSettings:
            yield from sections_of(inner, inside)
            continue
        yield from sections_of(settings_class(DEFAULT), inside)
        for method in method_names():
            if method != DEFAULT:
                yield from sections_of(settings_class(method), f"{inside} with method: {method}")


def _section_in(annotation: Any) -> type[Section] | None:
    """A section, or one that may be left out."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _bounded(kind: type, metadata: list[Any]) -> str:
    bounds = {name: getattr(limit, name) for limit in metadata for name in ("gt", "ge", "le") if hasattr(limit, name)}
    if kind is int and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le")
    if low is None:
        return KINDS[kind]
    if high is None:
        return f"{KINDS[kind]} {'≥' if 'ge' in bounds else '>'} {low:g}"
    return f"{'above ' if 'gt' in bounds else ''}{low:g} to {high:g}"


def type_of(annotation: Any, metadata: list[Any]) -> str:
    """A field's type in a reader's words."""
    if hasattr(annotation, "__metadata__"):  # Annotated, inside a tuple
        inner = FieldInfo.from_annotation(annotation)
        return type_of(inner.annotation, inner.metadata)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments if choice)
    if origin is tuple:
        return f"list: {type_of(arguments[0], [])}"
    if origin is dict:
        values = [KINDS[kind] for kind in (arguments[1], *get_args(arguments[1])) if kind in KINDS]
        nothing = " or `null`" if type(None) in get_args(arguments[1]) else ""
        return f"{KINDS[arguments[0]]}: {(values or ['section'])[0]}{nothing}"
    if _section_in(annotation) is not None:
        return "section, or `null`"
    if type(None) in arguments:
        return f"{type_of(next(kind for kind in arguments if kind is not type(None)), metadata)}, or `null`"
    return _bounded(annotation, metadata)


def default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        return "none"
    if default == "":
        return "empty"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`".replace('"', "")


def _table(section: type[Section]) -> str:
    rows, comments = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"], comments_of(section)
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue  # a table of its own
        of_a_method = issubclass(section, MethodSettings) and section not in (MethodSettings, settings_class(DEFAULT))
        if of_a_method and name in MethodSettings.model_fields:
            continue  # what every method has is in the default one's table
        if section.__base__ not in (Section, MethodSettings) and name not in section.__annotations__:
            continue  # of a section that is another one's with other defaults: what differs alone
        said = _linked(comments[name]).replace("|", r"\|")
        rows.append(f"| `{name}` | {type_of(field.annotation, field.metadata)} | {default_of(field)} | {said} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _linked(text: str) -> str:
    """References to other pages as links, as seen from docs/."""
    text = re.sub(r"\bdocs/(\w+)\.md", r"[\1](\1.md)", text)
    return re.sub(r"\bequations\.md (\d[\d.]*)", r"[equations.md \1](equations.md)", text)


def reference() -> str:
    """A heading, what it is for and a table for each section; where two paths have the same one, both are named once."""
    paths: dict[type[Section], list[str]] = {}
    for path, section in sections_of(Config):
        paths.setdefault(section, []).append(path)
    parts = []
    for section, named in paths.items():
        title = ", ".join(f"`{path}`" for path in named if path) or "The top"
        parts += [f"### {title}", _linked(inspect.cleandoc(section.__doc__ or "")), _table(section)]
    return "\n\n".join(part for part in parts if part)


def _between(page: str, marks: tuple[str, str], text: str) -> str:
    before, found, rest = page.partition(marks[0])
    _, ended, after = rest.partition(marks[1])
    if not (found and ended):
        raise ValueError(f"no {marks[0]} ... {marks[1]}")
    return f"{before}{marks[0]}\n\n{text.strip()}\n\n{marks[1]}{after}"


def renewed(page: str, recipe: str) -> str:
    """The page with the recipe and the tables as they are now between its marks."""
    return _between(_between(page, RECIPE_MARKS, f"```yaml\n{recipe.strip()}\n```"), FIELD_MARKS, reference())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renewed(target.read_text(encoding="utf-8"), Path(RECIPE).read_text(encoding="utf-8")))
