"""The student in MLflow: the plain Hugging Face folder, and beside it what makes it a model of MLflow's too. Its weights are
there once."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.tracking import student_pyfunc
from pipelines.tracking.tracker import Tracker
from qskd.deploy.export import standing_alone
from qskd.storage.scratch import scratch_folder

log = logging.getLogger("qskd")
NEEDS = ("torch", "transformers", "numpy", "pillow")


def log_student(tracker: Tracker, folder: Path, name: str = "student") -> None:
    """A student's folder as an artefact that plain transformers, `mlflow.pyfunc.load_model` and the model registry read."""
    tracker.folder(folder, name)
    try:
        with scratch_folder("model") as scratch:
            model = write_flavour(scratch / name, tracker.run_id, name)
            tracker.folder(scratch / name, name)
            tracker.model(model)
    except Exception as error:  # the training is done, and the folder is there
        log.warning("MLflow: the student is not marked as a model: %s: %s", type(error).__name__, error)


def write_flavour(folder: Path, run_id: str, name: str) -> Any:
    """MLmodel, what to install, and the code that loads the folder it is laid beside; MLflow's description of it.

    That code (`student_pyfunc`) needs torch, transformers, numpy and Pillow, nothing of qskd.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("threshold", DataType.double, 0.5)]),
    )
    model = Model(artifact_path=name, run_id=run_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow would like an example of an input, and would store it
        with scratch_folder("flavour") as scratch:
            code = scratch / Path(student_pyfunc.__file__).name
            code.write_text(standing_alone(student_pyfunc), encoding="utf-8")
            save_model(
                str(folder),
                loader_module=code.stem,
                code_paths=[str(code)],
                mlflow_model=model,
                pip_requirements=_requirements(),
                signature=signature,
            )
    return model


def _requirements() -> list[str]:
    """The versions it was made with, without the local part ("+cpu") that only one index has."""
    found = []
    for name in NEEDS:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(name)
    return found
