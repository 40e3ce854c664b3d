"""Ray's lines that are known to be harmless are kept back; any other line, from the same place too, arrives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = "[2026-11-28 18:54:53,492 E 15719 15719] "
HARMLESS = [
    f"{HEAD}core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches(TeacherActor))' and ID: '815a146c5ed488871e' has "
    "constructor arguments in the object store and max_restarts > 0. If the arguments in the object store go out of scope or "
    "are lost, the actor restart will fail. See https://github.com/ray-project/ray/issues/53727 for more details.",
    f"{HEAD}core_worker_process.cc:842: Failed to establish connection to the metrics exporter agent. Metrics will not be "
    "exported. Exporter agent status: RpcError: Running out of retries to initialize the metrics agent. rpc_code: 14",
    "[2026-11-28 18:54:53,492 E 17 17] (gcs_server) gcs_server.cc:303: Failed to establish connection to the event+metrics "
    "exporter agent. Events and metrics will not be exported.",
]
OTHERS = [
    f"{HEAD}core_worker.cc:2465: Actor with class name: 'Teacher' and ID: '815a' died",  # the same place
    f"{HEAD}core_worker.cc:711: Check failed: the object store is gone",
    f"{HEAD}core_worker_process.cc:842: Failed to establish connection to the raylet",
    "[2026-11-28 18:54:53,492 C 17 17] core_worker_process.cc:842: Failed to establish connection to the metrics exporter "
    "agent.",  # C: it is about to end the program
    "a user's own line that speaks of core_worker.cc:2465: Actor with class name",
    "Fatal Python error: Segmentation fault",
]
PROGRAM = """
import os, sys
from pipelines.cluster.noise import keep_back_noise, own_stderr
own_stderr(); keep_back_noise(); keep_back_noise()
print("from Python", file=sys.stderr)
os.write(2, sys.argv[1].encode())
if sys.argv[2] == "dies":
    os.abort()
"""


@pytest.mark.parametrize("end", ["ends", "dies"])
def test_known_harmless_lines_are_kept_back_and_all_others_arrive_even_from_a_program_that_dies(end: str) -> None:
    lines = [line for pair in zip(HARMLESS, OTHERS, strict=False) for line in pair] + OTHERS[len(HARMLESS) :]
    text = "\n".join(lines) + "\nhalf a line"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, text, end], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert (done.returncode == 0) == (end == "ends")
    assert done.stdout == ""
    arrived = done.stderr.splitlines()
    assert arrived.pop(arrived.index("from Python")) == "from Python"
    assert arrived == [*OTHERS, "half a line"]


def test_with_qskd_verbose_everything_arrives() -> None:
    text = HARMLESS[0] + "\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['QSKD_VERBOSE'] = '1'\n{PROGRAM}", text, "ends"],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=True,
    )  # fmt: skip
    assert text in done.stderr
