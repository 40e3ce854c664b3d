"""Spaces by name: a module of this package, or a path to a .py file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qskd.config import Config
from qskd.errors import QskdError
from qskd.plug_ins import tell_code_is_run
from search_spaces._trials import Trial

CONTRACT = "FIELDS, suggest(trial, config) and recipe_point(config); see docs/search_spaces.md"


@dataclass(frozen=True)
class Space:
    """A space, read. name: what its parameters are named after. source: how to ask for it again, absolute for a file."""

    name: str
    source: str
    fields_of: Callable[[Config], tuple[str, ...]]
    suggest: Callable[[Trial, Config], Mapping[str, Any]]
    recipe_point: Callable[[Config], Mapping[str, Any]]
    may_change_while_training: bool
    why_not: str


def space_names() -> list[str]:
    """The spaces that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name[0] != "_")


def load_space(name: str) -> Space:
    """A space by its name, or by the path of its file. QskdError when there is none or it isn't one."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        return _read(_module_at(path), path.stem, str(path))
    names = space_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise QskdError(
            f"--space {name}",
            "no such search space" + (f" (did you mean {close[0]}?)" if close else ""),
            f"{', '.join(names)}, or a path to a .py file",
        )
    return _read(importlib.import_module(f"search_spaces.{name}"), name, name)


def _module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"search_space_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise QskdError(f"--space {path}", "no such file", "a search space: a .py file with " + CONTRACT)
    tell_code_is_run("--space", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise QskdError(f"--space {path}", f"cannot be imported: {type(error).__name__}: {error}", CONTRACT) from error
    return module


def _read(module: ModuleType, name: str, source: str) -> Space:
    fields = getattr(module, "FIELDS", None)
    missing = [part for part in ("suggest", "recipe_point") if not callable(getattr(module, part, None))]
    named = isinstance(fields, (tuple, list)) and all(isinstance(f, str) for f in fields)
    if not named and not callable(fields):
        missing.insert(0, "FIELDS (a tuple of dotted fields)")
    if missing:
        raise QskdError(f"--space {source}", f"it has no {' and no '.join(missing)}", CONTRACT)
    return Space(
        name=name,
        source=source,
        fields_of=fields if callable(fields) else lambda config: tuple(fields or ()),
        suggest=module.suggest,
        recipe_point=module.recipe_point,
        may_change_while_training=bool(getattr(module, "MAY_CHANGE_WHILE_TRAINING", False)),
        why_not=str(getattr(module, "WHY_NOT_WHILE_TRAINING", "")),
    )
