"""Where runs are tracked."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from pipelines.run.folder import Folder
from pipelines.run.tracked import open_for
from pipelines.tracking.store import tracking_uri
from pipelines.tracking.tracker import Tracker, metric_names, param_keys
from qskd.config.recipe import load


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///runs/a.db", "sqlite:///HERE/runs/a.db"),
        ("sqlite:////elsewhere/a.db", "sqlite:////elsewhere/a.db"),
        ("http://server:5000", "http://server:5000"),
        ("", "sqlite:///HERE/mlflow.db"),
    ],
)
def test_a_file_is_the_same_for_processes_that_work_elsewhere(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    config = load(None, [f"tracking.uri={given}"])
    assert tracking_uri(config) == expected.replace("HERE", str(tmp_path))


def test_a_run_that_the_server_does_not_have_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(None, [f"tracking.uri=sqlite:///{tmp_path}/a.db", "tracking.experiment=e"])
    first = Tracker.open(config, "train")
    assert Tracker.open(config, "train", first.run_id).run_id == first.run_id
    mlflow.MlflowClient(first.uri).delete_run(first.run_id)
    for lost in (first.run_id, "0" * 32):
        caplog.clear()
        assert Tracker.open(config, "train", lost).run_id not in (first.run_id, lost)
        assert "a new one is begun" in caplog.text


def test_a_run_that_could_not_be_written_down_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(None, [f"tracking.uri=sqlite:///{tmp_path}/a.db", "tracking.experiment=e", f"output={tmp_path}/out"])
    folder = Folder(config)

    def full(name: str, text: str) -> None:
        raise OSError(28, "No space left on device")

    another = Tracker.open(config, "train")  # someone else's, in the same experiment
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write", full)
        with pytest.raises(OSError, match="No space"):
            open_for(folder, config, "train")
    tracker = open_for(folder, config, "train")
    assert open_for(folder, config, "train").run_id == tracker.run_id
    client = mlflow.MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("e")
    left = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    assert left == {tracker.run_id, another.run_id}


def test_parameters_with_odd_names_do_not_lose_the_others(tmp_path: Path) -> None:
    odd = {
        "teacher.class_map.a\nb": "x",
        "teacher.class_map.a\tb": "y",
        "é, 日": 1,
        "m" * 400: 2,
        "": 3,
        "../up": 4,
        ".": 6,
    }
    assert len(param_keys(odd)) == len(odd)
    assert param_keys({"training.epochs": 5}) == {"training.epochs": 5}
    config = load(None, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    tracker = Tracker.open(config, "train")
    tracker.params({**odd, "last": "there"})
    assert not tracker._complained
    classes = ("kg/", "/x", "a//b", "./z", ".", "..", "a:b", "a_b", "n" * 400, "plain")
    names = metric_names({name: float(place) for place, name in enumerate(classes)})
    assert len(names) == len(classes)
    assert names["plain"] == 9.0
    assert tracker.metrics([(1, {f"final/AP_of/{name}": value for name, value in names.items()})])
    assert len(tracker._connected.get_run(tracker.run_id).data.metrics) == len(classes)
    params = tracker._connected.get_run(tracker.run_id).data.params
    assert params["last"] == "there"
    assert {"x", "y"} <= set(params.values())
