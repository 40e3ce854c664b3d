"""What the verbs take as functions: a recipe in any form, and whether they print."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, get_args, get_type_hints

from qskd.errors import QskdError

if TYPE_CHECKING:
    from qskd.config import Config

P = ParamSpec("P")
T = TypeVar("T")
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


def as_the_command(verb: str, door: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Numbers are checked as the command's options of the same names are: QskdError for another type, or one out of range. So is
    what stands for one of some words; and one text where several may stand is refused: it would be taken letter by letter. door: of
    the command's module, where it is not called as the verb is."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*given: P.args, **named: P.kwargs) -> T:
            signature = inspect.signature(function)
            bound = signature.bind(*given, **named)
            for name, value in bound.arguments.items():
                hint = str(signature.parameters[name].annotation)
                if hint.startswith("Literal["):
                    choice(f"qskd.{verb}: {name}", value, *ast.literal_eval(f"({hint[8:-1]},)"))
                if hint.startswith(("Sequence[", "Fields")) and isinstance(value, str | os.PathLike):
                    raise QskdError(f"qskd.{verb}: {name}", repr(value), "several, in a list", f"{name}=[{value!r}]")
            command = importlib.import_module(f"pipelines.{door or verb}").command
            for name, hint in get_type_hints(command, include_extras=True).items():
                if name in bound.arguments:
                    _check_number(f"qskd.{verb}: {name}", bound.arguments[name], hint)
            return function(*given, **named)

        return checked

    return wrap


def _check_number(where: str, value: Any, hint: Any) -> None:
    """hint: a command's option, Annotated with what typer is told of it. Others than numbers are not looked at."""
    kind, *said = get_args(hint) or (hint,)
    kinds = get_args(kind) or (kind,)
    if not {int, float} & set(kinds) or (value is None and type(None) in kinds):
        return
    whole = float not in kinds
    low, high = (next((getattr(each, end, None) for each in said), None) for end in ("min", "max"))
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if is_number and (low is None or value >= low) and (high is None or value <= high):
        return
    expected = "a whole number" if whole else "a number"
    if low is not None:
        expected += f", at least {low:g}" if high is None else f", {low:g} to {high:g}"
    raise QskdError(where, repr(value), expected)


def choice(where: str, value: Any, *known: str) -> None:
    """QskdError unless it is one of these."""
    if value not in known:
        raise QskdError(where, repr(value), " or ".join(known))


@contextlib.contextmanager
def unless(verbose: bool) -> Iterator[None]:
    """As a guest in the caller's process: without what the verb prints on standard output, though warnings are logged as ever; and
    torch is left with as many threads as it had, whatever a verb computes with."""
    import torch

    threads = torch.get_num_threads()
    try:
        with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.set_num_threads(threads)
