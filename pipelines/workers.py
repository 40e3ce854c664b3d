"""The train loop of one worker: batches in, reports and checkpoints out, exact resume from the last one."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.models import ground_truth, make_student, teacher_for_training
from pipelines.storage import FAILURE, Folder, record_failure
from pipelines.streaming import Share, StreamConfig, open_stream
from qskd.config import Config
from qskd.detectors import Preprocessing, save_detector
from qskd.errors import QskdError
from qskd.evaluation import CocoResult, Detections, evaluate_coco
from qskd.inference import predict_batch
from qskd.manifest import load_manifest
from qskd.recipe import build
from qskd.training import Training, train_batch

LOG_EVERY_STEPS = 20


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        import ray.train.torch

        return ray.train.torch.get_device()
    return torch.device(name)


def gather_detections(own: Detections, world_size: int) -> Detections | None:
    """All workers' detections on rank 0, None elsewhere."""
    if world_size == 1:
        return own
    import torch.distributed as dist

    parts: list[Detections] | None = [Detections.empty()] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return Detections.concatenate(parts) if parts is not None else None


class Meter:
    """Term values and throughput, averaged over a few steps at a time; tensors stay on the device until then."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pending: list[dict[str, Tensor]] = []
        self.step, self.images, self.waited_s, self.started = 0, 0, 0.0, time.perf_counter()

    def add(self, step: int, values: dict[str, Tensor], images: int, waited_s: float) -> None:
        self.step = step
        self.pending.append(values)
        self.images += images
        self.waited_s += waited_s
        if len(self.pending) == LOG_EVERY_STEPS:
            self._close_row()

    def _close_row(self) -> None:
        names = list(self.pending[0])
        means = torch.stack([torch.stack([v[name].float() for name in names]) for v in self.pending]).mean(0).tolist()
        spent_s = max(time.perf_counter() - self.started, 1e-9)
        row = {f"loss/{name}": value for name, value in zip(names, means, strict=True)}
        row |= {"speed/images_per_s": self.images / spent_s, "speed/loader_wait_share": self.waited_s / spent_s}
        self.rows.append((self.step, row))
        self.pending, self.images, self.waited_s, self.started = [], 0, 0.0, time.perf_counter()

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """The rows since the last flush, (step, means): each worker's own share of every term."""
        self.pause()
        rows, self.rows = self.rows, []
        return rows

    def pause(self) -> None:
        """What comes now is not training: close the row, so that images/s does not count it."""
        if self.pending:
            self._close_row()

    def resume(self) -> None:
        self.started = time.perf_counter()


def write_checkpoint(folder: Path, training: Training, config: Config, result: CocoResult | None) -> None:
    """state.safetensors, state.json, and the student as a plain Hugging Face folder."""
    save_file(training.state(), folder / "state.safetensors")
    metrics = result.metrics if result else {}
    (folder / "state.json").write_text(json.dumps({"step": training.step, "metrics": metrics}))
    if result is not None:
        with training.evaluation_weights() as student:
            save_detector(student, folder / "student", config.student.resize)


def restore(training: Training, checkpoint: Any) -> int:
    """Load a checkpoint; the number of training steps done. At an epoch's end its evaluation is done too."""
    with checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "state.json").read_text())
        training.load_state(load_file(Path(folder) / "state.safetensors"), state["step"])
    return training.step


# What trying again can't mend. Ray Train would restart the workers for these as for a machine that was lost.
NOT_WORTH_RETRYING = (
    QskdError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ImportError, NotImplementedError,
)  # fmt: skip


def train_worker(payload: dict[str, Any]) -> None:
    """The function TorchTrainer runs on every worker. payload: "config" (nested dict) and "stream" (StreamConfig)."""
    import ray.train

    config, stream = build(payload["config"]), payload["stream"]
    folder = Folder(config)
    if folder.exists(FAILURE):
        return  # the driver reads it and says why
    context = ray.train.get_context()
    if config.compute.threads_per_worker:
        torch.set_num_threads(config.compute.threads_per_worker)
    try:
        worker = Worker(config, stream, context.get_world_size(), context.get_world_rank())
        checkpoint = ray.train.get_checkpoint()
        worker.run(restore(worker.training, checkpoint) if checkpoint else 0)
    except NOT_WORTH_RETRYING as error:
        record_failure(folder, error)
        raise


class Worker:
    """One worker's training, its share of the evaluations, and its reports."""

    def __init__(
        self, config: Config, stream: StreamConfig, world_size: int, rank: int, device: torch.device | None = None
    ) -> None:
        self.config, self.stream, self.world_size, self.rank = config, stream, world_size, rank
        self.device = device or pick_device(config.compute.device)
        manifest = load_manifest(stream.train_uri)
        self.category_ids = tuple(category.id for category in manifest.categories)
        student = make_student(config, manifest.labels)
        teacher = teacher_for_training(config, manifest.labels)
        self.training = Training(config, student, teacher, stream.schedule.total_steps, self.device)
        self.truth = ground_truth(stream.val_uri) if rank == 0 else None
        self.meter = Meter()

    def run(self, start_step: int) -> None:
        """Go through the schedule from a training step on."""
        shares = self.shares(start_step)
        for (kind, epoch), part in itertools.groupby(shares, key=lambda share: (share.kind, share.epoch)):
            if kind == "train":
                self.train(part)
            else:
                self.report(epoch, self.evaluate(part))
        self.training.check_finite()

    def shares(self, start_step: int) -> Iterator[Share]:
        """This worker's batches from a training step on."""
        loaders = self.config.compute.loader_workers
        return open_stream(self.stream, start_step, self.world_size, self.rank, loaders)

    def train(self, shares: Iterator[Share]) -> None:
        """One epoch, or the rest of one. Reports every so many steps, and at an end that no evaluation follows."""
        every, batch_size = self.config.training.checkpoint_every_steps, self.stream.schedule.batch_size
        self.meter.resume()
        waiting_since = time.perf_counter()
        for share in shares:
            waited_s = time.perf_counter() - waiting_since
            values = self.training.train_step(train_batch(share.arrays, self.device))
            self.meter.add(self.training.step, values, batch_size, waited_s)
            if share.is_last:
                if not self.stream.schedule.evaluates_after(share.epoch):
                    self.report(share.epoch, None)
            elif every and self.training.step % every == 0:
                self.report(share.epoch, None)
                self.meter.resume()
            waiting_since = time.perf_counter()
        self.meter.pause()

    def evaluate(self, shares: Iterator[Share]) -> CocoResult | None:
        """COCO AP over the validation set; on rank 0, None elsewhere."""
        seen_as = Preprocessing(self.config.student.resize)
        with self.training.evaluation_weights() as student:
            found = [
                predict_batch(student, share.arrays, seen_as, self.category_ids, device=self.device) for share in shares
            ]
        everything = gather_detections(Detections.concatenate(found), self.world_size)
        return evaluate_coco(self.truth, everything) if everything is not None and self.truth is not None else None

    def report(self, epoch: int, result: CocoResult | None) -> None:
        """Metrics to the controller; from rank 0 with a checkpoint, with a student folder in it after an evaluation."""
        import ray.train

        metrics: dict[str, Any] = {"epoch": epoch, "step": self.training.step, "rows": self.meter.flush()}
        if result is not None:
            metrics["evaluation"] = result.metrics
        if self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="qskd-checkpoint-") as folder:
            write_checkpoint(Path(folder), self.training, self.config, result)
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder))
