"""MLflow, one thin layer. While a training lasts the controller's callback (`reporting.progress`) alone writes to its run; before
and after it, the driver does.

The run's id is kept beside the training's checkpoints, so that a resumed training continues the run it began. A server
that does not answer never stops a training: what could not be logged is said once, and the files are in the output folder.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.tracking.about import experiment_tags, source_tags
from pipelines.tracking.answers import check_answers
from pipelines.tracking.pause import FIRST_S, LONGEST_S, pause_of
from pipelines.tracking.store import _client, experiment_of, time_for_files, tracking_uri
from qskd.config import Config
from qskd.config.recipe import flatten, to_tree, to_yaml
from qskd.errors import QskdError

log = logging.getLogger("qskd")
PARAMS_PER_CALL, METRICS_PER_CALL, PARAM_LENGTH = 100, 1000, 6000  # limits of MLflow 3's server
PARAM_KEY_LENGTH = 250
METRIC_PART_LENGTH = 200  # of 250, which MLflow takes of a metric's whole name
KeptRow = tuple[int, int, Mapping[str, float]]  # ms since 1970, step, {metric: value}
PARENT = "mlflow.parentRunId"  # the tag by which MLflow nests runs
FILES = ("log_artifact", "log_artifacts")


def _continues(client: Any, uri: str, run_id: str) -> bool:
    """Open a run again; False, and a warning, where the server has none, or only a deleted one, of that id."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_terminated(run_id, "RUNNING")
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
            raise
        log.warning("MLflow at %s has no active run %s, which this run had: a new one is begun", uri, run_id)
        return False
    return True


def params_of(config: Config) -> dict[str, Any]:
    """All fields, flat. Of a student that starts from a checkpoint those that were given: its sizes are the checkpoint's, and not
    the defaults."""
    fields = flatten(to_tree(config))
    if config.student.init:
        given = flatten({"student": config.student.model_dump(mode="json", exclude_unset=True)})
        fields = {name: value for name, value in fields.items() if not name.startswith("student.") or name in given}
    return fields


