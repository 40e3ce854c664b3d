"""Why the numbers are what they are: what each selection keeps, where its mask lies, whose gradient drives the student.

python -m benchmarks.evidence diagnose [--students many]     of the quickstart's student, or of others: two tables,
                                                             records/diagnosis*.json, two pictures (docs/ has copies)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.evidence.cells import RECORDS, code_version
from benchmarks.evidence.plan import BUDGETS, STUDENTS
from benchmarks.evidence.task import make_config
from benchmarks.evidence.variants import VARIANTS
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from qskd.boxes import cxcywh_to_xyxy
from qskd.config import Config
from qskd.config.recipe import replace_fields
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.order.schedule import evaluation_batches
from qskd.distillation.qskd.drawn import band_colours, draw_selection
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.qskd.seen import ask_teacher
from qskd.distillation.qskd.settings import Settings
from qskd.from_recipe import make_student, make_teacher, teacher_for_training
from qskd.losses.detection_loss import combine
from qskd.pictures.drawing import draw_mask, fitted
from qskd.pictures.plots import curve_plot, draw_boxes, picture_grid
from qskd.structures import Targets
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

STUDENT = "inherit"
SELECTIONS = ("positives", "hard_0.7", "qskd", "hard_0.3", "all", "random")
BATCHES, PROBE_EVERY = 16, 50
GROUPS = {
    "detection": ("class", "l1", "giou"),
    "dense head": ("dense",),
    "AGFD": ("agfd",),
    "LAPD classes": ("lapd_class",),
    "LAPD boxes": ("lapd_l1", "lapd_giou"),
}


def batches_of(config: ResolvedConfig, count: int) -> Iterable[TrainBatch]:
    """Validation images with their objects, as training batches."""
    from dataclasses import replace

    stream = make_plan(config, "train").stream
    loader = replace(stream, train_uri=stream.val_uri).loader()
    for batch, _ in zip(evaluation_batches(stream.schedule, 0), range(count), strict=False):
        yield train_batch(loader.load("train", batch.rows))


def inside_objects(targets: Targets, height: int, width: int) -> Tensor:
    """[B, H, W] bool: cells whose centre lies in some object's box."""
    boxes = cxcywh_to_xyxy(targets.boxes_cxcywh)[:, :, None, None]
    x = ((torch.arange(width) + 0.5) / width)[None, None, None]
    y = ((torch.arange(height) + 0.5) / height)[None, None, :, None]
    within = (x >= boxes[..., 0]) & (x <= boxes[..., 2]) & (y >= boxes[..., 1]) & (y <= boxes[..., 3])
    return (within & targets.valid[..., None, None]).any(1)


def settings_of(config: Config) -> Settings:
    settings = config.distillation
    assert isinstance(settings, Settings)
    return settings


def asking(teacher: OnlineTeacher, batch: TrainBatch, config: Config) -> tuple[Any, ...]:
    """The arguments of `ask_teacher` for a batch."""
    settings = settings_of(config)
    ask = partial(teacher, batch.teacher_images, batch.teacher_sizes)
    return ask, QSKD.needs_of(settings), batch.targets, settings, config.detection


def what_is_kept(teacher: OnlineTeacher, config: Config, batches: Iterable[TrainBatch]) -> dict[str, float]:
    """Over all batches: hard negatives an object, their mean GIoU, weight and confidence, and the positives' confidence. Of the
    (finest) mask's mass the share that lies in objects' boxes, as trained and without its `background`; without it, the share
    of those boxes' cells where it reaches a tenth of its largest."""
    plain = replace_fields(config, {"distillation.features.background": 0.0}, "diagnose")
    objects = hard = 0
    overlap, sure, positive_sure, weights, shares, mass, covered = ([] for _ in range(7))
    for batch in batches:
        record, selection, masks = ask_teacher(*asking(teacher, batch, config))
        attention = ask_teacher(*asking(teacher, batch, plain))[2][0]
        kept = (selection.weight > 0) & ~selection.is_positive
        confidence = record.logits[-1].amax(-1).sigmoid()
        objects, hard = objects + sum(batch.targets.counts), hard + int(kept.sum())
        overlap.append(selection.giou[kept])
        weights.append(selection.weight[kept])
        sure.append(confidence[kept])
        positive_sure.append(confidence[selection.is_positive])
        inside = inside_objects(batch.targets, *attention.shape[1:])
        for trained, one, cells in zip(masks[0], attention, inside, strict=True):
            if one.max() > 0:
                shares.append(float(trained[cells].sum() / trained.sum()))
                mass.append(float(one[cells].sum() / one.sum()))
                covered.append(float((one[cells] >= 0.1 * one.max()).float().mean()))
    return {
        "hard_negatives_per_object": hard / objects,
        "their_giou": float(torch.cat(overlap).mean()),
        "their_weight": float(torch.cat(weights).mean()),
        "their_confidence": float(torch.cat(sure).mean()),
        "positives_confidence": float(torch.cat(positive_sure).mean()),
        "mask_mass_in_objects": float(np.mean(shares)),
        "without_background": float(np.mean(mass)),
        "object_cells_covered": float(np.mean(covered)),
    }


