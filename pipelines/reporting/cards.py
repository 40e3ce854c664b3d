"""The facts of a finished run, for its student's model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from pipelines.cluster.devices import device_here
from pipelines.inspection.evaluate import evaluate
from pipelines.reporting.board import stage
from qskd.config import ONNX, Config, ResizeConfig
from qskd.config.recipe import changes
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.splits import class_map_for
from qskd.datasets.unlabeled.joined import training_manifest, unlabeled_manifests
from qskd.deploy.model_card import Card, Figures, method_titles, read_card, write_card
from qskd.deploy.speed import Size, Timing, compare_speed, cost_of, torch_runner, usual_size
from qskd.detectors import Detector, load_detector
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.evaluation.forgetting import mean_of
from qskd.redaction import without_home
from qskd.storage.places import open_folder
from qskd.teacher.identity import teacher_preprocessing
from qskd.teacher.several.members import Member, members_of, paths_of, teachers_named
from qskd.teacher.told.results import is_results
from qskd.untrusted import parse_large_json

log = logging.getLogger("qskd")
ROUNDS, TIMING_LIMIT_S = 10, 10.0
PRIVATE = ("card", "output", "tracking")  # a server's address may hold a password


def recipe_of(config: Config) -> str:
    """What differs from the defaults, as YAML."""
    told = {key: value for key, value in changes(config).items() if key not in PRIVATE}
    return without_home(yaml.safe_dump(told, sort_keys=False, width=110))


def baseline_metrics(folder: str) -> dict[str, float]:
    """AP and the like of a finished run; nothing, and a warning, where there is none."""
    filesystem, path = open_folder(folder)
    try:
        with filesystem.open_input_stream(f"{path}/result.json") as stream:
            return dict(parse_large_json(stream.read(), "result.json")["metrics"])
    except (OSError, QskdError, ValueError, KeyError, TypeError):
        log.warning("card.baseline: %s is no finished run; the card says that its AP was not measured", folder)
        return {}


def teacher_metrics(config: Config, member: Member | None = None) -> dict[str, float]:
    """AP of the teacher on the validation images, where the recipe asks for that. member: of several this one's, of its own
    classes."""
    if not config.card.evaluate_teacher:
        return {}
    stage("evaluating the teacher")
    compute, seen_as = config.compute, teacher_preprocessing(config).resize
    threads = compute.threads_per_worker or 1
    data = training_manifest(config.data), load_manifest(config.data.val)
    path, class_map, own = config.teacher.path, config.teacher.class_map, list[str]()
    if member is not None:
        path, own = member.path, member.classes(data[0].labels)
        class_map = {name: member.class_map.get(name, name) if name in own else None for name in data[0].labels}
    teacher = (path, config.data.val, seen_as, class_map_for(class_map, *data))
    found = evaluate(
        *teacher,
        workers=compute.workers,
        threads=threads,
        device=compute.device,
        precision=compute.evaluation_precision,  # as the student is
        tell_nobody=member is None,
    )
    return found.metrics if member is None else mean_of(found, own)


def figures(
    detectors: Mapping[str, tuple[Detector, Mapping[str, float]]], sizes: Mapping[str, ResizeConfig], config: Config
) -> tuple[list[Figures], str]:
    """A row of each detector, and how its latency was measured. What can't be measured is left out, with a warning."""
    rows: list[Figures] = []
    device = device_here(config)
    runners = {}
    for name, (detector, metrics) in detectors.items():
        size = usual_size(sizes[name])
        if detector.family == ONNX and detector.model.graph.letterbox:  # filled up to a square
            size = Size(sizes[name].size, sizes[name].size)
        try:
            cost = cost_of(detector, size)
        except QskdError as error:
            log.warning("model card: %s was not measured: %s", name, error)
            rows.append(Figures(name, metrics, input=str(size)))
            continue
        runners[name] = torch_runner(detector, size, device)
        rows.append(Figures(name, metrics, cost.parameters, cost.gflops, input=str(size)))
    timed: dict[str, list[Timing]] = compare_speed(runners, (1,), ROUNDS, device, TIMING_LIMIT_S) if runners else {}
    done = [replace(row, ms=timed[row.name][0].ms) if row.name in timed else row for row in rows]
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    how = (
        f"Latency: PyTorch on {device}{threads}, float32, batch 1, models in turn; measured when training had just ended, "
        "and other work may have been on the machine." + f" {busy_note() if device.type == 'cpu' else ''}".rstrip()
    )
    return done, how if timed else ""


def card_of_run(
    config: Config, verb: str, train: Manifest, val: Manifest, student: Path, metrics: Mapping[str, float]
) -> Card:
    """student: its folder. metrics: of the last evaluation."""
    measured: dict[str, tuple[Detector, Mapping[str, float]]] = {}
    sizes: dict[str, ResizeConfig] = {}
    teacher = without_home(teachers_named(config))
    if verb == "distill" and config.distillation.method != "none" and not is_results(config.teacher.path):
        members = members_of(config, train.labels)
        for each in members:
            own = len(each.classes(train.labels))
            of = "" if len(members) == 1 else f" of {own} {'class' if own == 1 else 'classes'}"
            name = f"teacher{of}, `{without_home(each.path)}`"
            found = teacher_metrics(config, each if of else None)
            measured[name] = (load_detector(each.path, words=each.words), found)
            sizes[name] = teacher_preprocessing(config).resize
    detector = load_detector(student)
    measured["this model"], sizes["this model"] = (detector, metrics), config.student.resize
    rows, timing = figures(measured, sizes, config)
    if verb == "distill":
        where = config.card.baseline
        if not rows[:-1] and is_results(config.teacher.path):
            rows.insert(0, Figures(f"teacher, detections in `{teacher}`", {}))
        beside = Figures("the same student, no teacher", baseline_metrics(where) if where else {})
        rows.insert(-1, beside)
    card = config.card
    return Card(
        name=config.name,
        family=detector.family,
        classes=len(train.labels),
        rows=tuple(rows),
        kind=verb,
        recipe=recipe_of(config),
        data=card.data,
        data_licence=card.data_licence,
        train_images=train.num_images,
        unlabeled_images=sum(each.num_images for each in unlabeled_manifests(config.data)),
        val_images=val.num_images,
        teacher=teacher,
        teachers=len(paths_of(config)),
        teacher_licence=card.teacher_licence,
        licence=card.licence,
        timing=timing,
        methods=method_titles(config.distillation) if verb == "distill" else (),
    )


def complete(student: str | Path, teacher: Mapping[str, float], baseline: Mapping[str, float]) -> None:
    """Put AP that was measured after the run into the card of a distilled student's folder."""
    card = read_card(student)
    if card is not None:
        first, beside, own = card.rows
        rows = (replace(first, metrics=teacher), replace(beside, metrics=baseline), own)
        write_card(student, replace(card, rows=rows))
