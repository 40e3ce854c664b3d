"""Recipes: YAML in and out of the configuration, and `--set a.b=c`; errors that name the field and its nearest known name."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from qskd.config import Config
from qskd.config.distillation import DEFAULT, NONE, MethodSettings, settings_class
from qskd.config.section import kinds_in
from qskd.distillation.find import is_built_in
from qskd.errors import QskdError
from qskd.printable import one_line, shown_value
from qskd.redaction import STORE_REMEDY, TRACKING_REMEDY, secret_in
from qskd.untrusted import LARGEST_YAML, READ_AS, parse_yaml

C = TypeVar("C", bound=Config)
log = logging.getLogger("qskd")


def _known_fields(path: Sequence[str | int], tree: Any) -> list[str]:
    """The fields of the section at `path`. tree: the configuration as nested dicts, which says what method a distillation
    section is of."""
    section: type[BaseModel] = Config
    parts = [str(part) for part in path]
    while parts:
        name, default = parts.pop(0), DEFAULT
        tree = _inside(tree, name)
        field = section.model_fields.get(name)
        if field is None:
            return []
        if get_origin(field.annotation) is dict and parts:  # of sections by name, which is their method's by default
            default = parts.pop(0)
            tree = _inside(tree, default)
        found = next(filter(_is_section, kinds_in(field.annotation)), None)
        if found is None:
            return []
        method = str(tree.get("method", default))
        section = settings_class(method) if issubclass(found, MethodSettings) else found
    return list(section.model_fields)


def _inside(tree: Any, name: str) -> Mapping[str, Any]:
    found = tree.get(name) if isinstance(tree, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _explain(error: ValidationError, where: str, tree: Mapping[str, Any]) -> QskdError:
    problems, remedies = [], []
    for problem in error.errors():
        path = list(problem["loc"])
        name = ".".join(str(part) for part in path) or "the whole"
        if problem["type"] == "extra_forbidden":
            known = _known_fields(path[:-1], tree)
            close = difflib.get_close_matches(str(path[-1]), known, n=1)
            problems.append(f"unknown field {name}" + (f" (did you mean {close[0]}?)" if close else ""))
            remedies.append(f"fields there are: {', '.join(known)}")
        else:
            said = (
                "" if isinstance(problem["input"], Mapping) else f" = {shown_value(problem['input'])}"
            )  # a section: too long
            problems.append(f"{name}{said}: {problem['msg'].removeprefix('Value error, ')}")
            if problem["input"] is None and problem["type"] in ("model_type", "dict_type"):
                remedies.append(f"give it a field, or leave {name} out: there is nothing in it")
            if problem["type"] == "string_type" and (kind := _taken_for(problem["input"])):
                if path[-1] == "[key]":  # of a mapping that was made in Python
                    remedies.append(f"write the key in quotes: {shown_value(str(path[-2]))}")
                    continue
                problems[-1] += f": YAML takes the word for {kind} unless it is quoted"
                last, shown = path[-1], '"..."'
                remedies.append(f"write it in quotes, as it stands: {last}: {shown}, or --set '{name}={shown}'")
    return QskdError(where, "; ".join(problems), remedy="; ".join(dict.fromkeys(remedies)) or "correct the field named")


def _taken_for(value: Any) -> str | None:
    """What YAML took a word for, where text belongs; None for what it did not make of a word."""
    if value is None:
        return READ_AS["null"]
    if isinstance(value, bool):
        return READ_AS["bool"]
    return (
        READ_AS["int"] if isinstance(value, int | float) else READ_AS["timestamp"] if isinstance(value, date) else None
    )


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=c` -> (["a", "b"], c); the value is read as YAML, so that 1e-4, [0.5, 0.7] and true are what they look like.
    Nothing after the `=` is the empty text, as for a path that is to be taken away; `null` is YAML's nothing."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise QskdError(
            f"--set {one_line(text)}", "no `=` in it" if not equals else "no field before the `=`", "a.b=value"
        )
    parsed = parse_yaml(value, f"--set {one_line(text)}", "a.b=value, the value in YAML") if value.strip() else ""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value.strip()):  # YAML 1.1 reads 1e-4 as text
        parsed = float(value)
    return name.strip().split("."), parsed


def _copy(value: Any) -> Any:
    """Nested dicts and lists, none of them shared: an alias in a recipe must not be set along with what it stands for."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the nested dict with each `a.b=c` set; whether the names exist is checked by `build`."""
    result: dict[str, Any] = _copy(tree)
    for text in overrides:
        path, value = parse_override(text)
        node = result
        for part in path[:-1]:
            child = node.get(part)
            if child is None:  # a group that may be left out, and was
                child = node[part] = {}
            if not isinstance(child, dict):
                raise QskdError(
                    f"--set {one_line(text)}", f"{part} is not a group of fields", "a dotted path to a field"
                )
            node = child
        node[path[-1]] = value
    return result


def build(tree: dict[str, Any], where: str = "config") -> Config:
    """Nested dict -> Config. Errors name every field that is unknown or wrong, and those that hold a URI's secrets: runs
    write their configuration down, and MLflow shows it."""
    _refuse_secrets(tree, where)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, tree) from None
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        # A validator that was not ready for a value: pydantic makes only ValueErrors of them its own.
        raise QskdError(where, f"a value that no field takes: {error}", "values of the fields' types") from None


