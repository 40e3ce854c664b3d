"""One cell of the table: one training of one variant with one seed, in this process, and its record.

The record is what is committed: everything the cell's result depends on is in it, and a cell whose record is there and
says the same is not run again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.plan import BUDGETS, STUDENTS
from benchmarks.evidence.post_training import quantise_after_training
from benchmarks.evidence.task import (
    SPLITS,
    cache_overrides,
    choose_images,
    make_config,
    selection_path,
    train_path,
    unlabeled_path,
)
from benchmarks.evidence.teachers import OWN
from benchmarks.evidence.variants import SELECTED, VARIANTS
from pipelines.feed.packing import Arrays
from pipelines.feed.stream import local_stream
from pipelines.run.guards import BEGUN_BEFORE
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from qskd.config import FACTS, Config
from qskd.config.recipe import flatten, to_tree
from qskd.datasets.batch import train_batch
from qskd.datasets.order.schedule import evaluation_batches
from qskd.detectors import Detector, Preprocessing, load_detector
from qskd.detectors.checkpoint import save_detector
from qskd.evaluation.agreement import agreement
from qskd.evaluation.average_precision import evaluate_coco
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_batch
from qskd.families.table import find_family
from qskd.from_recipe import ground_truth, make_student, make_teacher, teacher_for_training
from qskd.storage.ownership import EXTRA_FILE
from qskd.training.step import Training

RECORDS = Path(__file__).parent / "records"
AGREEMENT_BATCHES = 8
_OF_FAMILIES = {
    "detection.denoising_queries": "denoises",
    "detection.fgl_weight": "side_distributions",
    "detection.ddf_weight": "side_distributions",
}
_DECIDES = ("data", "student", "teacher", "distillation", "detection", "augmentation", "training", "seed")


@dataclass(frozen=True)
class Cell:
    """student, variant, budget: names in `plan`. split: "test" to report, "val" to choose settings by.

    extra: fields set on top, of a search; they are part of the cell's name.
    """

    student: str
    variant: str
    budget: str
    seed: int
    split: str = "test"
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.student, self.variant, self.budget, f"seed{self.seed}"]
        if self.extra:
            parts.append(hashlib.sha256(" ".join(self.extra).encode()).hexdigest()[:8])
        return "-".join(parts)

    @property
    def record(self) -> Path:
        return RECORDS / ("search" if self.split == "val" else "report") / f"{self.name}.json"

    @property
    def steps(self) -> int:
        """Training steps: the budget's, or what takes as long as another variant's."""
        steps, clock = BUDGETS[self.budget], VARIANTS[self.variant].time_of
        if not clock:
            return steps
        ratios = json.loads((RECORDS / "clock.json").read_text())["ratios"]
        return round(steps * float(ratios[self.student][clock]))

    def config(self, work: Path) -> ResolvedConfig:
        """The whole recipe of this cell."""
        variant = VARIANTS[self.variant]
        chosen, rounds = [], max(2, self.steps // 750)
        if variant.selected is not None:  # whose epochs are shorter
            chosen = [f"data.selection=[{selection_path(work, self.student, variant.selected, self.seed)}]"]
            rounds *= SPLITS["train"].images // SELECTED
        overrides = (
            *variant.overrides,
            f"name={self.name}",
            f"seed={self.seed}",
            f"training.max_steps={self.steps}",
            "training.epochs=1000000",
            f"training.evaluate_every_epochs={rounds}",
            *chosen,
            *([f"data.unlabeled=[{unlabeled_path(work, variant.unlabeled)}]"] if variant.unlabeled else []),
            *([f"data.train={train_path(work, variant.train)}"] if variant.train else []),
            *cache_overrides(work, STUDENTS[self.student], variant),
            *self.extra,  # last: a search may set the number of steps, too
        )
        return make_config(work, self.split, STUDENTS[self.student], overrides, variant.kind)


def meaning(config: Config) -> dict[str, Any]:
    """What of a configuration decides the numbers: no paths, no machine."""
    tree = to_tree(config)
    kept = {name: tree[name] for name in _DECIDES}
    kept["data"] = {name: value for name, value in tree["data"].items() if name not in ("train", "val")}
    kept["data"]["unlabeled"] = [Path(folder).name for folder in tree["data"]["unlabeled"]]
    kept["data"]["selection"] = [Path(file).name.partition("-seed")[0] for file in tree["data"]["selection"]]
    if (more := Path(tree["data"]["train"]).name) not in ("", "train"):
        kept["data"]["train"] = more
    kept["student"]["backbone"]["init"] = Path(tree["student"]["backbone"]["init"]).name
    cache = {
        "precision": tree["teacher"]["cache"]["precision"],
        "path": "cached" if tree["teacher"]["cache"]["path"] else "",
    }
    if kept["distillation"]["method"] == "none":
        kept["distillation"] = {"method": "none"}
    kept["teacher"] = {"cache": cache, "resize": tree["teacher"]["resize"]}
    if (share := tree["teacher"]["cache"]["memory_share"]) != 1:
        cache["memory_share"] = share
    if tree["teacher"]["levels"] is not None:
        kept["teacher"]["levels"] = tree["teacher"]["levels"]
    if (teacher := Path(tree["teacher"]["path"]).name) not in ("", OWN):
        kept["teacher"]["path"] = teacher
    return json.loads(json.dumps(kept))


def finished(cell: Cell, work: Path) -> dict[str, Any] | None:
    """The cell's record, unless there is none or it is of another configuration than the cell has today."""
    if not cell.record.exists():
        return None
    record: dict[str, Any] = json.loads(cell.record.read_text())
    return record if same(record["config"], cell.config(work)) else None


