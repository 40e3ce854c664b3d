"""Imports: the collector waits for them, and only for them; what plans a sweep does without Ray."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qskd.imports import without_collecting


def test_the_collector_is_as_it_was_before_whatever_the_import_did() -> None:
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError, match="no such"), without_collecting():
        raise ImportError("no such thing")
    assert gc.isenabled()


@pytest.fixture(scope="module")
def new_process() -> dict[str, Any]:
    """What a process says that imports the detectors, and then the plan of a sweep: importing torch takes seconds.

    Torch is imported before: what counts is that transformers' half adds no collection.
    """
    code = """if True:
        import atexit, gc, json, sys
        atexit.register(lambda: print(gc.get_freeze_count()))  # what is registered first is called last
        import torch
        import pipelines.tracking.curves, pipelines.training.checkpoint_list
        at_reports = list(sys.modules)
        old = lambda: gc.get_stats()[2]["collections"]
        before = old()
        import qskd.detectors
        young = sum(len(gc.get_objects(generation)) for generation in (0, 1))
        said = {"collects": gc.isenabled(), "collections": old() - before, "young": young, "tracked": len(gc.get_objects())}
        import pipelines.tuning.plan
        print(json.dumps({**said, "modules": list(sys.modules), "at_reports": at_reports}))
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # without tests/quick: as it is for users
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=400)
    said, frozen = done.stdout.splitlines()
    return {**json.loads(said), "frozen": int(frozen)}


def test_the_detectors_are_imported_without_a_collection_of_the_oldest(new_process: dict[str, Any]) -> None:
    assert new_process["collects"]
    assert new_process["collections"] == 0
    assert (
        new_process["young"] < new_process["tracked"] / 10
    )  # nor does the next collection look at all that was imported
    assert new_process["tracked"] > 100_000


def test_a_process_that_ends_collects_nothing_of_what_it_imported(new_process: dict[str, Any]) -> None:
    assert new_process["frozen"] > new_process["tracked"] / 2


def test_planning_a_sweep_imports_no_ray(new_process: dict[str, Any]) -> None:
    assert "pipelines.tuning.plan" in new_process["modules"]
    assert not {"ray", "optuna"} & set(new_process["modules"])


def test_what_the_controller_does_with_a_report_imports_no_detectors(new_process: dict[str, Any]) -> None:
    """Ray Train's controller starts before its workers do: transformers were seconds of every training's start."""
    assert "pipelines.training.checkpoints" in new_process["at_reports"]
    assert not {"transformers", "scipy", "qskd.detectors"} & set(new_process["at_reports"])
