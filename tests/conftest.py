"""For every test: no network for models, one thread, and no progress bars."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers give way to all others, and starve on a busy machine
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # after 60 s Ray Train would begin again
# After 60 s Ray would start another. The first to be forked waits until it can be, which takes 5 CPU seconds.
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
# Ray Train starts a process for each run that watches for nodes that go away. Tests of such nodes turn it on again.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Ray starts a process for each core ahead. Those of trainings and trials have environment variables of their own: it would idle.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Ten times a second Ray looks for new lines in its logs, which no driver of ours is sent, and now and then it asks the system about
# each of its processes, for a dashboard. Not within an hour here.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")  # from so many files on it keeps to this interval
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "3600")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "3600000")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "quick"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import forked
import pytest
import torch

runpy.run_path(str(Path(__file__).parent / "quick" / "sitecustomize.py"))  # this process has begun without it
torch.set_num_threads(1)
# A suite that is begun in the background ignores Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# transformers compiles a hundred patterns for each folder that it loads, others for other families, and `re` keeps 512 of all.
vars(re)["_MAXCACHE"] = 1 << 14
if not torch.accelerator.is_available():
    # Seeding also notes, for three kinds of device that are not there, by which calls it was reached. Under pytest these are many,
    # and to write them down is 7 % of a small training step.
    torch.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
# pytest listens to loggers that pass nothing on, and to one that is listened to torch's compiler writes down all that it does.
logging.getLogger("torch.__trace").propagate = True


# The files that take longest: with a file for each worker in turn, one of them started last would decide the end. Those of Ray wait
# as long as they compute: of three workers two have one of them and the third one that computes all the time.
LONGEST = (
    *("two_workers", "ray_job", "export_graphs", "pipelines", "tune", "compiled", "cache_job", "tune_trials"),
    *("evidence", "training_distributed", "object_store", "quantized_export", "family_pairs", "backbones"),
    "untrusted_checkpoints",
)


def pytest_configure(config: pytest.Config) -> None:
    """One for all of xdist's workers, which are begun after this."""
    if not hasattr(config, "workerinput"):
        server = forked.fork_server()
        server.__enter__()
        config.add_cleanup(functools.partial(server.__exit__, None, None, None))


def pytest_collection_finish() -> None:
    """What the tests import lives as long as they do: no collection need look at it."""
    gc.freeze()
    if "qskd.families.conditional_detr" in sys.modules:
        fit_once()
    if "pipelines.training.estimate" in sys.modules:  # a dry run tries steps for three seconds
        sys.modules["pipelines.training.estimate"].BUDGET_S = 0.1  # type: ignore[attr-defined]
    if "typer.testing" in sys.modules:  # it reads the signatures of all verbs each time that one is run: 30 ms
        runner: Any = sys.modules["typer.testing"]
        runner._get_command = functools.cache(runner._get_command)


def fit_once() -> None:
    """The fit of a Conditional DETR's queries gives what it gave for the same numbers before. Its 300 steps are nine tenths of
    building a small one, and tests build a few of them hundreds of times."""
    from qskd.families import conditional_detr

    fit = conditional_detr.fit_points
    known: dict[tuple[object, ...], list[torch.Tensor]] = {}

    def fitted(
        embedding: torch.nn.Parameter, head: torch.nn.Module, points: torch.Tensor, head_too: bool = True
    ) -> None:
        read = [embedding, points, *head.parameters()]
        key = (head_too, *((tuple(each.shape), each.detach().numpy().tobytes()) for each in read))
        moved = [embedding, *(head.parameters() if head_too else ())]
        if key not in known:
            fit(embedding, head, points, head_too=head_too)
            known[key] = [each.detach().clone() for each in moved]
        for each, value in zip(moved, known[key], strict=True):
            each.detach().copy_(value)

    conditional_detr.fit_points = fitted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, then those with most slow tests.

    The Makefile tells xdist to keep this order (`--no-loadscope-reorder`); its own puts those of the most tests first.
    """
    slow: dict[object, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path.stem, len(ranks)), -slow[item.path]))


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    """An idle Ray takes a twentieth of a core: none outlives the file that started it."""
    yield
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val, shards; model, a detector's folder; photo.png."""
    from PIL import Image
    from strangers import SHAPES
    from tiny import LABELS, recipe, silent_student

    from pipelines.prepare import prepare
    from qskd.config import ResizeConfig
    from qskd.datasets.shapes import make_shapes
    from qskd.detectors import save_detector

    root = tmp_path_factory.mktemp("deletes")
    annotations, images = make_shapes(SHAPES, root / "coco")
    for split in ("train", "val"):
        prepare(annotations, images, str(root / split), quiet=True)
    config = recipe().student
    save_detector(silent_student(config, LABELS, 1).eval(), root / "model", ResizeConfig(size=64))
    Image.new("RGB", (64, 64), "red").save(root / "photo.png")
    return root


@pytest.fixture
def here(tiny_folders: Path, tmp_path: Path) -> Path:
    """`tiny_folders`, to be spoilt."""
    shutil.copytree(tiny_folders, tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """The S3 server of `object_store`, which this process's environment names."""
    from object_store import ENVIRONMENT, object_store

    before = dict(os.environ)
    with object_store() as running:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=running.url, AWS_EC2_METADATA_DISABLED="true")
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def store(server: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`.uri` of an empty bucket, `.objects()` in it, `.fail(...)`; a failing store is given up after 5 s."""
    from qskd.storage.stores import PATIENCE

    bucket = f"bucket-{abs(hash(request.node.nodeid)):x}"
    server.make_bucket(bucket)
    monkeypatch.setenv(PATIENCE, "5")
    yield SimpleNamespace(
        uri=f"s3://{bucket}",
        objects=lambda: server.objects(bucket),
        fail=server.fail,
        failed=lambda: server.failed,
        asked=server.asked,
    )
    server.fail(0)
