"""The doctor tells what is wrong, says what to do about it, and never falls ill itself."""

from __future__ import annotations

import io
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow import fs
from rich.console import Console

from pipelines.health import machine as doctor_module
from pipelines.health import services
from pipelines.health.machine import checks, doctor
from pipelines.health.services import Check
from qskd.evaluation import average_precision as evaluation


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server on loopback: `.url`, `.status` and `.body` of its answers, `.seen` requests (path, authorization);
    403 for paths with `.refused` in them."""
    state = SimpleNamespace(status=200, body=b"OK", seen=[], refused="nothing")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(403 if state.refused in self.path else state.status)
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.host = f"127.0.0.1:{listening.server_port}"
    state.url = f"http://{state.host}"
    yield state
    listening.shutdown()
    thread.join()
    listening.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tracking(uri: str) -> Check:
    return services.check_tracking(uri)


def storage(uri: str | Path) -> Check:
    return services.check_storage(str(uri))


def test_a_healthy_machine_has_no_problem_and_is_left_as_it_was(tmp_path: Path) -> None:
    found = checks(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "runs" / "deep"))
    assert [check for check in found if check.status == "problem"] == []
    by_name = {check.name: check for check in found}
    assert len(by_name) == len(found)
    assert torch.__version__ in by_name["torch"].found
    assert "will be made" in by_name["storage"].found
    assert "will be made" in by_name["MLflow tracking"].found
    assert list(tmp_path.iterdir()) == []


def test_it_prints_every_check_and_returns_0_unless_there_is_a_problem(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    good, bad = f"sqlite:///{tmp_path / 'a.db'}", f"http://127.0.0.1:{closed_port()}"
    assert doctor(good, str(tmp_path), console) == 0
    assert "no problems" in text.getvalue()
    assert doctor(bad, str(tmp_path), console) == 1
    assert "1 problem," in text.getvalue()
    for word in ("machine", "hotcoco", "does not answer", "→ start it (mlflow server"):
        assert word in text.getvalue()


def test_markup_in_what_was_found_is_printed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "checks", lambda *_: [Check("a", "note", "[/red] [x]", "do [y]")])
    text = io.StringIO()
    assert doctor(console=Console(file=text, width=80)) == 0
    assert "[/red] [x]" in text.getvalue()
    assert "do [y]" in text.getvalue()


def test_importing_it_starts_neither_ray_nor_torch() -> None:
    code = "import sys, pipelines.health.machine; print([n for n in ('ray', 'torch', 'mlflow') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_checking_does_not_import_ray_and_the_module_runs(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'a.db'}"
    code = "import sys; from pipelines.health.machine import checks; "
    code += f"checks({uri!r}, {str(tmp_path)!r}); print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Check:
        raise RuntimeError("no idea")

    monkeypatch.setattr(doctor_module, "_torch", broken)
    found = checks(f"sqlite:///{tmp_path / 'a.db'}", str(tmp_path))
    assert [(check.name, check.found) for check in found if check.status == "problem"] == [
        ("torch", "RuntimeError: no idea")
    ]


def test_a_server_that_answers_is_ok_and_is_asked_for_its_health_and_for_runs(server: Any) -> None:
    assert tracking(server.url).status == "ok"
    assert tracking(f"{server.url}/mlflow/").status == "ok"
    assert [path.partition("?")[0] for path, _ in server.seen] == [
        *("/health", *(f"/api/2.0/mlflow/experiments/{what}" for what in ("search", "get-by-name"))),
        *("/mlflow/health", *(f"/mlflow/api/2.0/mlflow/experiments/{what}" for what in ("search", "get-by-name"))),
    ]


def test_a_server_that_is_healthy_under_any_name_but_keeps_no_runs_for_this_one_is_found_out(server: Any) -> None:
    server.refused = "/api/"
    check = tracking(server.url)
    assert check.status == "problem"
    assert "HTTP 403" in check.found
    assert "--allowed-hosts" in check.remedy


def test_a_closed_port_is_a_problem_with_the_address_and_a_remedy() -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    check = tracking(uri)
    assert check.status == "problem"
    assert uri in check.found
    assert "refused" in check.found
    assert "mlflow server" in check.remedy


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_SERVER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given_up = threading.Event()

        def ask() -> None:
            if tracking(f"http://127.0.0.1:{silent.getsockname()[1]}").status == "problem":
                given_up.set()

        threading.Thread(target=ask, daemon=True).start()
        assert given_up.wait(60)  # without a limit it would wait for ever


def test_other_answers_of_a_server_are_told_apart(server: Any) -> None:
    for status, expected, words in ((401, "note", "lets no one in"), (404, "problem", "404"), (500, "problem", "500")):
        server.status = status
        check = tracking(server.url)
        assert (check.status, words in check.found) == (expected, True)
    server.status, server.body = 200, b"<html>"
    assert tracking(server.url).status == "note"


def test_a_login_is_taken_from_the_environment_and_one_in_a_uri_is_refused_and_not_shown(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = tracking(f"http://me:s3cret@{server.host}")
    assert check.status == "problem"
    assert "MLFLOW_TRACKING_PASSWORD" in check.remedy
    assert "s3cret" not in str(check)
    assert not server.seen
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    assert tracking(f"http://{server.host}").status == "ok"
    assert {sent for _, sent in server.seen} == {"Basic bWU6czNjcmV0"}  # me:s3cret
    assert "s3cret" not in str(storage("nonsense://me:s3cret@bucket"))


def test_sqlite_is_opened_for_writing_without_being_changed(tmp_path: Path) -> None:
    path = tmp_path / "a b.db"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE experiments (x); CREATE TABLE runs (x)")
    connection.close()
    before = path.read_bytes()
    assert tracking(f"sqlite:///{path}").status == "ok"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sqlite_that_can_not_be_written_is_a_problem(tmp_path: Path) -> None:
    assert tracking(f"sqlite:///{tmp_path / 'made by a run' / 'a.db'}").status == "ok"
    assert not list(tmp_path.iterdir())
    other = tmp_path / "text.db"
    other.write_text("this is no database, and long enough to be seen as such" * 30)
    assert tracking(f"sqlite:///{other / 'a.db'}").status == "problem"
    assert "not a database" in tracking(f"sqlite:///{other}").found
    assert other.read_text().startswith("this is")
    locked = tmp_path / "locked.db"
    holder = sqlite3.connect(locked, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    check = tracking(f"sqlite:///{locked}")
    holder.close()
    assert check.status == "problem"
    assert "locked" in check.found


def test_folders_are_refused_and_other_databases_left_alone(server: Any) -> None:
    assert tracking("./mlruns").status == tracking("file:///tmp/mlruns").status == "problem"
    assert tracking(f"postgresql://{server.host}/db").status == "note"  # its port can be reached, no more is asked
    assert not server.seen
    assert tracking("postgresql://me:s3cret@host/db").status == "problem"


def test_storage_is_written_read_back_and_left_clean(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "not" / "yet", f"file://{tmp_path}"):
        assert storage(place).status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a filesystem even root can't write to")
def test_read_only_storage_is_a_problem() -> None:
    check = storage("/proc/qskd/runs")
    assert check.status == "problem"
    assert "choose another output" in check.remedy


def test_a_file_in_the_way_and_an_unknown_filesystem_are_problems(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert storage(tmp_path / "file" / "runs").status == "problem"
    assert storage("nonsense://bucket").status == "problem"


def test_storage_that_gives_back_other_bytes_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fs.LocalFileSystem()

    class Forgetful:
        type_name = "s3"
        open_output_stream = staticmethod(real.open_output_stream)
        delete_file = staticmethod(real.delete_file)

        @staticmethod
        def open_input_stream(path: str) -> io.BytesIO:
            return io.BytesIO(b"")

    monkeypatch.setattr(services, "open_at_once", lambda _: (Forgetful(), str(tmp_path)))
    check = storage("s3://bucket")
    assert check.status == "problem"
    assert "other bytes" in check.found
    assert list(tmp_path.iterdir()) == []


def test_storage_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_STORAGE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(services, "open_at_once", lambda _: time.sleep(1))
    check = storage("s3://bucket")
    assert check.status == "problem"
    assert "does not answer" in check.found


def test_ray_authentication_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    shell: dict[str, str] = {}
    monkeypatch.setattr(doctor_module, "_shell_environment", lambda: shell)
    check = doctor_module._ray_authentication()
    assert check.status == "note"
    assert "RAY_AUTH_MODE=token" in check.remedy
    for mode, status in (("token", "ok"), ("TOKEN", "ok"), ("disabled", "note"), ("yes", "problem")):
        shell["RAY_AUTH_MODE"] = mode
        assert doctor_module._ray_authentication().status == status
    shell["RAY_AUTH_MODE"] = "token"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    for mode, status in ((0o644, "note"), (0o640, "note"), (0o600, "ok")):
        token.chmod(mode)
        check = doctor_module._ray_authentication()
        assert check.status == status
        assert (check.remedy == f"chmod 600 {token}") is (status == "note")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux tells what a process was started with")
def test_rays_mode_is_the_shells_and_not_what_qskd_sets_for_itself(tmp_path: Path) -> None:
    code = (
        "import pipelines.cluster.start, os; from pipelines.health.machine import _ray_authentication as check\n"
        "print(os.environ['RAY_AUTH_MODE'], check().status)"
    )
    for exported, expected in (({}, "token note"), ({"RAY_AUTH_MODE": "token"}, "token ok")):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | exported
        environment["HOME"] = str(tmp_path)  # where no token is
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(("kept", "status"), [(True, "ok"), (False, "note")])
def test_a_python_that_keeps_no_bytecode_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool, status: str
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", not kept)
    (found,) = [check for check in checks(storage=str(tmp_path)) if check.name == "python"]
    assert found.status == status
    assert ("PYTHONDONTWRITEBYTECODE" in found.remedy) is not kept


def test_versions_other_than_the_tested_ones_are_noted(tmp_path: Path) -> None:
    text = "# a comment\n\ntorch==1.0\nnumpy>=1  # fine\nno-such-package==3\nray==0.1; python_version < '3'\n-r other.txt\n"
    (tmp_path / "constraints.txt").write_text(text)
    check = doctor_module._constraints([tmp_path])
    assert check.status == "note"
    assert "torch" in check.found
    assert "(tested: ==1.0)" in check.found
    assert not any(name in check.found for name in ("numpy", "no-such-package", "ray"))
    (tmp_path / "constraints.txt").write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    assert doctor_module._constraints([tmp_path]).status == "ok"
    assert doctor_module._constraints([tmp_path / "nowhere"]).status == "ok"


def test_a_package_that_is_missing_or_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=9999", "no-such-package>=1", "pillow>=1", 'nothing>=1; extra == "dev"']
    monkeypatch.setattr(doctor_module.importlib.metadata, "requires", lambda _: wanted)
    check = doctor_module._packages()
    assert check.status == "problem"
    assert "no-such-package missing (needs >=1)" in check.found
    assert "'numpy>=9999'" in check.remedy
    assert not any(name in check.found for name in ("pillow", "nothing"))


def test_the_slow_evaluator_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_importable", lambda name: name == "pycocotools")
    check = doctor_module._evaluators()
    assert check.status == "note"
    assert "hotcoco" in check.remedy


def test_a_broken_torchvision_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor_module._torchvision()
    assert check.status == "problem"
    assert "nms does not exist" in check.found


def test_gpus_are_named_and_an_unusable_one_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_module.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert doctor_module._torch().status == "note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    check = doctor_module._torch()
    assert check.status == "ok"
    assert "2 CUDA devices (Imaginary 9000), bfloat16" in check.found


def test_little_memory_space_and_few_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "memory_bytes", lambda: 2 * 2**30)
    assert doctor_module._machine().status == "note"
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**26))
    assert "--shm-size" in doctor_module._shared_memory().remedy
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 65536))
    assert "ulimit" in doctor_module._open_files().remedy
