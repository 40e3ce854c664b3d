"""A trial in its own process, without Ray Train."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace

from pipelines.cluster.devices import device_here
from pipelines.feed.stream import Share, local_stream
from pipelines.run.folder import Folder
from pipelines.run.history import add_trial_report, best_ap, read_history, rows_until
from pipelines.training.checkpoints import restore, write_checkpoint
from pipelines.training.plan import Plan
from pipelines.training.worker import Worker
from pipelines.tuning.trial.checkpoints import POINTER, _checkpoint, _keep, _name, last_whole, steps_of
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.reports import Send, evaluated
from qskd.evaluation.average_precision import CocoResult
from qskd.storage.scratch import scratch_folder


def _train_here(job: Job, plan: Plan, folder: Folder, send: Send) -> None:
    worker = TrialWorker(job, plan, folder, send)
    start = worker.start()
    if start < worker.last_step:
        worker.run(start)


class TrialWorker(Worker):
    """The house's worker, without Ray Train around it: it keeps its own checkpoints and sends its evaluations."""

    def __init__(self, job: Job, plan: Plan, folder: Folder, send: Send) -> None:
        # Not preemptible: only Ray Train's workers are told; a trial whose node goes is begun again from its checkpoint.
        super().__init__(plan.config, plan.stream, 1, 0, device_here(plan.config), preemptible=False)
        self.job, self.plan, self.folder, self.send = job, plan, folder, send
        schedule = plan.stream.schedule
        self.last_step = min(schedule.total_steps, round((job.until or schedule.epochs) * schedule.steps_per_epoch))
        self.begun_at, self.since = 0, time.perf_counter()

    def start(self) -> int:
        """Load the weights to go on from; the number of steps they have had."""
        pointer = self.folder.read_record(POINTER) if self.folder.exists(POINTER) else None
        mine = pointer is not None and pointer["generation"] == self.job.generation
        if self.job.donor is not None and not mine:
            source = Folder(self.config.model_copy(update={"name": f"{self.job.donor:04d}"}))
            self.begun_at = restore(self.training, _checkpoint(source, _name(self.job.donor_step)))
        elif pointer is not None:
            begun_at = pointer.get("begun_at", 0) if mine else pointer["step"]
            step = last_whole(self.folder, pointer["step"], begun_at)
            start = restore(self.training, _checkpoint(self.folder, _name(step)), self.patience)
            self.begun_at = pointer.get("begun_at", start) if mine else start
            return start
        return self.begun_at

    def shares(self, start_step: int) -> Iterator[Share]:
        last = self.last_step / self.stream.schedule.steps_per_epoch
        stream = replace(self.stream, finish=self.device.type != "cuda")
        return itertools.takewhile(lambda share: share.epoch < last, local_stream(stream, start_step))

    def report(self, epoch: int, result: CocoResult | None) -> None:
        step, rows = self.training.step, self.meter.flush()
        evaluation = result.metrics if result else {}
        with scratch_folder("trial") as scratch:
            write_checkpoint(scratch, self.training, self.config, result, self.patience)
            if evaluation and evaluation["AP"] > best_ap(read_history(self.folder), step):
                self.folder.upload(scratch / "student", "student")
            self.folder.upload(scratch, _name(step))
        ended = self.patience.exhausted
        history = add_trial_report(self.folder, step, epoch + 1, evaluation, rows, ended)
        self.folder.write_record(
            POINTER, json.dumps({"step": step, "generation": self.job.generation, "begun_at": self.begun_at})
        )
        # In a population another may still begin from where this one began. Elsewhere the one before is there to go back to
        # when this one turns out damaged, until the last is made.
        earlier = max((at for at in steps_of(self.folder) if at < step), default=step)
        if self.job.until and self.begun_at:
            earlier = self.begun_at
        is_last = ended or step >= self.last_step
        _keep(self.folder, {step} if is_last and not self.job.until else {step, earlier})
        if evaluation:
            now = time.perf_counter()
            self.send(evaluated(history[-1], self.plan, rows_until(history, step), now - self.since))
            self.since = time.perf_counter()