def same(recorded: dict[str, Any], config: Config) -> bool:
    """Whether a record's configuration means what `config` means. A field that came after the record says what was done then:
    its default, or what `BEGUN_BEFORE` knows."""
    family, known = find_family(config.student.family, "student.family"), flatten(recorded)
    then, now = (flatten(meaning(each)) for each in (Config.model_validate(recorded), config))
    for name, old in BEGUN_BEFORE.items():
        if name not in known and name in now:  # the field of a section that is not there is none
            then[name] = old
        if name in _OF_FAMILIES and not getattr(family, _OF_FAMILIES[name]):
            then[name] = now[name] = None  # without effect on this student
    facts = FACTS[config.student.family]
    own: dict[str, Any] = {
        "detection.query_groups": facts.query_groups,
        "training.backbone_layer_decay": facts.layer_decay if facts.vit else 1.0,
    }
    if bits := config.student.quantization_taken:
        own["student.quantization.rest_from"] = bits.rest_from
    for name, value in own.items():
        for tree in (then, now):
            tree[name] = value if tree[name] is None else tree[name]
    return then == now


def code_version() -> str:
    """The commit, with a mark when files were changed since."""
    here = Path(__file__).parent
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def _evaluate(
    detector: Detector, batches: Iterable[Arrays], config: Config, truth: Any, ids: list[int]
) -> dict[str, float]:
    seen_as = Preprocessing(config.student.resize)
    found = [predict_batch(detector, arrays, seen_as, ids) for arrays in batches]
    return {k: round(v, 5) for k, v in evaluate_coco(truth, Detections.concatenate(found)).metrics.items()}


