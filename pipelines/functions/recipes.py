"""What the verbs take as functions: a recipe in any form, and whether they print."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from qskd.config import Config

Recipe: TypeAlias = (
    "str | Path | Mapping[str, Any] | Config | None"  # a YAML file or URI, its fields, or what these became
)
Fields: TypeAlias = Mapping[str, Any] | Sequence[str]  # {"a.b": value}, or texts "a.b=value" as after --set
Folder: TypeAlias = str | os.PathLike[str]


def configuration(recipe: Recipe, set: Fields, methods: Sequence[Folder]) -> Config:
    from qskd.config import Config
    from qskd.config.recipe import apply_overrides, build, load
    from qskd.distillation.find import add_folder

    for folder in reversed(list(methods)):
        add_folder(os.fspath(folder))
    texts = list(set)
    if isinstance(set, Mapping):
        texts = [f"{name}={json.dumps(value, default=os.fspath)}" for name, value in set.items()]
    if isinstance(recipe, Config):  # of what was left at its default, other fields may decide
        return build(apply_overrides(recipe.model_dump(mode="json", exclude_unset=True), texts), "recipe")
    if isinstance(recipe, Mapping):
        return build(apply_overrides(json.loads(json.dumps(recipe, default=os.fspath)), texts), "recipe")
    return load(None if recipe is None else os.fspath(recipe), texts)


@contextlib.contextmanager
def unless(verbose: bool) -> Iterator[None]:
    """Without what the verb prints on standard output; warnings are logged as ever."""
    if verbose:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
