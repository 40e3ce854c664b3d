"""What this machine has, and what would go wrong on it: `qskd doctor`. Starts no Ray and changes nothing that it leaves."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

import pipelines
from pipelines.cluster.address import check_address, cluster_address
from pipelines.feed.memory import memory_bytes
from pipelines.health.services import Check, check_storage, check_tracking, guarded, short
from qskd.errors import QskdError
from qskd.printable import escaped
from qskd.redaction import redacted

_GIB = 2**30
_FILES_WANTED = 4096


def checks(tracking_uri: str = "", storage: str = "") -> list[Check]:
    """Everything that is checked, in order. Takes some seconds, with a hung server or store up to half a minute more.

    tracking_uri: empty is MLFLOW_TRACKING_URI, else sqlite in the working folder, as in `tracking.uri`.
    storage: a path or a pyarrow filesystem URI, as in `output`; empty is "runs".
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    storage = storage or "runs"
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("machine", _machine),
        ("packages", _packages),
        ("constraints.txt", _constraints),
        ("torch", _torch),
        ("torchvision, timm", _torchvision),
        ("image decoders", _decoders),
        ("COCO evaluation", _evaluators),
        ("MLflow tracking", lambda: check_tracking(uri)),
        ("storage", lambda: check_storage(storage)),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("Ray cluster", _ray_cluster),
        ("Ray authentication", _ray_authentication),
    ]
    return [guarded(name, step) for name, step in steps]


def _python() -> Check:
    """Kept bytecode decides how long a process of Ray takes to start, and a run starts some twenty."""
    found = f"{platform.python_version()} at {sys.executable}"
    if not sys.dont_write_bytecode:
        return Check("python", "ok", found)
    return Check(
        "python",
        "note",
        f"{found}; it keeps no bytecode, so that each process of Ray may compile torch, transformers and Ray anew",
        "unset PYTHONDONTWRITEBYTECODE, or run `python -m compileall` on its site-packages",
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> Check:
    memory = memory_bytes()
    found = f"{platform.platform()}, {_cores()} cores, {memory / _GIB:.1f} GiB memory"
    if 0 < memory < 6 * _GIB:
        return Check(
            "machine",
            "note",
            found,
            "Ray and two workers want about 6 GiB: keep compute.workers and compute.loader_workers at 1",
        )
    return Check("machine", "ok", found)


def _requirements(lines: Iterable[str]) -> list[Requirement]:
    found = []
    for line in lines:
        try:
            requirement = Requirement(re.split(r"\s#|^#", line, maxsplit=1)[0].strip())
        except InvalidRequirement:  # blank lines, options of pip
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def _packages() -> Check:
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("qskd", "ray", "transformers", "mlflow"))
    try:
        wanted = _requirements(importlib.metadata.requires("qskd") or [])
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", "problem", f"qskd itself is not installed; {shown}", "pip install -e .")
    bad = [item for item in wanted if not item.specifier.contains(_version(item.name) or "0", prereleases=True)]
    if bad:
        found = ", ".join(f"{item.name} {_version(item.name) or 'missing'} (needs {item.specifier})" for item in bad)
        install = " ".join(f"'{item.name}{item.specifier}'" for item in bad)
        return Check("packages", "problem", found, f"pip install {install}")
    return Check("packages", "ok", shown)


