"""Each way in which nodes differ is said, with the node's name; a cluster whose nodes agree has no problem."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.cli import main
from pipelines.cluster.logins import LOGINS
from pipelines.health import nodes
from pipelines.health.nodes import PACKAGES, NodeFacts, NodeReport, look_around, problems
from pipelines.health.services import token_left

FACTS = NodeFacts("host", "3.11.7", {**dict.fromkeys(PACKAGES, "1.0"), "torch": "2.13.0+cpu"}, "c0de")
REPORT = NodeReport("abcdef123", "10.0.0.2", {"CPU": 8.0, "GPU": 0.0}, facts=FACTS)
GPU = replace(REPORT, resources={"CPU": 8.0, "GPU": 1.0})
GPU_FACTS = replace(FACTS, gpus=("A10G",), cuda="13.0", versions=FACTS.versions | {"torch": "2.13.0+cu130"})


def test_nodes_that_agree_have_no_problem() -> None:
    head = replace(REPORT, resources={"CPU": 0.0, "GPU": 0.0}, head=True, clock_offset_s=-1.9)
    slow = replace(REPORT, clock_offset_s=2.5, clock_error_s=0.6)  # may be as near as 1.9 s
    assert problems(FACTS, [head, REPORT, slow, replace(GPU, facts=GPU_FACTS)]) == []


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (replace(REPORT, facts=replace(FACTS, python="3.12.1")), "python 3.12.1, the driver has 3.11.7"),
        (replace(REPORT, facts=replace(FACTS, versions={**FACTS.versions, "ray": "2.61.0"})), "ray 2.61.0, the driver has 1.0"),
        (replace(REPORT, facts=replace(FACTS, versions={**FACTS.versions, "torch": "2.12.0+cpu"})), "torch 2.12.0+cpu"),
        (replace(REPORT, facts=replace(FACTS, versions={**FACTS.versions, "qskd": "missing"})), "qskd missing"),
        (replace(REPORT, facts=replace(FACTS, code="0ther")), "other code of qskd (0ther, the driver's is c0de)"),
        (replace(GPU, facts=FACTS), "Ray counts 1 GPU(s), the driver's tool 0"),
        (replace(REPORT, facts=GPU_FACTS), "Ray counts 0 GPU(s), the driver's tool 1"),
        (replace(GPU, facts=replace(GPU_FACTS, cuda="")), "without CUDA"),
        (replace(REPORT, facts=replace(FACTS, storage="s3://b: ACCESS_DENIED → ask")), "storage: s3://b: ACCESS_DENIED → ask"),
        (replace(REPORT, clock_offset_s=-3.5, clock_error_s=0.1), "its clock is -3.5 s off"),
        (replace(REPORT, facts=None, failure="GetTimeoutError"), "GetTimeoutError"),
    ],
)  # fmt: skip
def test_a_difference_is_said_with_the_nodes_name(report: NodeReport, said: str) -> None:
    (line,) = problems(FACTS, [REPORT, report])
    assert line.startswith("10.0.0.2 abcdef: ")
    assert said in line
    assert " → " in line


def test_a_cluster_without_a_cpu_for_work_is_said() -> None:
    (line,) = problems(FACTS, [replace(REPORT, resources={"CPU": 0.0})])
    assert line.startswith("no node has a CPU")


def test_a_driver_that_can_not_use_the_storage_is_said() -> None:
    assert problems(replace(FACTS, storage="/a: denied → b"), [REPORT]) == ["the driver: storage: /a: denied → b"]


def test_logins_that_the_driver_alone_has_are_named_and_their_values_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOGINS:
        monkeypatch.delenv(name, raising=False)
    there = replace(REPORT, facts=look_around(""))
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    driver = look_around("")
    (line,) = problems(driver, [there, replace(REPORT, facts=driver)])
    assert "HF_TOKEN not set, as at the driver →" in line
    assert "sesame" not in line + repr(driver)


@pytest.mark.parametrize("deeper", ["", "not/there/yet"])
def test_a_node_whose_folder_of_that_path_is_another_is_said(deeper: str, tmp_path: Path) -> None:
    """The nodes of a cluster each have a disk of their own, and any path on it."""
    (tmp_path / "runs").mkdir()
    with token_left(f"{tmp_path}/runs/{deeper}") as token:
        assert look_around(f"{tmp_path}/runs/{deeper}", token).storage == ""
        (tmp_path / "runs").rename(tmp_path / "of the driver")
        (tmp_path / "runs").mkdir()  # the node's
        told = look_around(f"{tmp_path}/runs/{deeper}", token).storage
        assert "is another place here than at the driver" in told
        assert "→ a URI (s3://BUCKET/runs), or a path on a disk that all nodes share" in told
        (tmp_path / "runs").rmdir()
        (tmp_path / "of the driver").rename(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_driver_leaves_its_token_in_the_folder_that_the_nodes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(storage: str, token: str) -> list[NodeReport]:
        asked.append((storage, Path(token).parent))
        resources = {"CPU": 1.0, "GPU": float(len(look_around("").gpus)), "memory": 1.0}
        return [replace(REPORT, resources=resources, facts=look_around(storage, token))]

    monkeypatch.setattr(nodes, "ask_nodes", ask)
    monkeypatch.chdir(tmp_path)
    text = io.StringIO()
    assert nodes.cluster_doctor("runs", Console(file=text, width=200)) == 0, text.getvalue()
    assert asked == [(f"{tmp_path}/runs", tmp_path)]  # whole: a worker's working folder is another
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_tool_that_hangs_lists_none_and_the_rest_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(nodes, "GPU_TOOL_S", 0.2)
    driver = look_around("")
    assert driver.gpus == ()
    (line,) = problems(driver, [replace(GPU, facts=driver)])
    assert "Ray counts 1 GPU(s), the driver's tool 0" in line


@pytest.mark.parametrize(
    "words", [("--model", "a", "--storage", "b"), ("--model", "a", "--cluster"), ("--cluster", "--tracking-uri", "b")]
)
def test_an_option_without_effect_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", *words])
    assert "would have no effect" in capsys.readouterr().err


def test_a_node_says_what_is_here(tmp_path: Any) -> None:
    found = look_around(str(tmp_path))
    assert found.storage == ""
    assert found.versions["ray"].count(".") == 2
    assert found.code == look_around("").code
    assert "nothing" in look_around(f"nothing://{tmp_path}").storage
