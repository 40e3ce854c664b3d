"""The task of the evidence: the quickstart's images and recipe, made once into a work folder and shared by all cells.

What a student needs besides (its teacher, the teacher's cache, its backbone) is made when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.evidence.backbone import make_backbone
from benchmarks.evidence.plan import STUDENTS, Student
from benchmarks.evidence.teachers import OWN, make_teacher_folder, teacher_path
from benchmarks.evidence.variants import CACHES, SELECTED, VARIANTS, Variant
from benchmarks.local_cache import make_cache
from pipelines.demo.quickstart import BACKBONE, RECIPE, TEST, TRAIN, VAL
from pipelines.inspection.predict import predict_all, request
from pipelines.prepare import prepare
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.selecting.job import By, Request
from pipelines.selecting.job import run as select
from qskd.checks import lacks_directions
from qskd.config.recipe import load
from qskd.datasets.shapes import make_shapes
from qskd.datasets.unlabeled.joined import source_manifest
from qskd.deploy.export import export_onnx
from qskd.detectors import load_detector
from qskd.from_recipe import find_directions, make_teacher
from qskd.teacher.identity import cache_identity, cache_sources, teacher_preprocessing
from qskd.teacher.manifest import load_cache_manifest
from qskd.teacher.memory.directions import save_directions

SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}


def unlabeled_path(work: Path, images: int) -> Path:
    """Shards of so many images without labels: those that come after the labelled ones."""
    return work / f"unlabeled{images}"


def train_path(work: Path, images: int) -> Path:
    """Shards of so many labelled images, of which the task's own are the first."""
    return work / f"train{images}"


def selection_path(work: Path, student: str, by: By, seed: int) -> Path:
    """Which of the labelled images a cell is trained on."""
    return work / "selected" / f"{student}-{by}{SELECTED}-seed{seed}.json"


def choose_images(config: ResolvedConfig, by: By) -> None:
    """Write the selection that a cell's configuration names, as `qskd select` does; kept when it is there already."""
    out = Path(config.data.selection[0])
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        select(Request(config.data.train, out, SELECTED, by, config.seed, config), quiet=True)


def base_overrides(work: Path, split: str, student: Student) -> list[str]:
    """Where things are. Attention is cached of all queries, so that every variant can read one cache."""
    teacher = student.teacher
    cache_name = "train.teacher" if teacher == OWN else f"train.{teacher}"
    backbone = work / student.backbone if student.backbone else BACKBONE
    return [
        f"data.train={work}/train",
        f"data.val={work}/{split}",
        f"student.backbone.init={backbone}",
        f"teacher.path={teacher_path(work, teacher)}",
        f"teacher.cache.path={work}/{cache_name}",
        "teacher.cache.attention_giou_floor=-1.0",
        "teacher.cache.all_layers=true",
        f"tracking.uri=sqlite:///{work}/mlflow.db",
        "tracking.experiment=evidence",
    ]


def told_path(work: Path, student: Student, form: str) -> Path:
    """Where what a teacher says is: its export as ONNX, or COCO results of the training images."""
    folder = work / f"told.{student.teacher}"
    return folder / ("model.onnx" if form == "onnx" else "detections.json")


def cache_overrides(work: Path, student: Student, variant: Variant) -> list[str]:
    """A cache of its own, where a variant asks for what the shared one is not: another of `CACHES`, or a teacher that is told,
    which has no attention and one layer."""
    shared = next(each for each in base_overrides(work, "val", student) if each.startswith("teacher.cache.path="))
    if variant.told:
        return [
            *(f"{shared}.{variant.told}", f"teacher.path={told_path(work, student, variant.told)}"),
            *("teacher.cache.attention_giou_floor=0.3", "teacher.cache.all_layers=false"),
        ]
    return [f"{shared}.{variant.cache}", *CACHES[variant.cache]] if variant.cache else []


