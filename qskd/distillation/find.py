"""Distillation methods by name: a file or a folder here, a file of a folder of the user's, a dotted module, a path.

Free of torch, as configurations are: the settings of a method that is a folder stand in its `settings.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import qskd.distillation
from qskd.config.distillation import DEFAULT, NONE, MethodSettings
from qskd.errors import QskdError
from qskd.plug_ins import tell_code_is_run

FOLDERS = "QSKD_METHODS"  # environment variable: folders with methods of the user's, as PATH has them
NOT_METHODS = ("find", "method", "shared")
CONTRACT = "a class Settings(MethodSettings) and one subclass of qskd.distillation.method.Method; see docs/methods.md"


def method_names() -> list[str]:
    """The methods that come with the package, and those of the user's folders."""
    theirs = {path.stem for folder in _folders() for path in folder.glob("*.py") if path.stem.isidentifier()}
    return sorted(_own() | theirs - {"__init__"})


def is_built_in(name: object) -> bool:
    """Whether the package itself has the method."""
    return isinstance(name, str) and name in _own()


def refuse_strange_methods(tree: Any, overrides: Sequence[str], where: str) -> None:
    """QskdError where a configuration that another may have written names code to run which the user has not named too: with
    --methods, or by setting the method."""
    section = tree.get("distillation") if isinstance(tree, Mapping) else None
    if not isinstance(section, Mapping) or any(text.startswith("distillation") for text in overrides):
        return
    also = section.get("also")
    parts = [section, *(also.values() if isinstance(also, Mapping) else ())]
    for name in (part.get("method", DEFAULT) for part in parts if isinstance(part, Mapping)):
        if name == NONE or is_built_in(name) or not isinstance(name, str):
            continue
        if any(Path(name).parent.resolve() == folder for folder in _folders()) and name.endswith(".py"):
            continue
        raise QskdError(
            where,
            f"names the method {name}, whose code would be run",
            "a method of the package, or one that you name too",
            "where you trust it: --methods with the folder it is in, or --set distillation.method=...",
        )


def _folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]


def add_folder(folder: str | Path) -> None:
    """Look for methods there too, in this process and those that it starts. QskdError where there is no such folder."""
    path = Path(os.path.expanduser(folder)).resolve()
    if taken := sorted(each.stem for each in path.glob("*.py") if each.stem in _own()):
        raise QskdError(f"--methods {folder}", f"{taken[0]}.py has the name of a method of the package", "another name")
    if not path.is_dir():
        raise QskdError(f"--methods {folder}", "no such folder", "a folder with .py files, each a method")
    listed = [str(each) for each in _folders()]
    if str(path) not in listed:
        os.environ[FOLDERS] = os.pathsep.join([str(path), *listed])


def located(name: str) -> str:
    """The name as it can be found from any folder: a file's full path for a method of the user's."""
    path = None if name == NONE else _file_of(name)
    return name if path is None else str(path)


def _file_of(name: str) -> Path | None:
    """The file of a method of the user's; None for one of the package's, or of a dotted module."""
    if name.endswith(".py"):
        path = Path(os.path.expanduser(name)).resolve()
        if not path.is_file():
            raise QskdError(f"distillation.method = {name}", "no such file", f"a .py file with {CONTRACT}")
        return path
    if name.isidentifier() and name not in _own():
        return next((p.resolve() for folder in _folders() if (p := folder / f"{name}.py").is_file()), None)
    return None


@cache
def _own() -> frozenset[str]:
    files = {module.name for module in pkgutil.iter_modules(qskd.distillation.__path__)} - set(NOT_METHODS)
    return frozenset(name.replace("_", "-") for name in files)  # a module's name can have no hyphen


def module_of(name: str, part: str = "") -> ModuleType:
    """The module of a method; of one that is a folder here, its `part`."""
    path = _file_of(name)
    if path is not None:
        return _module_at(path)
    where = f"distillation.method = {name}"
    if name in _own():
        package = f"qskd.distillation.{name.replace('-', '_')}"
        is_folder = importlib.util.find_spec(f"{package}.{part}") if _is_package(package) else None
        return importlib.import_module(f"{package}.{part}" if is_folder else package)
    if "." not in name:
        close = difflib.get_close_matches(name, [*method_names(), NONE], n=1)
        said = "no such method" + (f" (did you mean {close[0]}?)" if close else "")
        known = ", ".join([NONE, *method_names()])
        raise QskdError(
            where, said, f"{known}, a file of a folder given with --methods, a dotted module, or a path to a .py file"
        )
    if not name.startswith("qskd."):
        tell_code_is_run("distillation.method", Path(name))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise QskdError(where, f"cannot be imported: {type(error).__name__}: {error}", CONTRACT) from error


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


@cache
def _module_at(path: Path) -> ModuleType:
    name = f"qskd_method_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    tell_code_is_run("distillation.method", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise QskdError(str(path), f"cannot be imported: {type(error).__name__}: {error}", CONTRACT) from error
    return module


def find_settings(name: str) -> type[MethodSettings]:
    """What a recipe may say under `distillation` for this method. QskdError where there is no such method."""
    found: Any = getattr(module_of(name, "settings"), "Settings", None)
    if not (isinstance(found, type) and issubclass(found, MethodSettings)):
        raise QskdError(f"distillation.method = {name}", "its file has no class Settings(MethodSettings)", CONTRACT)
    return found
