"""The fields of a COCO file's entries, one by one: what is wrong with them, and the categories, which all else refers to."""

from __future__ import annotations

from typing import Any

from qskd.datasets.samples import LONGEST_CLASS_NAME, Category
from qskd.errors import QskdError
from qskd.printable import one_line, shown_path, shown_value


def read_categories(entries: list[Any], path: str) -> tuple[Category, ...]:
    """A COCO file's categories, by ascending id. QskdError for what has no id or name of its own. path: for messages."""
    found: dict[int, Category] = {}
    names: dict[str, int] = {}
    remedy = "give every category an id and a name of its own"  # no sample to skip: what a label means is in doubt
    for position, entry in enumerate(entries):
        where = f"{path}: categories[{position}]"
        problem = wrong_field(entry, {"id": int, "name": str})
        if problem:
            raise QskdError(where, problem, "an integer id and a name", remedy)
        if len(entry["name"]) > LONGEST_CLASS_NAME:
            found_name = f"a name of {len(entry['name'])} characters, {shown_value(entry['name'])}"
            raise QskdError(where, found_name, f"{LONGEST_CLASS_NAME} or fewer", "give it a shorter name")
        group = entry.get("supercategory")
        known_group = is_a(group, str) or is_a(group, int)  # free text, which nothing depends on
        category = Category(entry["id"], entry["name"], one_line(str(group)) if known_group else "")
        if category.id in found:
            other = found[category.id].name
            both = f"id {category.id} is both {shown_value(other)} and {shown_value(category.name)}"
            raise QskdError(where, both, "one name", remedy)
        if category.name in names:
            both = f"{names[category.name]} and {category.id}"
            raise QskdError(where, f"name {shown_value(category.name)} has two ids, {both}", "one id", remedy)
        found[category.id], names[category.name] = category, category.id
    if not found:
        raise QskdError(path, "no categories", "at least one", "give the instances file")
    return tuple(found[key] for key in sorted(found))


def is_a(value: Any, kind: type) -> bool:
    """Whether a value of JSON is an integer (of 64 bits), a number, a text that is not empty, or another kind."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if kind is float:
        # An integer of 400 digits is no number that floats know.
        return isinstance(value, float) or is_a(value, int)
    if kind is str:  # JSON can spell half a surrogate pair, which is no text
        return isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, kind)


def wrong_field(entry: Any, needed: dict[str, type]) -> str:
    """What is wrong with the entry's fields, or the empty string."""
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__} instead of an object"
    for key, kind in needed.items():
        if key not in entry:
            return f"no `{key}`"
        if not is_a(entry[key], kind):
            return f"`{key}` is {shown_value(entry[key])}"
    return ""


def some(values: list[Any], limit: int = 12) -> str:
    """The first of them on a line, and how many there are."""
    return ", ".join(map(shown_path, values[:limit])) + (f", ... ({len(values)} in all)" if len(values) > limit else "")