def _constraints(folders: Iterable[Path] | None = None) -> Check:
    name = "constraints.txt"
    places = [folder / name for folder in folders or (Path.cwd(), Path(pipelines.__file__).resolve().parents[1])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return Check(name, "ok", "not here: versions are not compared with the tested ones")
    installed = [(item, _version(item.name)) for item in _requirements(path.read_text().splitlines())]
    other = [
        f"{item.name} {version} (tested: {item.specifier})"
        for item, version in installed
        if version and not item.specifier.contains(version, prereleases=True)
    ]
    if other:
        return Check(name, "note", ", ".join(other), f"if something breaks: pip install -c {path} -e .")
    return Check(name, "ok", f"installed versions are the tested ones of {path}")


def _torch() -> Check:
    import torch

    from qskd.precision import has_bfloat16

    build = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        half = "bfloat16" if has_bfloat16() else "no bfloat16"
        return Check("torch", "ok", f"{build}, {count} CUDA devices ({names}), {half}")
    if shutil.which("nvidia-smi"):
        remedy = "install the CUDA build: https://pytorch.org/get-started/locally"
        return Check(
            "torch", "note", f"{build}, a GPU driver is here but torch can't use it: it will train on CPU", remedy
        )
    return Check("torch", "ok", f"{build}, CPU only (float32)")


def _torchvision() -> Check:
    name, parts = "torchvision, timm", []
    for package in ("torchvision", "timm"):
        if find_spec(package) is None:
            parts.append(f"no {package} (not needed)")
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # transformers would import it too, and fail
            remedy = f"install the {package} made for this torch, or: pip uninstall {package}"
            return Check(name, "problem", f"{package} is installed but broken: {short(error)}", remedy)
        parts.append(f"{package} {_version(package)}")
    return Check(name, "ok", ", ".join(parts))


def _decoders() -> Check:
    from PIL import features

    from qskd.datasets.pictures.quick_jpeg import state

    fast = features.check_feature("libjpeg_turbo")
    parts = [f"Pillow {_version('pillow')} ({'libjpeg-turbo' if fast else 'plain libjpeg'})"]
    is_quick = (found := state()) == "ok"
    parts.append(f"simplejpeg {_version('simplejpeg')} (plain JPEGs for a GPU)" if is_quick else found)
    opencv = [package for package in ("opencv-python-headless", "opencv-python") if _version(package)]
    parts.append(f"OpenCV {_version(opencv[0])}" if opencv else "no OpenCV")
    if not features.check("jpg"):
        return Check(
            "image decoders", "problem", "Pillow was built without JPEG", "pip install --force-reinstall pillow"
        )
    if not is_quick:
        remedy = "pip install simplejpeg: readers for a GPU then decode in three quarters of the time, the same pixels"
        return Check("image decoders", "note", ", ".join(parts), remedy)
    return Check("image decoders", "ok", ", ".join(parts))


def _evaluators() -> Check:
    from qskd.evaluation.average_precision import FASTEST_FIRST, choose_backend

    used = choose_backend()
    installed = [f"{name} {_version(name.replace('_', '-'))}" for name in FASTEST_FIRST if find_spec(name)]
    found = f"uses {used}; installed: {', '.join(installed) or 'none'}"
    if used == "pycocotools":
        return Check("COCO evaluation", "note", found, "pip install hotcoco: the same numbers, about 100 times faster")
    return Check("COCO evaluation", "ok", found)


def _shared_memory() -> Check:
    name, folder = "shared memory", Path("/dev/shm")
    place = folder if folder.is_dir() else Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    found = f"{free / _GIB:.1f} GiB free in {place}, where Ray keeps its objects"
    if free < 2 * _GIB:
        return Check(name, "note", found, "Ray will use the slower disk: start the container with --shm-size=8g")
    return Check(name, "ok", found)


def _open_files() -> Check:
    if find_spec("resource") is None:  # Windows
        return Check("open files", "ok", "no limit is known here")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FILES_WANTED:
        return Check("open files", "note", f"limit {soft} (could be {hard}), Ray wants more", "ulimit -n 65536")
    return Check("open files", "ok", f"limit {soft if soft >= 0 else 'none'}")


def _shell_environment() -> dict[str, str]:
    """What this process was started with. `os.environ` won't do: `pipelines.cluster.start` sets Ray's variables in it, for qskd
    alone, and the question is what the shell gives to Ray's own commands."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def _ray_cluster() -> Check:
    named = cluster_address()
    if not named:
        return Check("Ray cluster", "ok", "RAY_ADDRESS is not set: Ray starts on this machine")
    try:
        check_address()
    except QskdError as error:
        return Check("Ray cluster", "problem", f"{error.where}: {error.found}", error.remedy.partition("; `qskd")[0])
    return Check("Ray cluster", "ok", f"RAY_ADDRESS={redacted(named)} answers (--cluster looks at its nodes)")


def _ray_authentication() -> Check:
    """Ray 2.60 turns tokens on by itself for `ray.init` but not for its commands, which then fail to join."""
    name, shell = "Ray authentication", _shell_environment()
    mode = shell.get("RAY_AUTH_MODE")
    remedy = "export RAY_AUTH_MODE=token in every shell, before ray start, ray job submit and ray status"
    token = Path.home() / ".ray" / "auth_token"
    if mode is None:
        state = f"a token is at {token}" if token.exists() else "the first ray.init() will make a token"
        return Check(
            name, "note", f"RAY_AUTH_MODE is not set in this shell; {state}, which Ray's commands won't send", remedy
        )
    if mode.lower() not in ("token", "disabled"):
        return Check(name, "problem", f"RAY_AUTH_MODE is {mode!r}, which Ray does not know", remedy)
    if mode.lower() == "disabled":
        return Check(name, "note", "disabled: whoever reaches the cluster can run code on it", remedy)
    if token.exists() and token.stat().st_mode & 0o077:
        return Check(name, "note", f"token; others on this machine can read {token}", f"chmod 600 {token}")
    given = token.exists() or shell.get("RAY_AUTH_TOKEN") or shell.get("RAY_AUTH_TOKEN_PATH")
    return Check(name, "ok", "token" if given else "token; Ray will make one when it starts here")


def doctor(tracking_uri: str = "", storage: str = "", console: Any = None) -> int:
    """Print the table to `console` (a rich one; None: standard output). Returns 1 if there is a problem, else 0."""
    return show(checks(tracking_uri, storage), console)


def show(found: list[Check], console: Any = None) -> int:
    """Print what was found as a table. Returns 1 if there is a problem, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table("", "check", "found", box=None, padding=(0, 1))
    for check in found:
        text = Text(escaped(check.found))
        if check.remedy:
            text.append(escaped(f"\n→ {check.remedy}"), style=colours[check.status])
        table.add_row(Text(check.status, style=colours[check.status]), check.name, text)
    console.print(table)
    problems = sum(check.status == "problem" for check in found)
    notes = sum(check.status == "note" for check in found)
    console.print(f"\n{problems or 'no'} problem{'s' * (problems != 1)}, {notes or 'no'} note{'s' * (notes != 1)}")
    return 1 if problems else 0