def _refuse_secrets(tree: Any, where: str) -> None:
    for field, value in flatten(tree).items() if isinstance(tree, dict) else ():
        for text in _texts(value, field):
            if secret := secret_in(text):
                named = str(field).partition("://")[0] + "://***" if secret_in(str(field)) else field
                found = f"{named}: {secret}, which the run's files, MLflow and logs would all keep"
                remedy = TRACKING_REMEDY if str(field).startswith("tracking.") else STORE_REMEDY
                raise QskdError(where, found, "a URI without credentials", remedy)


def _texts(value: Any, field: object) -> Iterator[str]:
    yield str(field)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, name)


def check_field(name: str, where: str, tree: Mapping[str, Any] | None = None) -> None:
    """QskdError unless the dotted `name` is a field of the configuration. tree: its nested dicts (`to_tree`), whose method
    decides what `distillation` has."""
    *path, last = name.split(".")
    known = _known_fields(path, tree or {})
    if last not in known:
        close = difflib.get_close_matches(last, known, n=1)
        said = f"unknown field {name}" + (f" (did you mean {'.'.join([*path, close[0]])}?)" if close else "")
        raise QskdError(where, said, f"fields there are: {', '.join(known)}" if known else "a field of the recipe")


def replace_fields(config: C, fields: Mapping[str, Any], where: str) -> C:
    """The configuration with these dotted fields set, validated as a whole; a resolved one stays one. QskdError for an unknown
    or wrong one."""
    tree = to_tree(config)
    method = fields.get("distillation.method", config.distillation.method)
    if method != config.distillation.method:  # another one has other fields
        kept = settings_class(str(method)).model_fields
        tree["distillation"] = {k: v for k, v in tree["distillation"].items() if k in kept} | {"method": method}
        config = cast(C, build(tree, where))
    known = to_tree(config)
    for name, value in fields.items():
        check_field(name, where, known)
        *path, last = name.split(".")
        node = tree
        for part in path:
            if node[part] is None:  # a group of fields that may be left out, and was
                node[part] = {}
            node = node[part]
        node[last] = value
    return cast(C, build(tree, where))


def _read(path: str) -> str:
    most = 4 * LARGEST_YAML  # bytes; no more is read of what may be a disk
    if "://" not in path:
        with Path(path).open("rb") as file:
            raw = file.read(most + 1)
    else:
        from qskd.storage.files import read_bytes
        from qskd.storage.places import open_folder

        filesystem, inside = open_folder(path)
        raw = read_bytes(filesystem, inside, path, most + 1)
    if len(raw) > most:
        raise QskdError(path, f"more than {most} bytes", "a recipe in YAML")
    return raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML recipe, a path or a URI (or start from the defaults when `path` is None); apply `a.b=c` overrides."""
    tree: Any = {}
    if path is not None:
        try:
            text = _read(str(path))
        except FileNotFoundError:
            raise QskdError(str(path), "no such recipe", "a YAML file", "see configs/ for examples") from None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that none can be
            raise QskdError(str(path), f"cannot be read: {error}", "a YAML file, UTF-8") from None
        tree = parse_yaml(text, str(path)) or {}
        if not isinstance(tree, dict):
            raise QskdError(str(path), f"a {type(tree).__name__} at the top", "a mapping of config fields")
    _leave_other_method_s(tree, overrides)
    return build(apply_overrides(tree, overrides), str(path) if path else "--set")


def _leave_other_method_s(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Where an override names another method than the recipe, what the recipe says of its own one has no effect and is taken
    out: one recipe serves every method of a comparison. Fields stay that every method has, and those of another reading of
    the same one."""
    section, named = tree.get("distillation"), [parse_override(text) for text in overrides]
    told = [value for field, value in named if field == ["distillation", "method"]]
    if not told or not isinstance(section, dict) or told[-1] == NONE or not isinstance(told[-1], str):
        return
    usual = section.get("method", DEFAULT)
    if usual == told[-1]:
        return
    chosen, kept = settings_class(told[-1]), set(MethodSettings.model_fields)
    if is_built_in(usual) and issubclass(chosen, settings_class(usual)):
        kept |= set(chosen.model_fields)
    if left := sorted(str(name) for name in section if name not in kept):
        words = "distillation.method=%s: what the recipe says of %s's is left out: %s"
        log.warning(words, told[-1], one_line(str(usual)), one_line(", ".join(left)))
        tree["distillation"] = {name: value for name, value in section.items() if name in kept}


def to_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dicts and lists, ready for YAML or JSON."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


def changes(config: Config) -> dict[str, Any]:
    """The nested dict of what differs from the defaults: the shortest recipe that builds `config`."""

    def differing(tree: dict[str, Any], default: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            usual = default.get(key) if isinstance(default, dict) else None
            if isinstance(value, dict) and isinstance(usual, dict) and usual:
                found |= {key: inner} if (inner := differing(value, usual)) else {}
            elif value != usual:
                found[key] = value
        return found

    return differing(to_tree(config), defaults_like(config))


def shown_fields(config: Config, *, everything: bool = False) -> str:
    """What a dry run prints of the recipe, as YAML: what differs from the defaults, or every field."""
    if everything:
        return "# every field\n" + to_yaml(config)
    own = yaml.safe_dump(changes(config), sort_keys=False, width=120)
    return f"# what differs from the defaults (every field: --all-fields)\n{own}"


def defaults_like(config: Config) -> dict[str, Any]:
    """The configuration's tree as if nothing had been said but the methods: a section's defaults are its method's."""
    usual = to_tree(Config())
    kind = type(config.distillation)
    own: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            own[name] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    return usual | {"distillation": own | {"method": DEFAULT, "also": {}}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a.b": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
