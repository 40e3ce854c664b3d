"""What each process that tests start runs first, Ray's own among them (tests/conftest.py puts this folder on their path).

They live for seconds, and most of what they do is import. Two things of that are saved here:

- An import leaves no garbage. Looking for it, at every 700 new objects and once more at the end, is a third of their time.
- transformers reads each of its thousand model files, twice, to know what is where: a sixth of importing it. What it found is
  kept in .pytest_cache, for the transformers that is installed.

MLflow makes a new SQLite store by some sixty migrations, which takes a second. What they made of an empty file the first time is
kept there too, for the MLflow that is installed, and copied into other empty files.

And one thing of Ray's: a worker with environment variables of its own (each of a training is one) is begun by a program,
`setup_worker.py`, that imports Ray, sets them, and becomes the worker, which imports Ray. Here it sets them without the first
import: a fifth of all that such a worker costs.

Where a test asks for it, Ray's workers are not started at all but forked (fork_server.py).
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

CACHE = os.path.join(os.path.dirname(__file__), "..", "..", ".pytest_cache")
KEPT = os.path.join(CACHE, "transformers")
FINDS = (
    "transformers.utils.import_utils"  # whose `define_import_structure(path, prefix)` reads the files below a folder
)
MIGRATES = "mlflow.store.db.utils"  # whose `_initialize_tables(engine)` makes a store's tables


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


def copied(initialize: Callable[[Any], None], migrations: str) -> Callable[[Any], None]:
    """`_initialize_tables(engine)`, which for an empty SQLite file copies what it did for another."""
    stat = os.stat(migrations)
    path = os.path.join(CACHE, "mlflow", f"{stat.st_dev}-{stat.st_ino}-{stat.st_mtime_ns}.db")

    def copy(source: str, target: str) -> bool:
        """If it could be done. SQLite's own copying: other connections may be open."""
        import contextlib
        import sqlite3

        try:
            with (
                contextlib.closing(sqlite3.connect(source, timeout=0)) as one,
                contextlib.closing(sqlite3.connect(target, timeout=0)) as other,
            ):
                empty = other.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
                if empty:
                    one.backup(other)
                return empty
        except sqlite3.Error:
            return False

    def initialized(engine: Any) -> None:
        database = engine.url.database if engine.url.get_backend_name() == "sqlite" else None
        empty = database and os.path.isfile(database) and os.path.getsize(database) == 0
        if empty and os.path.isfile(path) and copy(path, database):
            return
        initialize(engine)
        if empty and not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if copy(database, part := f"{path}.{os.getpid()}"):
                os.replace(part, path)

    return initialized


class Hook:
    """Finds two modules, as Python does, and has them ask what is kept."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in (FINDS, MIGRATES) else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if name == FINDS:
                    module.define_import_structure = kept(module.define_import_structure)
                else:
                    migrations = os.path.join(os.path.dirname(module.__file__), "..", "db_migrations", "versions")
                    module._initialize_tables = copied(module._initialize_tables, migrations)

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


def let_it_be_forked() -> None:
    """A worker of Ray's, where there is a fork server (fork_server.py): that forks the process that works, and this one waits for
    its end. Where it forks none, this one works."""
    name, words = os.environ.get("QSKD_FORK_SERVER"), sys.orig_argv[1:]
    if not name or not words or not words[0].endswith("/ray/_private/workers/default_worker.py"):
        return
    import json
    import resource
    import signal
    import socket

    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "words": words,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(f"\0{name}")
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            if not server.recv(16):
                return
            for handle in (0, 1, 2):
                os.close(handle)
            server.recv(16)
    except OSError:
        return
    os._exit(0)


become_the_worker()
let_it_be_forked()
gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
sys.meta_path.insert(0, Hook())  # type: ignore[arg-type]
