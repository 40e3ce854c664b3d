"""Forks Ray's workers from a process that has imported what each of them imports, which is most of what one costs: a training of
one worker has nine.

`python fork_server.py NAME` prints the process id of a server and ends. The server listens at NAME, an abstract Unix socket, until
its standard input is closed. It is no child of who began it, for Ray kills those in `ray.shutdown`. A worker that Ray starts
(sitecustomize.py) hands over its environment, command line, open files, folder, signal mask and limits, and waits. Its twin is
forked from here, has them, and runs Ray's own program from the first line on, under its own process id, as in a container. When it
ends, so does the one that waits.

The environment says what an import finds: each has a process of its own that imports under it. What is not Ray's is imported once
for all in which the variables that it reads are the same; Ray's libraries once for each job, whose number they read as they are
loaded. What our own code needs, it has to import by itself. Where anything is otherwise (a thread that a fork would lose, a server
that is gone), the connection is closed, and the worker goes on as it was started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import types
from collections.abc import Generator, Iterator
from typing import Any

OTHERS = """
pandas pyarrow.fs pyarrow.parquet pyarrow.dataset pydantic torch scipy.optimize transformers.modeling_layers
transformers.image_processing_utils PIL.Image mlflow mlflow.store.tracking.sqlalchemy_store
"""
RAYS = """
ray._private.node ray._private.parameter ray._private.async_compat ray._private.runtime_env.setup_hook
ray.data ray.train.torch ray.tune
"""
# How the variables begin that imports read. (HOME is one: of a cache that no test has a use for.)
READ = ("PYTHON", "LD_", "TMPDIR", "OMP_", "MKL_", "ARROW_", "TORCH", "HF_", "TRANSFORMERS_", "MLFLOW_")
OF_ONE = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "PL_DISABLE_FORK", "PYTEST_CURRENT_TEST"}  # no import reads them
MESSAGE_BYTES = 1 << 20
Request = dict[str, Any]
Requests = Generator[tuple[bytes, list[int]]]  # what is asked; the connection, standard input, output and error


def begin(name: str) -> Request:
    """What to be: returns in each worker, and nowhere else."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries workers
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")
    listener.listen(100)
    if server := os.fork():
        print(server, flush=True)
        os._exit(0)
    os.dup2(2, 1)
    os.setsid()
    return serve(accepted(listener), 0)


def accepted(listener: socket.socket) -> Requests:
    with listener:
        while 0 not in select.select([listener, 0], [], [])[0]:
            connection, _ = listener.accept()
            if ours(connection):
                message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
                yield message, [connection.detach(), *files]
            else:
                connection.close()
        os._exit(0)  # and with it the servers, whose sockets it held


def passed_on(requests: socket.socket) -> Requests:
    with requests:
        while True:
            message, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
            if not message:
                os._exit(0)
            yield message, files


def serve(requests: Requests, level: int) -> Request:
    """Level 0 has imported nothing and 1 what is not Ray's: they pass requests on, to a server of that environment. 2 forks."""
    servers: dict[str, socket.socket] = {}
    for message, files in requests:
        request: Request = json.loads(message)
        kept = {
            name: value
            for name, value in sorted(request["environment"].items())
            if name not in OF_ONE and (level or name.startswith(READ))
        }
        key = json.dumps(kept)
        if level == 2:
            if len(os.listdir("/proc/self/task")) == 1 and os.fork() == 0:
                requests.close()
                become(request, files)
                return request
        elif key not in servers:
            servers[key], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                requests.close()
                for each in servers.values():
                    each.close()
                for handle in files:
                    os.close(handle)
                if level:  # psutil finds by it whose workers its children are
                    with open("/proc/self/comm", "w") as title:
                        title.write(f"rays {request['environment']['RAY_RAYLET_PID']}")
                prepare(request, RAYS if level else OTHERS)
                return serve(passed_on(theirs), level + 1)
            theirs.close()
        if level < 2:
            with contextlib.suppress(OSError):
                socket.send_fds(servers[key], [message], files)
        for handle in files:
            os.close(handle)
    raise AssertionError("requests end with the process")


def prepare(first: Request, modules: str) -> None:
    os.environ.clear()
    os.environ.update(first["environment"], JE_ARROW_MALLOC_CONF="background_thread:false")  # Arrow's would be a thread
    sys.path[0] = os.path.dirname(first["words"][0])  # all are of one program; Ray puts something before it
    with no_id_is_drawn() if modules is RAYS else contextlib.nullcontext():
        for module in modules.split():
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def no_id_is_drawn() -> Iterator[None]:
    """Ray seeds its generator of ids when the first is drawn, and all that are forked after that draw the same ones: two workers of
    a training once had each other's rows. What its libraries draw as they are loaded, one for each class of actors, comes from
    the system instead (test_cache_job)."""
    actor: Any = importlib.import_module("ray.actor")
    drawn = actor.ActorClassID
    actor.ActorClassID = types.SimpleNamespace(from_random=lambda: drawn(os.urandom(drawn.size())))
    yield
    actor.ActorClassID = drawn


def ours(connection: socket.socket) -> bool:
    """Whether this user's process is at the other end: any may connect."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return bool(user == os.getuid())


def become(request: Request, files: list[int]) -> None:
    """Have what the process has that waits at files[0]; the others are its standard input, output and error."""
    waiting, *standard = files
    for place, handle in enumerate(standard):
        os.dup2(handle, place)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    sys.argv[:] = request["words"]
    sys.orig_argv[:] = [sys.executable, *request["words"]]
    os.setpgid(0, 0)
    importlib.import_module("numpy").random.seed()  # else that of all workers were the same
    os.set_inheritable(waiting, False)
    os.write(waiting, b"forked")  # it stays open until this process ends, and closes with it


def run(request: Request) -> None:
    """Ray's program, as `python PROGRAM` would run it."""
    program = request["words"][0]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = program
    with open(program, encoding="utf-8") as source:
        code = compile(source.read(), program, "exec")
    exec(code, vars(module))


if __name__ == "__main__":
    run(begin(sys.argv[1]))
