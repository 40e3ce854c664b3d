"""What MLflow has of a training besides its curves, told again from the run's folder: a server that was away has missed it."""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.run.folder import DETAILS, Folder
from pipelines.run.stopping import this_command
from pipelines.tracking.tracker import Tracker, params_of
from qskd.config import Config
from qskd.config.recipe import to_yaml
from qskd.storage.places import fetched

log = logging.getLogger("qskd")
INHERITANCE = "inheritance.txt"


def tell_again(tracker: Tracker, folder: Folder, config: Config) -> bool:
    """Recipe, parameters, what was inherited, the evaluation's tables and the student, over what is there of them; whether all was
    taken. What is in no run's folder (pictures of samples, links to the datasets) is not made again."""
    again = Tracker(tracker.uri, tracker.run_id)  # one that has not complained
    again.text("config.yaml", to_yaml(config))
    if not again.complained:
        again.missing_params(params_of(config))
    if not again.complained and folder.exists(INHERITANCE):
        again.text(INHERITANCE, folder.read(INHERITANCE))
    if not again.complained and folder.exists("student"):
        # It imports the detectors, which Ray Train's controller does without.
        from pipelines.tracking.model import log_student

        with fetched(folder.where("student")) as student:
            log_student(again, Path(student))
    if not again.complained and folder.exists(DETAILS):
        with fetched(folder.where(DETAILS.rpartition("/")[0])) as evaluation:
            again.folder(evaluation, "evaluation")
    if again.complained:
        log.warning(
            "%s: MLFLOW AT %s DOES NOT HAVE ALL OF THE RUN'S FILES. They are in %s. When MLflow answers, this command gives it "
            "the recipe, the student and its evaluation: %s",
            *(config.name, tracker.uri, folder.path, this_command(to_go_on=True)),
        )
    return not again.complained
