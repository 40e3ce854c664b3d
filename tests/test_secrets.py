"""A secret in a URI is refused before anything is written, and no file, line or message shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import pipelines.cluster.start  # noqa: F401  (sets Ray's environment before anything imports Ray)
from pipelines.cli import main
from pipelines.health.services import check_storage, check_tracking
from pipelines.run import logs
from pipelines.run.folder import Folder
from pipelines.run.tracked import open_for
from pipelines.tracking.store import how_to_look, without_secrets
from qskd.config import Config
from qskd.config.recipe import load
from qskd.errors import QskdError
from qskd.redaction import redacted, secret_in
from qskd.storage.places import open_folder

SECRET = "hunter2"
TRACKING = [
    f"http://me:{SECRET}@host:5000",
    f"https://{SECRET}@host",  # a token in place of the user
    f"http://me:a/{SECRET}@host",
    f"http://me:a@{SECRET}@host",
    f"postgresql://me:{SECRET}@host/db",
    f"mysql+pymysql://me:{SECRET}@host/db",
    f"postgresql://host/db?user=me&password={SECRET}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Du%3BPWD%3D{SECRET}",
    *(
        f"http://me:my {SECRET}@host:5000",
        f"http:///me:{SECRET}@host",
        f"http:/me:{SECRET}@host",
        f"http:\\\\me:{SECRET}@host",
    ),
    *(f"http://me:12/{SECRET}@host", f"http://me%3A{SECRET}%40host:5000", f"http://host/?pass%77ord={SECRET}"),
    *(f"http://host/#access_token={SECRET}", f"http://host/?jwt={SECRET}", f"databricks://profile:{SECRET}"),
]
STORES = [
    f"s3://key:{SECRET}@bucket/a",
    f"s3://{SECRET}@bucket/a",
    f"s3://bucket/a?access_key=AK&secret_key={SECRET}",
    f"abfs://account:{SECRET}@container/a",
    f"simplecache::s3://key:{SECRET}@bucket/a",
    f"memory://a?X-Amz-Signature={SECRET}",
]
HARMLESS = [
    *("s3://bucket/a@b?region=eu-west-1&endpoint_override=localhost:9000", "abfs://container@account.dfs.core.windows.net/a"),
    *("http://host:5000/a@b", "sqlite:////home/me@work/mlflow.db", "hdfs://me@name-node:8020/a", "/local/a@b", "timm/a@b"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "given.yaml":
            assert SECRET.encode() not in path.read_bytes(), path


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 1
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    return err


@pytest.mark.parametrize("uri", TRACKING)
def test_a_login_in_the_tracking_uri_is_refused_with_the_variables_named(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"tracking": {"uri": uri}}))
    for verb in ("distill", "train", "tune"):
        for words in (["--set", f"tracking.uri={uri}"], ["given.yaml"]):
            for more in ([], ["--dry-run"]):
                said = refused(capfd, verb, *words, *more)
                assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
                assert "tracking.uri" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said = refused(capfd, "train", "--dry-run")
    assert "MLFLOW_TRACKING_URI" in said
    assert "MLFLOW_TRACKING_PASSWORD" in said
    config = load(None, [f"output={tmp_path}/runs"])
    with pytest.raises(QskdError) as told:
        open_for(Folder(config), config, "train")
    assert SECRET not in repr(told.value.args) + str(told.value)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert SECRET not in "".join("".join(line.split()) for line in capfd.readouterr())
    assert not (tmp_path / "runs").exists()
    assert SECRET not in how_to_look(uri)
    assert check_tracking(uri).status == "problem"


@pytest.mark.parametrize("uri", STORES)
def test_a_secret_in_a_storage_uri_is_refused_wherever_one_is_given(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for field in ("output", "data.train", "teacher.cache.path", "teacher.path", "card.baseline"):
        said = refused(capfd, "distill", "--set", f"{field}={uri}", "--dry-run")
        assert field in said
        assert "take it out of the URI" in said
    refused(capfd, "distill", uri)
    refused(capfd, "evaluate", "student", uri)
    with pytest.raises(QskdError, match="which recipes, MLflow and logs would all keep"):
        open_folder(uri)
    with pytest.raises(QskdError):
        Folder(Config(output=uri))
    check = check_storage(uri)
    assert check.status == "problem"
    assert SECRET not in check.found + check.remedy


@pytest.mark.parametrize("form", [f"s3://key:{SECRET}@bucket/a", f"s3://key%3A{SECRET}%40bucket/a"])
def test_no_verb_says_a_secret_that_it_was_given_in_place_of_a_folder(
    form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["predict", form, "photo.jpg", "--dry-run"],
        ["prepare", "a.json", "images", form, "--dry-run"],
        ["shapes", form, "--images", "1"],
        ["quickstart", "--folder", form, "--dry-run"],
        ["train", "--dry-run", "--set", f"teacher.class_map={{'{form}': circle}}"],
    ):
        refused(capfd, *words)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "",
            "mlruns",
            "sqlite:///mlflow.db",
            "sqlite:////data/a b/mlflow.db",
            "http://mlflow:5000",
            "https://host/mlflow/v1",
        ),
        *("http://[::1]:5000", "databricks", "databricks://profile", "postgresql://host:5432/db?sslmode=require"),
        *("mysql+pymysql://host/db?charset=utf8mb4&ssl_ca=/etc/ca.pem", "mssql+pyodbc://host/db?driver=ODBC+Driver+18"),
    ],
)
def test_addresses_of_stores_of_runs_are_taken(uri: str) -> None:
    assert without_secrets(uri, "tracking.uri") == uri


def test_uris_without_secrets_are_taken_and_shown_as_they_are() -> None:
    for uri in HARMLESS:
        assert not secret_in(uri), uri
        assert uri.startswith(("abfs", "hdfs")) or redacted(f"from {uri} on") == f"from {uri} on"


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_records_and_their_tracebacks_show_no_secret(
    form: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ours = logging.getLogger(), logging.getLogger("qskd")
    kept = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (root, ours)]
    root.handlers, ours.handlers = [], []
    monkeypatch.setenv(logs.FORMAT, form)
    monkeypatch.setattr(logs, "_speaker", {})
    try:
        logs.start_logs(run="one")
        for name in ("qskd", "another.library"):
            logging.getLogger(name).warning("asked %s: %d", TRACKING[0], 7)
            try:
                raise ConnectionError(f"no answer of {TRACKING[4]}")
            except ConnectionError:
                logging.getLogger(name).exception("failed")
        logs.say(f"see {STORES[0]}", store=STORES[2])
    finally:
        for logger, handlers, level, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    out, err = capfd.readouterr()
    assert "asked http://***@host:5000: 7" in err
    assert "no answer of postgresql://***@host/db" in err
    assert SECRET not in out + err
