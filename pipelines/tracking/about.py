"""What MLflow's pages show of a run beside its numbers: who started it with what, on which data, and what came of it."""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.cluster.environment import in_a_job
from pipelines.run.stopping import this_command
from qskd.redaction import redacted

if TYPE_CHECKING:
    from qskd.datasets.manifest import Manifest
    from qskd.deploy.model_card import Figures

NOTE = "mlflow.note.content"  # the description, Markdown
STUDENT_TAG = (
    "qskd.student"  # which of a training's students the run's is: the best or the last, and after how many steps
)
EARLY_TAG = "qskd.stopped_early"
VIEW = "qskd"  # of an experiment's list of runs: `?viewStateShareKey=qskd`
SHOWN = ("best/AP", "val/AP", "val/AP50", "cost/parameters_m", "cost/gflops", "cost/latency_ms")
DIGEST_LENGTH, NAME_LENGTH = 36, 500  # limits of MLflow's server
FACTS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """Of an experiment that qskd makes: its pages are those for trainings, not for language models. MLflow's list of runs shows no
    metric by itself, and a server can't tell it to; a view of the list, which the description links, shows AP and costs."""
    view = {
        "selectedColumns": [f"metrics.`{name}`" for name in SHOWN],
        "orderByKey": "metrics.`best/AP`",
        "orderByAsc": False,
    }
    link = f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "best/AP",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
        f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
        NOTE: f"Detectors trained by qskd. [Runs with AP, size and latency, the best first]({link})",
    }


def source_tags(verb: str) -> dict[str, str]:
    """User, program and, where the working folder is in a repository, git's commit, branch and remote. Nothing secret: of the
    remote's address and of the command, users and passwords are taken out."""
    from mlflow.utils.git_utils import get_git_branch, get_git_commit, get_git_repo_url

    here = str(Path.cwd())
    tags = {
        "mlflow.source.name": f"qskd {verb}",
        "mlflow.source.type": "JOB" if in_a_job() else "LOCAL",
        "mlflow.source.git.commit": get_git_commit(here),
        "mlflow.source.git.branch": get_git_branch(here),
        "mlflow.source.git.repoURL": get_git_repo_url(here),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return {name: redacted(value) for name, value in tags.items() if value}


def command_note(said: str = "") -> str:
    """A description that says how to do it again. said: what else there is to say."""
    command = f"```\n{redacted(this_command())}\n```"
    return f"{said}\n\n{command}" if said else command


def result_note(note: str, student: str, metrics: Mapping[str, float], figures: Figures | None, best: str) -> str:
    """The description of a finished run: the command, and what came of it. best: which student it is."""
    facts = [f"{name} {metrics[name]:.3f}" for name in FACTS if metrics.get(name, -1.0) >= 0]
    if figures is not None:
        facts += [f"{figures.parameters / 1e6:.2f} M parameters"] if figures.parameters is not None else []
        facts += [f"{figures.gflops:.3g} GFLOPs"] if figures.gflops is not None else []
        facts += [f"{figures.ms:.1f} ms/image"] if figures.ms is not None else []
    lines = [
        f"**{', '.join(facts)}**" if facts else "No AP could be measured.",
        best,
        f"student: `{redacted(student)}`",
    ]
    return "\n\n".join([*(line for line in lines if line), note])


def figure_metrics(figures: Figures) -> dict[str, float]:
    """What a student costs, under the names that a sweep's trials have."""
    millions = None if figures.parameters is None else figures.parameters / 1e6
    found = {"cost/parameters_m": millions, "cost/gflops": figures.gflops, "cost/latency_ms": figures.ms}
    return {name: value for name, value in found.items() if value is not None}


def dataset_inputs(data: Mapping[str, tuple[str, Manifest]]) -> list[Any]:
    """MLflow's inputs of a run. data: what each is for ("training", "validation") -> (path or URI, manifest)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for context, (uri, manifest) in data.items():
        profile = {"images": manifest.num_images, "objects": manifest.num_objects, "classes": len(manifest.categories)}
        remote = "://" in uri
        dataset = Dataset(
            name=(Path(urlsplit(uri).path if remote else uri).name or context)[:NAME_LENGTH],
            digest=manifest.fingerprint[:DIGEST_LENGTH],
            source_type=uri.partition("://")[0] if remote else "local",
            source=json.dumps({"uri": redacted(uri), "annotations": redacted(str(manifest.source))}),
            profile=json.dumps(profile),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return inputs
