"""Each way in which nodes differ is said, with the node's name; a cluster whose nodes agree has no problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.health.nodes import PACKAGES, NodeFacts, NodeReport, look_around, problems

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
        (replace(REPORT, facts=replace(FACTS, storage="s3://b: ACCESS_DENIED")), "storage: s3://b: ACCESS_DENIED"),
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


def test_a_node_says_what_is_here(tmp_path: Any) -> None:
    found = look_around(str(tmp_path))
    assert found.storage == ""
    assert found.versions["ray"].count(".") == 2
    assert found.code == look_around("").code
    assert "nothing" in look_around(f"nothing://{tmp_path}").storage
