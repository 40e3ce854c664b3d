"""Where MLflow's runs land: in the working folder whatever it is called, never in a deleted experiment; a store that does not
answer is an error within seconds."""

from __future__ import annotations

import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from dead_ends import closed, dropped, named, silent, web_server

from pipelines.health.services import check_tracking
from pipelines.tracking import answers
from pipelines.tracking.answers import check_answers
from pipelines.tracking.store import (
    _client,
    check_database,
    experiment_of,
    how_to_look,
    sqlite_file,
    sqlite_uri,
    tracking_uri,
)
from pipelines.tracking.tracker import Tracker
from qskd.config import Config
from qskd.config.recipe import load
from qskd.errors import QskdError

ODD = ("what?", "a#b", "ws%20main", "My Drive", "grün", "100%", "it's", "a;b&c=d", "%3F")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's, with its tables, which take it seconds."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    _client(sqlite_uri(file))
    return file


def runs_in(file: Path) -> set[str]:
    with closing(sqlite3.connect(file)) as base:
        return {run for (run,) in base.execute("select run_uuid from runs")}


@pytest.mark.parametrize("name", ODD)
def test_runs_and_artefacts_land_in_the_working_folder_whatever_it_is_called(
    name: str, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    shutil.copy(database, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load(None, [])
    tracker = Tracker.open(config, "train")
    assert tracker.uri == tracking_uri(config)
    assert runs_in(tmp_path / name / "mlflow.db") == {tracker.run_id}
    assert list((tmp_path / name).rglob("mlartifacts/qskd/*/artifacts/config.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no folder of a half-decoded name beside it
    command = shlex.split(how_to_look(tracker.uri))
    assert command == ["mlflow", "ui", "--backend-store-uri", tracker.uri]
    assert sqlite_file(command[-1]) == tmp_path / name / "mlflow.db"
    assert check_tracking(tracker.uri).found.endswith(f"{name}/mlflow.db")


def test_an_address_of_plain_letters_is_as_before() -> None:
    assert sqlite_uri("/home/me/My Drive/grün/mlflow.db") == "sqlite:////home/me/My Drive/grün/mlflow.db"


def test_a_relative_address_means_what_sqlalchemy_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, ["tracking.uri=sqlite:///a%20b/runs.db"])
    assert sqlite_file(tracking_uri(config)) == tmp_path / "a b" / "runs.db"
    config = load(None, ["tracking.uri=sqlite+pysqlcipher:///runs.db"])  # a driver that is named stays
    assert tracking_uri(config) == f"sqlite+pysqlcipher:///{tmp_path}/runs.db"


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(database: Path, tmp_path: Path) -> None:
    shutil.copy(database, tmp_path / "it's.db")
    uri = sqlite_uri(tmp_path / "it's.db")
    config: Config = load(None, [f"tracking.uri={uri}"])
    client = _client(uri)
    number = experiment_of(client, "qskd", uri, lambda _: {})
    assert check_tracking(uri).status == "ok"
    client.delete_experiment(number)
    for _ in range(2):
        with pytest.raises(QskdError) as raised:
            Tracker.open(config, "train")
    assert raised.value.where == "tracking.experiment=qskd"
    assert f"(id {number}) was deleted in MLflow" in raised.value.found
    assert "--set tracking.experiment=OTHER" in raised.value.remedy
    check = check_tracking(uri)
    assert (check.status, check.remedy) == ("problem", raised.value.remedy)
    command = shlex.split(raised.value.remedy.split("`")[1])
    assert command == ["env", f"MLFLOW_TRACKING_URI={uri}", "mlflow", "experiments", "restore", "-x", number]
    client.restore_experiment(number)
    assert Tracker.open(config, "train").run_id


def test_a_server_that_keeps_the_experiment_as_deleted_is_found_out() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            kept = b'{"experiment": {"experiment_id": "7", "name": "qskd", "lifecycle_stage": "deleted"}}'
            self.wfile.write(kept if self.path.endswith("get-by-name?experiment_name=qskd") else b"OK")

        def log_message(self, *_: object) -> None:
            pass

    with web_server(Handler) as address:
        check = check_tracking(f"http://{address}")
    assert check.status == "problem"
    assert "(id 7) was deleted" in check.found


DEAD: dict[str, tuple[Callable[[], AbstractContextManager[str]], str, str]] = {
    "a server's closed port": (closed, "http", "connection refused"),
    "packets to a server are dropped": (dropped, "http", "no answer within 0.5 s"),
    "a server that says nothing": (silent, "http", "no answer within 0.5 s"),
    "a server's name that is none": (
        lambda: named("no-such-mlflow.invalid:5000"),
        "https",
        "name or service not known",
    ),
    "a database's closed port": (closed, "postgresql", "connection refused"),
    "packets to a database are dropped": (dropped, "mysql+pymysql", "no answer within 0.25 s"),
    "a database's name that is none": (lambda: named("no-such-base.invalid"), "postgresql", "no machine of that name"),
}


@pytest.mark.parametrize("kind", DEAD)
def test_a_store_that_does_not_answer_is_an_error_within_seconds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, scheme, said = DEAD[kind]
    monkeypatch.setattr(answers, "ANSWER_S", 0.5)
    with make() as address:
        uri = f"{scheme}://{address}" + ("" if scheme.startswith("http") else "/mlflow")
        with pytest.raises(QskdError) as raised:
            Tracker.open(load(None, [f"tracking.uri={uri}"]), "train")
        assert raised.value.where == f"MLflow at {uri}"
        assert said in raised.value.found
        assert "MLFLOW_TRACKING_URI" in raised.value.remedy
        assert check_tracking(uri).status == "problem"


def test_whatever_a_server_answers_is_left_to_mlflows_client() -> None:
    with web_server() as address:
        check_answers(f"http://{address}")
        check_answers(f"postgresql://{address}/mlflow")
    check_answers("databricks://profile")
    check_answers("postgresql:///mlflow?host=/run/postgresql")


def test_a_store_whose_writer_was_killed_is_known_for_what_it_is(tmp_path: Path) -> None:
    """It leaves a journal to take back, which a look that may not write can't."""
    code = """if True:
        import os, sqlite3, sys
        base = sqlite3.connect(sys.argv[1])
        for table in sys.argv[2:]:
            base.execute(f"create table {table}(a)")
        base.commit()
        base.execute("pragma cache_size = 1")
        base.execute("begin")
        for _ in range(100):
            base.execute(f"insert into {sys.argv[2]} values (?)", ("x" * 4000,))
        os._exit(1)
    """
    for name, tables, said in (("ours", ("runs", "experiments"), ""), ("theirs", ("songs",), "that is not MLflow's")):
        file = tmp_path / f"{name}.db"
        subprocess.run([sys.executable, "-c", code, str(file), *tables], check=False)
        before = file.read_bytes()
        assert Path(f"{file}-journal").stat().st_size
        with pytest.raises(QskdError, match=said) if said else nullcontext():
            check_database(f"sqlite:///{file}")
        assert file.read_bytes() == before
