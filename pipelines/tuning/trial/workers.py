"""A trial of several workers, by Ray Train."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.reporting.progress import mean_rows
from pipelines.run.folder import FAILURE, Folder, raise_failure
from pipelines.run.history import rows_until
from pipelines.training.checkpoint_list import keep_list
from pipelines.training.plan import Plan
from pipelines.training.trainer import make_trainer
from pipelines.tuning.trial.reports import evaluated, note_report


def _train_with_workers(plan: Plan, folder: Folder) -> None:
    import ray
    from ray.tune.integration.ray_train import TuneReportCallback

    class EveryEvaluation(TuneReportCallback):
        """In the controller: history and best student into the trial's folder, every evaluation to Tune."""

        def __init__(self) -> None:
            super().__init__()
            self.since = time.perf_counter()

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            first = metrics[0]
            keep_list(folder)
            history = note_report(folder, first, mean_rows([worker["rows"] for worker in metrics]), checkpoint)
            entry = history[-1]
            if not entry["evaluation"]:
                return
            rows = rows_until(history, entry["step"])
            report = evaluated(entry, plan, rows, time.perf_counter() - self.since)
            self.since = time.perf_counter()
            # Of what is to be ended and given back when the trial is stopped (`SweepScheduler._release`).
            controller = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
            report["held"] = {"placement_group": first["placement_group"], "controller": controller.hex()}
            super().after_report(run_context, [{"report": json.dumps(report)}], None)

    folder.delete(FAILURE)
    try:
        make_trainer(plan.config, plan.stream, folder, [EveryEvaluation()]).fit()
    finally:
        raise_failure(folder)
