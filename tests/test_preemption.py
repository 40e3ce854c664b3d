"""A node that is about to be taken away: one checkpoint at once, from an elastic pair of workers, and the run goes on.

`python tests/test_preemption.py FOLDER` is the run, in a process and a Ray of its own: the node it drains takes no work after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS_AN_EPOCH = 30


def drain_when_begun(folder: object) -> None:
    """Tell Ray, as a cloud's notice does, that its only node goes in ten minutes: when one epoch is done."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    from pipelines.run.history import read_history

    while not read_history(folder):  # type: ignore[arg-type]
        time.sleep(0.1)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 600_000
    node = ray.nodes()[0]["NodeID"]
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, _ = client.drain_node(node, reason, "a test", deadline_ms)
    assert accepted


def run(root: Path) -> None:
    from test_pipelines import SIZES

    from pipelines.cluster.start import start_ray
    from pipelines.prepare import prepare
    from pipelines.run.folder import Folder
    from pipelines.run.history import read_history
    from pipelines.training import driver as distill
    from qskd.config.recipe import load
    from qskd.datasets.shapes import ShapesConfig, make_shapes

    for name, images, first in (("train", 4 * STEPS_AN_EPOCH, 0), ("val", 8, 1000)):
        annotations, pictures = make_shapes(ShapesConfig(images=images, first_image=first), root / f"{name}-coco")
        prepare(annotations, pictures, str(root / name), rows_per_shard=60, quiet=True)
    config = load(None, [
        *SIZES, "name=one", f"output={root}/runs", f"data.train={root}/train", f"data.val={root}/val",
        f"tracking.uri=sqlite:///{root}/mlflow.db", "training.epochs=5", "training.batch_size=4",
        "training.evaluate_every_epochs=5", "compute.workers=2", "compute.min_workers=1",
    ])  # fmt: skip
    start_ray()
    threading.Thread(target=drain_when_begun, args=(Folder(config),), daemon=True).start()
    distill.run(config, "train")
    print(json.dumps([entry["step"] for entry in read_history(Folder(config))]))


@pytest.mark.slow
def test_a_notice_makes_one_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(done.stdout.splitlines()[-1])
    ends = [STEPS_AN_EPOCH * epoch for epoch in range(1, 6)]
    assert [step for step in steps if step in ends] == ends
    between = [step for step in steps if step not in ends]
    # Asked every ten steps: a notice that comes just before an epoch's end finds its checkpoint made.
    assert len(between) == 1
    assert between[0] % 10 == 0
    assert between[0] > STEPS_AN_EPOCH


if __name__ == "__main__":
    run(Path(sys.argv[1]))
