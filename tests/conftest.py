"""For every test: no network for models, one thread, and no progress bars."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers give way to all others, and starve on a busy machine
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # after 60 s Ray Train would begin again
# Ray Train starts a process for each run that watches for nodes that go away. Tests of such nodes turn it on again.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: with a file for each worker in turn, one of them started last would decide the end.

    The Makefile tells xdist to keep this order (`--no-loadscope-reorder`); its own puts those of the most tests first.
    """
    slow: dict[object, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])
