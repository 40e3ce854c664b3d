"""What a sweep leaves: the winner's recipe, the report, the best student in MLflow's registry. Made of the rows alone."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from pipelines.run.folder import RECIPE, Folder
from pipelines.run.logs import tell
from pipelines.tracking.model import log_student
from pipelines.tracking.store import how_to_look, tracking_uri
from pipelines.tracking.tracker import Tracker
from pipelines.tuning.records import Records
from pipelines.tuning.report.results import best_row, has_ap
from pipelines.tuning.tracking import ALIAS
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_yaml
from qskd.evaluation.shown import is_measured
from qskd.storage.scratch import scratch_folder


@dataclass(frozen=True)
class SweepResult:
    """best_recipe: the file that `qskd distill` takes. version: of the registered model, "" when that failed."""

    folder: str
    rows: tuple[TrialRow, ...]
    best: TrialRow | None
    best_recipe: str
    run_id: str
    version: str = ""

    @property
    def ap(self) -> float | None:
        """Of the best trial's best evaluation, 0..1; None where nothing was measured."""
        return self.best.best_ap if self.best is not None and is_measured(self.best.best_ap) else None


def best_recipe(config: Config, best: TrialRow) -> str:
    """The recipe with the best trial's settings at its full length, as YAML, with the command that trains it."""
    return _recipe(config, best, f"{config.name}-best", Folder(config).where("best.yaml"))


def _recipe(config: Config, row: TrialRow, name: str, where: str) -> str:
    """A trial as a training of its own, which is to be called `name`. where: the file that this becomes."""
    found = replace_fields(config, {**row.overrides, "name": name}, f"trial {row.number}")
    head = [
        f"# Trial {row.number} of the sweep {config.name}: AP {row.best_ap:.4f} after {row.epochs:g} epoch(s).",
        f"#   command:  qskd distill {shlex.quote(where)}",
        *(f"#   {field}: {json.dumps(value)}" for field, value in row.overrides.items()),
    ]
    return "\n".join(head) + "\n" + to_yaml(found)


def write_recipes(config: Config, records: Records) -> None:
    """The same of every trial with an AP, in its folder: with two goals any of the Pareto front may be the one that is wanted,
    and the configuration in a trial's MLflow run is of a trial, and names its folder."""
    for row in filter(has_ap, records.in_order()):
        folder = records.trial_folder(row.number)
        name = f"{config.name}-trial-{row.number:04d}"
        folder.write(RECIPE, _recipe(config, row, name, folder.where(RECIPE)))


def finish(config: Config, description: str, records: Records, tracker: Tracker) -> SweepResult:
    """The report, the best recipe, the registered model. May be run again: it makes the same of the same rows."""
    from rich.console import Console

    from pipelines.tuning.report.report import write_report
    from pipelines.tuning.report.tables import terminal_table

    rows, folder = records.in_order(), records.folder
    best = best_row(rows)
    text, command, version = "", "", ""
    if best is not None:
        text, command = best_recipe(config, best), f"qskd distill {shlex.quote(folder.where('best.yaml'))}"
        folder.write("best.yaml", text)
        tracker.text("best.yaml", text)
        write_recipes(config, records)
        version = _register(config, records, best, tracker)
    with scratch_folder("sweep-report") as scratch:
        write_report(scratch, rows, config, text, f"{config.name}: {description}")
        folder.upload(scratch, "report")
        tracker.folder(scratch, "report")
    Console().print(terminal_table(rows, command, config))
    if best is not None:
        tell(f"any other trial at full length: qskd distill {folder.where(f'trials/NUMBER/{RECIPE}')}")
    if version:
        tell(f"the winner's student as it is: models:/{config.name}@{ALIAS} (version {version})")
    tell(f"report: {folder.where('report/index.html')}")
    tell(f"look at the sweep: {how_to_look(tracking_uri(config))}")
    tracker.finish("FINISHED" if best is not None else "FAILED")
    recipe_path = folder.where("best.yaml") if best is not None else ""
    return SweepResult(folder.path, tuple(rows), best, recipe_path, tracker.run_id, version)


def _register(config: Config, records: Records, best: TrialRow, parent: Tracker) -> str:
    """The best student's folder into its trial's run, and from there into the registry."""
    from pyarrow import fs

    trial = records.trial_folder(best.number)
    if not best.run_id or not trial.exists("student"):
        return ""
    child = Tracker(parent.uri, best.run_id)
    with scratch_folder("best") as scratch:
        fs.copy_files(f"{trial.root}/student", str(scratch), source_filesystem=trial.filesystem)
        log_student(child, scratch)
    return child.register("student", config.name, ALIAS)
