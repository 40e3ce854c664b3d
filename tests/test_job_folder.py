"""In a Ray job, what would be left in the working folder, which Ray deletes, is refused or told; elsewhere nothing is."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import yaml

from pipelines.caching import driver as cache_teacher
from pipelines.run.resolve import resolve
from pipelines.training import driver as distill
from pipelines.tuning import driver as tune
from pipelines.tuning.search.request import SearchRequest
from qskd.config import Config
from qskd.config.recipe import build, load
from qskd.errors import QskdError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ["output=s3://b/runs", "data.train=/shared/train", "data.val=~/val", "teacher.cache.path=s3://b/cache"]
SHARED += ["tracking.uri=http://mlflow:5000", "teacher.path=teacher"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def warned(caplog: pytest.LogCaptureFixture, config: Config, kind: str = "distill") -> list[str]:
    """The fields that are warned of."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "qskd"):
        resolve(config, kind)
    return [record.getMessage().partition(":")[0] for record in caplog.records]


@pytest.mark.parametrize("field", ["data.train", "data.val", "teacher.cache.path"])
def test_a_relative_path_is_warned_of_in_a_job_only(
    field: str, caplog: pytest.LogCaptureFixture, job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, [*SHARED, f"{field}=here"])
    assert warned(caplog, load(None, SHARED)) == []
    assert warned(caplog, config) == [field]
    assert "Better: a URI, or an absolute path" in caplog.text
    assert warned(caplog, config, "train") == ([] if field == "teacher.cache.path" else [field])
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert warned(caplog, load(None, [f"{field}=here"])) == []


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "sqlite:////shared/mlflow.db", "http://mlflow:5000"])
def test_tracking_in_the_working_folder_is_warned_of(
    uri: str, caplog: pytest.LogCaptureFixture, job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, [*SHARED, f"tracking.uri={uri}"])
    assert warned(caplog, config) == (["tracking.uri"] if uri in ("", "sqlite:///mlflow.db") else [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert warned(caplog, config) == (["tracking.uri"] if uri == "sqlite:///mlflow.db" else [])


def test_a_job_whose_results_would_be_lost_is_refused(job: None) -> None:
    search = tune.TuneRequest(SearchRequest(("loss_weights",), 2, "tpe", ("AP",), None, 0))
    lost = load(None, [*SHARED, "output=runs"])
    for run in (
        lambda: distill.run(lost, "distill"),
        lambda: distill.run(lost, "train"),
        lambda: tune.run(lost, search),
    ):
        with pytest.raises(QskdError, match=r"output: 'runs', a relative path.*Ray deletes") as told:
            run()
        assert "--set output=s3://bucket/runs" in told.value.remedy
    for begin in (cache_teacher.run, cache_teacher.foresee):
        with pytest.raises(QskdError, match=r"teacher\.cache\.path: 'cache', a relative path"):
            begin(load(None, [*SHARED, "teacher.cache.path=cache", "output=runs"]))


def test_a_cache_s_job_leaves_nothing_in_the_output_folder_which_may_be_relative(
    job: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog, load(None, [*SHARED, "output=runs", "tracking.uri="]), "cache") == []


def test_the_recipe_of_the_documentation_is_one_that_a_job_loses_nothing_of(
    job: None, caplog: pytest.LogCaptureFixture
) -> None:
    text = re.search(r"in `student.yaml`[^`]*\n\n```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.S)
    assert text is not None
    config = build(yaml.safe_load(text[1]))
    assert [each for kind in ("cache", "train", "distill") for each in warned(caplog, config, kind)] == []