class Tracker:
    """One MLflow run, addressed by id; picklable, so that any process can hold it (and only one does)."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._connected: Any = None
        self._complained = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    @classmethod
    def open(
        cls, config: Config, verb: str, run_id: str = "", parent: str = "", tags: Mapping[str, str] | None = None
    ) -> Tracker:
        """Open a new run, or continue `run_id`. parent: the id of the run it is a child of, as a trial is of its sweep.

        Raises QskdError when the server does not answer, or the experiment was deleted: better now than later.
        """
        uri = tracking_uri(config)
        check_answers(uri)
        try:
            client = _client(uri)
            if run_id and _continues(client, uri, run_id):
                return cls(uri, run_id)
            experiment = experiment_of(client, config.tracking.experiment, uri, experiment_tags)
            run = client.create_run(
                experiment,
                run_name=config.tracking.run_name or config.name,
                tags={
                    **source_tags(verb),
                    "qskd.kind": verb,
                    "qskd.name": config.name,
                    **({PARENT: parent} if parent else {}),
                    **(tags or {}),
                },
            )
            tracker = cls(uri, run.info.run_id)
            tracker.params(params_of(config))
            tracker.text("config.yaml", to_yaml(config))
            return tracker
        except QskdError:
            raise
        except Exception as error:
            raise QskdError(
                f"MLflow at {uri}",
                f"{type(error).__name__}: {error}",
                "a tracking server or database that answers",
                "start it, or correct tracking.uri / MLFLOW_TRACKING_URI; `qskd doctor` checks it",
            ) from error

    def _call(self, method: str, *arguments: Any, **keywords: Any) -> bool:
        """Whether it was done. What could not be logged of metrics is filled in later (`pipelines.tracking.curves`). A server that
        let us wait in vain is not asked at all for a while; how a run ended, which nothing fills in, is told it after a minute."""
        pause = pause_of(self.uri)
        ended_early = method == "set_terminated" and "FINISHED" not in arguments
        if pause.left_s(FIRST_S if ended_early else LONGEST_S):
            self._complained = True
            return False
        try:
            with pause.asked(), time_for_files() if method in FILES else contextlib.nullcontext():
                self._connected = self._connected or _client(self.uri)
                getattr(self._connected, method)(self.run_id, *arguments, **keywords)
        except Exception as error:
            if not self._complained:
                again = f" MLflow is not asked for {pause.left_s():.0f} s." if pause.left_s() else ""
                log.warning(
                    "MLflow at %s: %s failed: %s. Training goes on; its files are in the output folder.%s",
                    *(self.uri, method, error, again),
                )
            self._complained = True
            return False
        return True

    @property
    def complained(self) -> bool:
        """Whether anything could not be logged by this process."""
        return self._complained

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        listed = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in param_keys(values).items()]
        for start in range(0, len(listed), PARAMS_PER_CALL):
            self._call("log_batch", params=listed[start : start + PARAMS_PER_CALL])

    def missing_params(self, values: Mapping[str, Any]) -> None:
        """Those that are not there: MLflow takes no other value of one, and a training that went on may have had other workers."""
        try:
            client = self._connected = self._connected or _client(self.uri)
            there = client.get_run(self.run_id).data.params
        except Exception:
            self._complained = True
            return
        self.params({name: value for name, value in param_keys(values).items() if name not in there})

    def metrics(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> bool:
        """Rows of (step, {name: value}); whether all were taken."""
        now = int(time.time() * 1000)
        listed = [_metric(name, value, now, step) for step, row in rows for name, value in row.items()]
        batches = [listed[start : start + METRICS_PER_CALL] for start in range(0, len(listed), METRICS_PER_CALL)]
        return all(self._call("log_batch", metrics=batch) for batch in batches)

    def fill_in(self, rows: Sequence[KeptRow], now: bool = True) -> int:
        """Log what of these rows MLflow does not have, by metric and step; the number of rows that lacked something. Raises
        what MLflow raises; unless it must be now, also where a server that kept silent is not asked for a while. One request a
        metric, and one for each thousand values that are missing."""
        pause = pause_of(self.uri)
        if not now and pause.left_s():
            raise QskdError(
                f"MLflow at {self.uri}", f"did not answer; it is not asked for another {pause.left_s():.0f} s"
            )
        with pause.asked():
            return self._fill_in(rows)

    def _fill_in(self, rows: Sequence[KeptRow]) -> int:
        client = self._connected = self._connected or _client(self.uri)
        at: dict[str, dict[int, int]] = {}  # metric -> step -> the row that has it; the later one, where two do
        for number, (_, step, values) in enumerate(rows):
            for name in values:
                at.setdefault(name, {})[step] = number
        missing: list[tuple[int, str]] = []
        for name, steps in at.items():
            there = {each.step for each in client.get_metric_history(self.run_id, _key(name))}
            missing += [(number, name) for step, number in steps.items() if step not in there]
        for start in range(0, len(missing), METRICS_PER_CALL):
            part = [(rows[number], name) for number, name in missing[start : start + METRICS_PER_CALL]]
            metrics = [_metric(name, row[2][name], row[0], row[1]) for row, name in part]
            client.log_batch(self.run_id, metrics=metrics)
        return len({number for number, _ in missing})

    def last_step(self, metric: str) -> int:
        """The highest step this metric was logged at, -1 if never: what a restarted writer must not write again."""
        try:
            self._connected = self._connected or _client(self.uri)
            return max((m.step for m in self._connected.get_metric_history(self.run_id, metric)), default=-1)
        except Exception:
            return -1

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of all that was logged of this metric, by step; empty when there is none, or no answer."""
        if self._complained:
            return []  # it would be waited for again
        try:
            self._connected = self._connected or _client(self.uri)
            return sorted({m.step: m.value for m in self._connected.get_metric_history(self.run_id, metric)}.items())
        except Exception:
            return []

    def text(self, name: str, text: str) -> None:
        self._call("log_text", text, name)

    def picture(self, name: str, path: str | Path) -> None:
        self._call("log_artifact", str(path), str(Path(name).parent) if "/" in name else None)

    def folder(self, path: str | Path, name: str) -> None:
        self._call("log_artifacts", str(path), name)

    def tag(self, name: str, value: str) -> None:
        self._call("set_tag", name, value)

    def inputs(self, datasets: Sequence[Any]) -> None:
        """What the run is made from (`pipelines.tracking.about.dataset_inputs`)."""
        self._call("log_inputs", datasets)

    def model(self, model: Any) -> None:
        """That an artefact of this run is a model, by MLflow's own description of it."""
        self._call("_record_logged_model", model)

    def children(self, tag: str) -> dict[str, tuple[str, str]]:
        """The runs below this one: the value of their tag -> id and status. Empty when the server does not answer."""
        try:
            client = self._connected = self._connected or _client(self.uri)
            experiment = client.get_run(self.run_id).info.experiment_id
            found = client.search_runs([experiment], f"tags.`{PARENT}` = '{self.run_id}'", max_results=10_000)
            return {run.data.tags[tag]: (run.info.run_id, run.info.status) for run in found if tag in run.data.tags}
        except Exception:
            return {}

    def register(self, artifact: str, model: str, alias: str) -> str:
        """Make an artefact of this run the version of a registered model that the alias points to; "" when that failed.

        The run's version is made once: asked again, it only gets the alias.
        """
        try:
            client = self._connected = self._connected or _client(self.uri)
            if not client.search_registered_models(f"name = '{model}'"):
                client.create_registered_model(model)
            source = f"{client.get_run(self.run_id).info.artifact_uri}/{artifact}"
            there = [each for each in client.search_model_versions(f"name = '{model}'") if each.run_id == self.run_id]
            version = there[0] if there else client.create_model_version(model, source, self.run_id)
            client.set_registered_model_alias(model, alias, version.version)
            return str(version.version)
        except Exception as error:
            log.warning("MLflow at %s: the model %s was not registered: %s", self.uri, model, error)
            return ""

    def finish(self, status: str = "FINISHED") -> bool:
        return self._call("set_terminated", status)

    def delete(self) -> None:
        """As the UI does: it is kept, out of sight, until `mlflow gc`."""
        self._call("set_terminated", "FAILED")
        self._call("delete_run")


def param_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under keys that MLflow takes: a class map's keys are class names, and one odd name would lose a whole
    batch of parameters. Keys that would fall together are numbered."""
    return _plain(values, r"^\.|[^\w\-. :]", PARAM_KEY_LENGTH)


def metric_names(values: Mapping[str, float]) -> dict[str, float]:
    """The same values under what may be a part of a metric's name, for names that others chose: a class may be called `km/h`."""
    return _plain(values, r"^\.|[^\w\-. ]", METRIC_PART_LENGTH)


def _plain(values: Mapping[str, Any], odd: str, length: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        plain = re.sub(odd, "_", key)[:length].strip() or "_"
        number = 1
        while plain in found:
            number += 1
            plain = f"{plain[: length - 10]}_{number}"
        found[plain] = value
    return found


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _metric(name: str, value: float, time_ms: int, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(_key(name), float(value), time_ms, step)
