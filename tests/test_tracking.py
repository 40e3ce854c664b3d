"""Where runs are tracked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.tracking import tracking_uri
from qskd.recipe import load


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