def run(cell: Cell, work: Path) -> dict[str, Any]:
    """Train, evaluate after each epoch and at the end, compare with the teacher; write and return the record."""
    torch.set_num_threads(1)
    record = _quantised_after(cell, work) if VARIANTS[cell.variant].after else _train(cell, work)
    cell.record.parent.mkdir(parents=True, exist_ok=True)
    cell.record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def _quantised_after(cell: Cell, work: Path) -> dict[str, Any]:
    """The record of a student that was trained in float and quantised then. The float one is kept, for the other bits."""
    trained = replace(cell, variant=VARIANTS[cell.variant].after)
    said = hashlib.sha256(json.dumps(meaning(trained.config(work)), sort_keys=True).encode()).hexdigest()[:8]
    folder = work / "students" / f"{trained.name}-{said}"
    if not folder.exists():
        _train(trained, work, keep=folder)
    record: dict[str, Any] = json.loads((folder / EXTRA_FILE).read_text())
    config = cell.config(work)
    plan = make_plan(config, VARIANTS[cell.variant].kind)
    student, stream = load_detector(folder), plan.stream
    training = (share.arrays for share in local_stream(stream) if share.subset == "train")
    quantise_after_training(student, config, training)
    loader, held_out = stream.loader(), evaluation_batches(stream.schedule, 0)
    ids = [category.id for category in plan.train.categories]
    evaluated = (loader.load("val", batch.rows) for batch in held_out)
    metrics = _evaluate(student, evaluated, config, ground_truth(config.data.val), ids)
    changed = {
        "cell": cell.name,
        "title": VARIANTS[cell.variant].title,
        "code": code_version(),
        "config": meaning(config),
    }
    return record | changed | {"metrics": metrics, "float_metrics": record["metrics"]}


def _train(cell: Cell, work: Path, keep: Path | None = None) -> dict[str, Any]:
    """The record of a training. keep: a folder for its student, with the record."""
    config, kind = cell.config(work), VARIANTS[cell.variant].kind
    if (by := VARIANTS[cell.variant].selected) is not None:
        choose_images(config, by)
    plan = make_plan(config, kind)
    labels, ids = plan.train.labels, [category.id for category in plan.train.categories]
    truth = ground_truth(config.data.val)
    teacher = teacher_for_training(config, labels, torch.device("cpu"))
    student = make_student(config, labels)
    training = Training(config, student, teacher, plan.stream.schedule.total_steps, torch.device("cpu"))
    judge = make_teacher(make_config(work, cell.split, STUDENTS[cell.student]), labels)
    assert judge is not None
    curve: list[dict[str, float]] = []
    losses: dict[str, float] = {}
    spent_s = 0.0
    for (is_training, _), shares in groupby(local_stream(plan.stream), key=lambda s: (s.subset == "train", s.epoch)):
        started = time.perf_counter()
        if is_training:
            rows = [training.train_step(train_batch(share.arrays)) for share in shares]
            losses = {name: round(float(sum(row[name] for row in rows)) / len(rows), 5) for name in rows[0]}
            spent_s += time.perf_counter() - started
            continue
        with training.evaluation_weights() as detector:
            metrics = _evaluate(detector, (share.arrays for share in shares), config, truth, ids)
            alike = agreement(detector, judge, _first_batches(config, plan.stream), config.detection)
        curve.append({"step": training.step, "AP": metrics["AP"], "AP50": metrics["AP50"]} | _rounded(alike))
    training.check_finite()
    record = {
        "cell": cell.name,
        "title": VARIANTS[cell.variant].title,
        "metrics": metrics,
        "curve": curve,
        "losses_of_last_epoch": losses,
        "train_seconds": round(spent_s, 1),
        "steps": training.step,
        "code": code_version(),
        "split": cell.split,
        "extra": list(cell.extra),
        "config": meaning(config),
    }
    if keep is not None:
        with training.evaluation_weights() as detector:
            save_detector(detector, keep, config.student.resize, record)
    return record


def _rounded(values: Any) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def _first_batches(config: Config, stream: Any) -> Iterable[Any]:
    """The first evaluation images, as training batches: their objects are needed."""
    loader = replace(
        stream, train_uri=stream.val_uri, teacher_cache="", teacher_columns=(), unlabeled_uris=(), unlabeled_caches=()
    ).loader()
    for batch in islice(evaluation_batches(stream.schedule, 0), AGREEMENT_BATCHES):
        yield train_batch(loader.load("train", batch.rows))
