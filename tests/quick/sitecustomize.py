"""What each process that tests start runs first, Ray's own among them (tests/conftest.py puts this folder on their path).

They live for seconds, and most of what they do is import. Two things of that are saved here:

- An import leaves no garbage. Looking for it, at every 700 new objects and once more at the end, is a third of their time.
- transformers reads each of its thousand model files, twice, to know what is where: a sixth of importing it. What it found is
  kept in .pytest_cache, for the transformers that is installed.

And one thing of Ray's: a worker with environment variables of its own (each of a training is one) is begun by a program,
`setup_worker.py`, that imports Ray, sets them, and becomes the worker, which imports Ray. Here it sets them without the first
import: a fifth of all that such a worker costs.
"""

from __future__ import annotations

import atexit
import gc
import importlib.machinery
import marshal
import os
import sys

TYPE_CHECKING = False  # `typing` itself would be imported by each process
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

KEPT = os.path.join(os.path.dirname(__file__), "..", "..", ".pytest_cache", "transformers")
FINDS = (
    "transformers.utils.import_utils"  # whose `define_import_structure(path, prefix)` reads the files below a folder
)


def keep(path: str, structure: Any) -> None:
    try:
        os.makedirs(KEPT, exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            marshal.dump(structure, file)
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError:
        return  # it is found again each time


def kept(find: Callable[..., Any]) -> Callable[..., Any]:
    def found(module_path: Any, prefix: str | None = None) -> Any:
        init = os.path.join(str(module_path).removesuffix("__init__.py"), "__init__.py")
        if os.path.basename(os.path.dirname(init)) != "models":
            return find(module_path, prefix)  # one model's: two milliseconds
        stat = os.stat(init)
        path = os.path.join(KEPT, f"{stat.st_dev}-{stat.st_ino}-{stat.st_mtime_ns}-{prefix}")
        try:
            with open(path, "rb") as file:
                return marshal.load(file)
        except (OSError, ValueError, EOFError, TypeError):
            structure = find(module_path, prefix)
            keep(path, structure)
            return structure

    return found


class Hook:
    """Finds one module, as Python does, and has it ask what is kept."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == FINDS else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                module.define_import_structure = kept(module.define_import_structure)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def become_the_worker() -> None:
    """What Ray's setup_worker.py does, where it has nothing to do but to set variables. Else it is left to do it."""
    words = sys.orig_argv
    mark, spoken = "--serialized-runtime-env-context=", "--language=PYTHON"
    scripts = [place for place, word in enumerate(words[:4]) if word.endswith("/ray/_private/workers/setup_worker.py")]
    said = [word for word in words if word.startswith(mark)]
    if not scripts or len(said) != 1 or spoken not in words:
        return
    import json

    context = json.loads(said[0][len(mark) :])
    variables, python = context.pop("env_vars"), context.pop("py_executable")
    if any(context.values()) or any("$" in value for value in variables.values()):
        return
    os.environ.update(variables)
    rest = [word for word in words[scripts[0] + 1 :] if word not in (said[0], spoken)]
    os.execv(python, [python, *rest])


become_the_worker()
gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
sys.meta_path.insert(0, Hook())  # type: ignore[arg-type]
