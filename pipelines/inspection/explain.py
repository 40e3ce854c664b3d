"""Pictures of what a distillation does with an image (`qskd explain`). Needs no Ray.

python -m pipelines.explain runs/quickstart/qskd photo.jpg --before runs/quickstart/baseline/student
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from pyarrow import fs

from pipelines.cluster.devices import device_here
from pipelines.inspection.predict import check_all_differ, write_picture
from pipelines.inspection.subjects import Dataset, classes, find_subject
from pipelines.run.folder import Folder
from qskd.config import Config
from qskd.config.recipe import apply_overrides, build, load
from qskd.datasets.classes import Side, map_classes
from qskd.datasets.coco import CocoDataset, read_coco
from qskd.detectors import Detector, Preprocessing, load_detector, read_preprocessing
from qskd.detectors.student import family_of
from qskd.distillation.find import refuse_strange_methods
from qskd.errors import QskdError
from qskd.from_recipe import make_student, teacher_to_ask
from qskd.pictures.explain import DatasetDetector, Explanation, explain
from qskd.pictures.explained import explanation_picture, warning_of
from qskd.storage.ownership import EXPLAINED, check_picture
from qskd.storage.places import fetched, open_folder
from qskd.storage.stores import join, patiently
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.several.members import paths_of
from qskd.teacher.told.results import is_results

log = logging.getLogger("qskd")
AFTER = "Student"
BEFORE = "Student before training"


@dataclass(frozen=True)
class Source:
    """config: of a recipe or a run. student: the trained student's folder, empty while there is none."""

    config: Config
    student: str


def read_source(recipe_or_run: str, overrides: Sequence[str] = ()) -> Source:
    """A run's folder (OUTPUT/NAME, a path or a URI; it may have been moved), or a recipe and the run that it describes."""
    filesystem, root = open_folder(recipe_or_run)
    # An object store's "folder" need not be a thing of its own: there, what is not a file is taken for one.
    kind = patiently(recipe_or_run, filesystem, lambda: filesystem.get_file_info(root).type)
    if kind == fs.FileType.File or ("://" not in recipe_or_run and kind != fs.FileType.Directory):
        config = load(recipe_or_run, overrides)
        folder = Folder(config)
        return Source(config, folder.where("student") if folder.exists("student/config.json") else "")
    run = Folder.at(recipe_or_run)
    if not run.exists("config.yaml"):
        found = "no config.yaml in it"
        raise QskdError(recipe_or_run, found, "a run's folder, as in runs/NAME, or a YAML recipe")
    tree = run.read_record("config.yaml")
    refuse_strange_methods(tree, overrides, join(recipe_or_run, "config.yaml"))
    config = build(apply_overrides(tree, overrides), join(recipe_or_run, "config.yaml"))
    there = filesystem.get_file_info(f"{root}/student/config.json").type != fs.FileType.NotFound
    return Source(config, join(recipe_or_run, "student") if there else "")


def as_dataset_detector(
    detector: Detector, preprocessing: Preprocessing, labels: Sequence[str], device: torch.device, where: str
) -> DatasetDetector:
    """A student as it is looked at; QskdError when it does not know all classes."""
    try:
        slots = map_classes(labels, detector.labels, {}, Side("student", where))
    except QskdError as error:
        raise QskdError(where, error.found, error.expected, "compare students of the same data") from None
    return DatasetDetector(detector.to(device).eval(), preprocessing, slots)


def initial_student(
    config: Config, labels: Sequence[str], device: torch.device, teacher: OnlineTeacher | None = None
) -> dict[str, DatasetDetector]:
    """The student as it stood before its first step, by its title: the recipe and its seed make it again. None, with a
    warning, where they can't: the weights that it began from may be elsewhere."""
    try:
        student = make_student(config, labels, teacher.detector if teacher else None)
    except QskdError as error:
        log.warning("the student before training is left out: %s", error)
        return {}
    return {
        BEFORE: as_dataset_detector(student, student.preprocessing(config.student.resize), labels, device, "student")
    }


def title_of(before: str) -> str:
    """Of another student's panel: runs/baseline/student is told by its run's name."""
    path = PurePosixPath(before.rstrip("/"))
    return f"Before: {path.parent.name if path.name == 'student' and path.parent.name else path.name}"


def how_it_began(config: Config) -> str:
    """Where a student's first weights come from."""
    parts = [f"from {Path(config.student.init).name}"] if config.student.init else []
    parts += ["from its teacher's layers"] if config.student.inherit else []
    return " and ".join(parts) or "from new layers" + (
        " on a pretrained backbone" if config.student.backbone.init else ""
    )