def gradient_shares(training: Training, batch: TrainBatch) -> dict[str, float]:
    """Each group of terms' gradient norm over the sum of all groups' norms, on the student's parameters; no step is taken."""
    student = [parameter for parameter in training.student.parameters() if parameter.requires_grad]
    record = training._ask_teacher(batch)
    terms = training.module(batch.images, batch.sizes, batch.targets, record)
    counts = {name: term.count for name, term in terms.items()}
    norms = {}
    for group, prefixes in GROUPS.items():
        mine = {n: t for n, t in terms.items() if n.startswith(prefixes)}
        if mine:
            total = combine(mine, training.module.weights_at(training.step, training.total_steps), counts)
            found = torch.autograd.grad(total, student, retain_graph=True, allow_unused=True)
            norms[group] = float(torch.stack([g.norm() for g in found if g is not None]).norm())
    return {group: norm / sum(norms.values()) for group, norm in norms.items()}


def watch(config: ResolvedConfig) -> dict[str, list[Any]]:
    """One training at the short budget, probed every so many steps: {"step": [...], group: [...]}."""
    plan = make_plan(config, "distill")
    labels = plan.train.labels
    teacher = teacher_for_training(config, labels, torch.device("cpu"))
    training = Training(
        config, make_student(config, labels), teacher, plan.stream.schedule.total_steps, torch.device("cpu")
    )
    seen: dict[str, list[Any]] = {"step": []}
    for share in local_stream(plan.stream):
        if share.subset != "train":
            continue
        batch = train_batch(share.arrays)
        if training.step % PROBE_EVERY == 0:
            seen["step"].append(training.step)
            for group, value in gradient_shares(training, batch).items():
                seen.setdefault(group, []).append(round(value, 4))
        training.train_step(batch)
    return seen


def picture(teacher: OnlineTeacher, configs: Mapping[str, Config], batch: TrainBatch, count: int = 4) -> np.ndarray:
    """Rows of images: objects, kept queries of each selection, and their masks."""
    titles = ["objects"]
    shown = [fitted(batch.images[image].numpy(), 384) for image in range(count)]
    sides = [batch.images.shape[1] * factor for _, factor in shown]

    def pixels_of(boxes_cxcywh: Tensor, image: int) -> np.ndarray:
        return cxcywh_to_xyxy(boxes_cxcywh).numpy() * sides[image]

    real = batch.targets.valid
    objects = [pixels_of(batch.targets.boxes_cxcywh[image][real[image]], image) for image in range(count)]
    rows = [
        [draw_boxes(pixels, objects[image], batch.targets.labels[image][real[image]].tolist(), None, [""] * 99)]
        for image, (pixels, _) in enumerate(shown)
    ]
    for name, config in configs.items():
        titles += [f"kept: {VARIANTS[name].title}", f"mask: {VARIANTS[name].title}"]
        record, selection, masks = ask_teacher(*asking(teacher, batch, config))
        colours = band_colours(settings_of(config).selection)
        for image, (pixels, _) in enumerate(shown):
            queries = pixels_of(record.boxes_cxcywh[-1, image], image)
            positive, band, weight = (
                part[image].numpy() for part in (selection.is_positive, selection.band, selection.weight)
            )
            rows[image] += [
                draw_selection(pixels, objects[image], queries, positive, band, weight, colours),
                draw_mask(pixels, masks[0][image].numpy(), objects[image]),
            ]
    return picture_grid(rows, titles)


def diagnose(work: Path, student: str = STUDENT) -> None:
    """Everything; see the module's head."""
    torch.set_num_threads(1)
    ending = "" if student == STUDENT else f"-{student}"

    def config_of(variant: str) -> ResolvedConfig:
        steps = f"training.max_steps={BUDGETS['short']}"
        fields = (*VARIANTS[variant].overrides, steps, "training.epochs=1000000")
        return make_config(work, "val", STUDENTS[student], fields)

    configs = {name: config_of(name) for name in SELECTIONS}
    teacher = make_teacher(configs["qskd"], make_plan(configs["qskd"], "train").train.labels)
    assert teacher is not None
    batches = list(batches_of(configs["qskd"], BATCHES))
    kept = {name: what_is_kept(teacher, config, batches) for name, config in configs.items()}
    columns = list(kept["qskd"])
    print("| selection | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name, values in kept.items():
        cells = ["" if np.isnan(values[column]) else f"{values[column]:.2f}" for column in columns]
        print(f"| {VARIANTS[name].title} | " + " | ".join(cells) + " |")
    shown = {name: configs[name] for name in ("positives", "qskd", "all")}
    Image.fromarray(picture(teacher, shown, batches[0])).save(RECORDS / f"mask{ending}.png")
    seen = watch(configs["qskd"])
    steps = seen.pop("step")
    curve_plot(
        {group: (steps, values) for group, values in seen.items()},
        "training step",
        "share of the gradient norms",
        RECORDS / f"gradients{ending}.png",
    )
    for group, shares in seen.items():
        print(
            f"{group}: gradient share {shares[0]:.2f} at first, {np.mean(shares):.2f} on average, {shares[-1]:.2f} at last"
        )
    said = {"kept": kept, "gradient_shares": {"step": steps, **seen}, "code": code_version()}
    (RECORDS / f"diagnosis{ending}.json").write_text(json.dumps(said, indent=1) + "\n")
    for name in ("mask", "gradients"):
        shutil.copyfile(RECORDS / f"{name}{ending}.png", RECORDS.parents[2] / f"docs/evidence-{name}{ending}.png")