def make_config(
    work: Path, split: str, student: Student, overrides: Iterable[str] = (), kind: str = "distill"
) -> ResolvedConfig:
    """A cell's whole configuration: the quickstart's recipe, this folder, the student's fields, the cell's own."""
    return resolve(load(RECIPE, [*base_overrides(work, split, student), *student.overrides, *overrides]), kind)


def make_task(work: Path, wanted: Mapping[str, Iterable[str]]) -> None:
    """Images, shards, and the students' teachers, caches and backbones, each with what its own variants need beside; what is there
    is kept. wanted: variants by student."""
    variants = {student: [VARIANTS[name] for name in sorted(set(names))] for student, names in sorted(wanted.items())}
    for name, shapes in SPLITS.items():
        if not (work / name / "manifest.json").exists():
            annotations, images = make_shapes(shapes, work / f"{name}-coco")
            prepare(annotations, images, str(work / name), quiet=True)
    for count in sorted({each.train for further in variants.values() for each in further} - {0}):
        shards, shapes = train_path(work, count), TRAIN.model_copy(update={"images": count})
        if not (shards / "manifest.json").exists():
            annotations, images = make_shapes(shapes, work / f"{shards.name}-coco")
            prepare(annotations, images, str(shards), quiet=True)
    for name, further in variants.items():
        _make_for(work, STUDENTS[name], further)


def _make_for(work: Path, student: Student, further: Sequence[Variant]) -> None:
    if student.backbone:
        make_backbone(work, work / student.backbone, student.overrides)
    if student.teacher != OWN:
        make_teacher_folder(work, student.teacher)
    unlabeled = [_unlabeled(work, count) for count in sorted({each.unlabeled for each in further} - {0})]
    unlabelled = [f"data.unlabeled=[{','.join(map(str, unlabeled))}]"]
    asked = cache_sources(make_config(work, "val", student, unlabelled))
    for form in sorted({each.told for each in further} - {""}):
        _tell(work, student, form)
    own = {tuple(cache_overrides(work, student, each)) for each in further} - {()}
    asked = [*asked, *(make_config(work, "val", student, fields) for fields in sorted(own))]
    for config in asked:
        if load_cache_manifest(config.teacher.cache.path) is None:
            torch.set_num_threads(1)
            manifest = source_manifest(config.data)
            teacher = make_teacher(config, manifest.labels)
            assert teacher is not None
            make_cache(config, teacher, teacher_preprocessing(config).resize, cache_identity(config, manifest))
    for each in further:
        _add_directions(
            make_config(work, "val", student, [*each.overrides, *cache_overrides(work, student, each)], each.kind)
        )


def _add_directions(config: ResolvedConfig) -> None:
    """Beside the cache of a variant whose method asks for them."""
    path = config.teacher.cache.path
    manifest = load_cache_manifest(path) if path else None
    if manifest is not None and lacks_directions(config, manifest):
        save_directions(path, find_directions(config, manifest), manifest)


def _tell(work: Path, student: Student, form: str) -> None:
    """Write what the teacher says, if it is not there."""
    teacher, told = teacher_path(work, student.teacher), told_path(work, student, form)
    if told.exists():
        return
    if form == "onnx":
        told.parent.mkdir(exist_ok=True)
        for name in ("config.json", "preprocessor_config.json"):
            (told.parent / name).write_bytes((teacher / name).read_bytes())
        export_onnx(load_detector(teacher), told, make_config(work, "val", student).student.resize.size, batch=None)
        return
    annotations, images = work / "train-coco/annotations.json", work / "train-coco/images"
    asked = request(str(teacher), [images], told.parent, 0.05, annotations=annotations, pictures=False)
    for _ in predict_all(asked):
        pass


def _unlabeled(work: Path, count: int) -> Path:
    """The shards, made if they are not there."""
    shards = unlabeled_path(work, count)
    if not (shards / "manifest.json").exists():
        new = TRAIN.model_copy(update={"images": count, "first_image": TRAIN.first_image + TRAIN.images})
        _, images = make_shapes(new, work / f"{shards.name}-coco")
        prepare(images, None, str(shards), quiet=True, unlabeled=True)
    return shards