def about(config: Config, teacher: OnlineTeacher | None, before: str = "") -> str:
    """One line on whose picture it is."""
    parts = [f"recipe {config.name}"]
    if teacher is not None:
        names = " and ".join("/".join(PurePosixPath(path).parts[-2:]) for path in paths_of(config).values())
        which = f"teachers {names}: " if config.teacher.also else f"teacher {names}: {teacher.detector.family}, "
        parts.append(f"{which}{teacher.facts.queries} queries")
    parts.append(f"student: {family_of(config.student)}, {how_it_began(config)}")
    return "  ·  ".join([*parts, *([f"before: {before}"] if before else [])])


def summary(shown: Explanation) -> str:
    """What the picture says, as a line for the terminal."""
    kind = "pseudo-" if shown.unlabeled else "stand-in " if shown.stand_ins else ""
    parts = [f"{len(shown.objects.scores)} {kind}object(s)"]
    parts += [said for seen in shown.seen for said in seen.summary()]
    parts += [f"{title.lower()}: {len(found.scores)} box(es)" for title, found in shown.students.items()]
    return ", ".join(parts)


def targets(images: Sequence[str], out: Path | None, inputs: Sequence[str | Path] = ()) -> list[tuple[str, Path]]:
    """The picture to write for each image: beside a file, in the working folder for an image of the data, or `out`. QskdError
    where that would replace an image, another of `inputs`, or a file that qskd did not draw."""
    if out is not None and len(images) > 1:
        raise QskdError("--out", f"{len(images)} images for one output file", "one image", "leave --out away")
    known = Image.registered_extensions()
    if out is not None and known.get(out.suffix.lower()) not in Image.SAVE:
        found = "a picture of this name can't be written: nobody knows of what kind"
        raise QskdError(str(out), found, "a name that ends as pictures do: .png, .jpg", f"--out {out}.png")

    def beside(image: str) -> Path:
        path = Path(image)
        return (path if path.is_file() else Path(path.name)).with_name(f"{path.stem}{EXPLAINED}.png")

    pairs = [(image, out or beside(image)) for image in images]
    check_all_differ(pairs)
    for _, target in pairs:
        check_picture(target, [*images, *inputs])
    return pairs


def write_explanations(
    source: Source,
    images: Sequence[str],
    annotations: Path | None = None,
    before: str = "",
    out: Path | None = None,
    threshold: float = 0.3,
    view: int | None = None,
) -> list[tuple[Path, Explanation]]:
    """Write a picture for each image; its path and what it shows, for each. See `qskd explain --help`."""
    inputs: list[str | Path] = [*images, *([annotations] if annotations else [])]
    config, device, pairs = source.config, device_here(source.config), targets(images, out, inputs)
    described = read_coco(annotations, Path(images[0]).absolute().parent) if annotations else None
    dataset = Dataset(config)
    with ExitStack() as scratch:
        folders: Mapping[str, str] = {
            title: scratch.enter_context(fetched(folder))
            for title, folder in ((title_of(before), before), (AFTER, source.student))
            if folder
        }
        students = {title: load_detector(folder) for title, folder in folders.items()}
        looks = {title: read_preprocessing(folder) for title, folder in folders.items()}
    labels = _labels(config, dataset, described, students)
    # Who is in the picture is found before the teacher is loaded: it may be large.
    subjects = [find_subject(image, config, dataset, described, view) for image, _ in pairs]
    teacher = teacher_to_ask(config, labels)
    if teacher is None:
        log.warning("%s has no teacher that can be asked: its pictures are of objects and students only", config.name)
    else:
        teacher.to(device)
    detectors = {} if before else initial_student(config, labels, device, teacher)
    detectors |= {
        title: as_dataset_detector(d, looks[title], labels, device, folders[title]) for title, d in students.items()
    }
    if AFTER not in detectors:
        log.warning("%s has no trained student yet", config.name)
    written = []
    for subject, (_, target) in zip(subjects, pairs, strict=True):
        shown = explain(subject, config, labels, teacher, detectors, threshold)
        if warning_of(shown):
            log.warning("%s: %s", subject.name, warning_of(shown))
        write_picture(explanation_picture(shown, about(config, teacher, before)), target, inputs)
        written.append((target, shown))
    return written


def _labels(
    config: Config, dataset: Dataset, described: CocoDataset | None, students: Mapping[str, Detector]
) -> tuple[str, ...]:
    others = [detector.labels for detector in reversed(list(students.values()))]
    found = classes(dataset, described, others)
    if not found and config.teacher.path and not is_results(config.teacher.path):
        known = [label for path in paths_of(config).values() for label in load_detector(path).labels]
        found = tuple(label for label in dict.fromkeys(known) if label != "N/A")
    if not found:
        raise QskdError(
            "data.val", "empty, and no student or teacher names classes", "shards, annotations or a teacher"
        )
    return found
