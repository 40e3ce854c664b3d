"""Label pictures by a detector's detections (`qskd label`), as a Ray Data job: COCO JSON out, which `qskd prepare` reads.

python -m pipelines.label teacher photos/ photos.json --like shards/val
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.cluster.room import check_gpus, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from pipelines.inspection.evaluate import evaluate
from pipelines.labelling.actors import DETECTIONS, PART, Job, LabelActor, Picture
from pipelines.labelling.onto import BEST, JOINED, LabelledPictures, join_classes, own_classes
from pipelines.labelling.parts import (
    check_out,
    delete_parts,
    finished,
    part_file,
    parts_folder,
    read_measured,
    read_part,
    write_labels,
    write_measured,
)
from pipelines.labelling.request import Labels as Labels
from pipelines.labelling.request import Request as Request
from pipelines.labelling.request import as_recipe as as_recipe
from pipelines.reporting.board import Row, progress
from pipelines.reporting.watch import CountWatch
from pipelines.run.places import for_workers
from qskd.datasets.classes import NOBODY, listing, map_classes, model_side
from qskd.datasets.manifest import check_labelled, load_manifest
from qskd.datasets.samples import Category
from qskd.datasets.unlabeled.pictures import UnlabeledDataset
from qskd.detectors import (
    asked_in_words,
    check_classes,
    checkpoint_digests,
    load_detector,
    prompt_of,
    read_preprocessing,
    words_for,
)
from qskd.errors import QskdError
from qskd.printable import one_line
from qskd.storage.places import fetched

log = logging.getLogger("qskd")
USUAL = 0.5  # the threshold of a class of which nothing better is known
FEWEST = 20  # objects of a class in --like, for a threshold of its own
RULE = (
    "with --threshold that score for every class; else, with --like, the score at which a class's F1 (IoU 0.5) is the best on "
    f"those images, for classes with {FEWEST} objects there or more; else {USUAL:g}"
)


@dataclass(frozen=True)
class Plan:
    """What will be done. categories: of the labels; known: those of them that the teacher knows, in `job`'s order. measured: what
    thresholds were measured, and of what; empty: none were."""

    request: Request
    dataset: UnlabeledDataset | LabelledPictures
    categories: tuple[Category, ...]
    known: tuple[Category, ...]
    job: Job
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        found: list[Picture] = [
            {"id": image.id, "file_name": image.file_name, "digest": self.dataset.digests[image.id]}
            for image in self.dataset.listed()
        ]
        if isinstance(self.dataset, LabelledPictures):
            for each in found:
                each["boxes_xyxy"] = self.dataset.boxes_xyxy[each["id"]].tolist()
        return found

    @property
    def thresholds(self) -> dict[str, float]:
        return {one.name: value for one, value in zip(self.known, self.job.thresholds, strict=True)}

    def describe(self) -> str:
        said = f"{self.request.model} on {len(self.dataset)} images of {self.request.images} → {self.request.out}"
        each = ", ".join(f"{one_line(name)} {value:.3f}" for name, value in self.thresholds.items())
        beside = "" if self.request.onto is None else f"\njoined to the objects of {self.request.onto}: {JOINED}"
        return f"{said}\nthresholds: {each}{beside}"


def make_plan(asked: Request) -> Plan:
    """Look at where the labels go, the pictures, the classes and the thresholds. Raises QskdError."""
    check_out(asked.out, overwrite=True)  # before minutes are spent on thresholds
    if asked.onto is not None and os.path.realpath(asked.onto) == os.path.realpath(asked.out):
        raise QskdError(
            str(asked.out), "is the file of --onto, too", "another file", "choose another name; nothing was written"
        )
    dataset: UnlabeledDataset | LabelledPictures
    if asked.onto is None:
        dataset = UnlabeledDataset(asked.images, None, asked.on_error)
    else:
        dataset = LabelledPictures(asked.onto, asked.images, asked.on_error)
    if asked.like and asked.classes:
        raise QskdError("--classes", "with --like, whose classes are asked for", "one of the two", "leave one out")
    data = load_manifest(asked.like) if asked.like else None
    words = asked.classes if data is None else words_for(data.labels, asked.class_map)
    with fetched(asked.model) as folder:
        check_classes(folder, asked.classes)
        preprocessing, detector = read_preprocessing(folder, asked.resize), load_detector(folder, words=words)
        digests, labels, own_ids = checkpoint_digests(folder), detector.labels, detector.category_ids
        if asked_in_words(folder):
            digests["teacher.prompt"] = "\n".join(prompt_of(folder, words).texts)
    if data is not None:
        check_labelled(asked.like, data)
        categories = data.categories
        slots = map_classes(data.labels, labels, asked.class_map or {}, model_side(asked.model))
    else:
        if asked.class_map and asked.onto is None:
            raise QskdError(
                "teacher.class_map",
                "a class map without a dataset",
                "--like SHARDS or --onto JSON, whose classes it maps",
            )
        categories, slots = own_classes(labels, own_ids)
    pairs = [(one, slot) for one, slot in zip(categories, slots, strict=True) if slot != NOBODY]
    known = tuple(one for one, _ in pairs)
    if silent := [one.name for one in categories if one not in known]:
        log.warning("left to nobody, and never labelled: %s", listing(silent))
    looks = asdict(preprocessing) | {"resize": preprocessing.resize.model_dump()}
    measured: Mapping[str, Any] = {}
    if asked.threshold is None and data is not None:
        measured = _measured(asked, known, [digests, looks, data.fingerprint, [[one.id, slot] for one, slot in pairs]])
        thresholds = tuple(dict(measured["thresholds"])[one.id] for one in known)
        if few := [one.name for one in known if one.id in measured.get("few", ())]:
            log.warning(
                "fewer than %d objects in %s, so that %g is the threshold: %s", FEWEST, asked.like, USUAL, listing(few)
            )
    else:
        thresholds = (USUAL if asked.threshold is None else asked.threshold,) * len(known)
    own: list[Any] = []
    if isinstance(dataset, LabelledPictures):
        keys: Sequence[int] = [slot for _, slot in pairs]
        # Beside --like the map is of its classes, and the dataset's are those of the same names.
        explicit = {} if asked.like else asked.class_map or {}
        union = join_classes(dataset, known, keys, explicit, model_side(asked.model))
        if union.left:
            log.warning("labelled in %s, and left to it: %s", asked.onto, listing(union.left))
        pairs = [(one, pairs[place][1]) for one, place in zip(union.named, union.places, strict=True)]
        thresholds = tuple(thresholds[place] for place in union.places)
        categories, known, own = union.categories, union.named, dataset.decides
    chosen = [[one.id, one.name, slot] for one, slot in pairs]
    most = BEST if own else max(DETECTIONS, detector.num_queries)
    decides = [digests, looks, chosen, thresholds]
    identity = hashlib.sha256(json.dumps([*decides, asked.precision, most, *own]).encode()).hexdigest()
    job = Job(
        *(
            for_workers(asked.model),
            preprocessing,
            tuple(slot for _, slot in pairs),
            tuple(one.id for one in known),
            thresholds,
        ),
        root=for_workers(str(dataset.root)),
        parts=str(parts_folder(asked.out).absolute()),
        identity=identity,
        skip=asked.on_error == "skip",
        batch_size=asked.batch_size,
        threads=asked.threads,
        device=asked.device,
        precision=asked.precision,
        most=most,
        words=words,
    )
    return Plan(asked, dataset, categories, known, job, measured)


def _measured(asked: Request, known: Sequence[Category], decides: Sequence[Any]) -> Mapping[str, Any]:
    """Each class's threshold, and of what it was measured: an earlier attempt's, where there is one."""
    of = hashlib.sha256(json.dumps([*decides, asked.precision, FEWEST, USUAL]).encode()).hexdigest()
    if kept := read_measured(asked.out, of):
        return kept
    class_map = dict(asked.class_map or {})
    said = evaluate(
        *(asked.model, asked.like, asked.resize, class_map, asked.batch_size, asked.workers, asked.threads),
        device=asked.device,
        precision=asked.precision,
    )
    best = {one.id: one.best.score for one in said.classes if one.best is not None and one.objects >= FEWEST}
    thresholds = [[one.id, round(best.get(one.id, USUAL), 4)] for one in known]
    objects = {one.id: one.objects for one in said.classes}
    return {"of": of, "thresholds": thresholds, "few": [one.id for one in known if objects.get(one.id, 0) < FEWEST]}


def is_finished(plan: Plan) -> bool:
    """Whether its labels are there already. QskdError where other labels are, which are not to be replaced."""
    asked = plan.request
    if finished(asked.out, plan.job.fingerprint(plan.pictures), plan.job.skip):
        return True
    check_out(asked.out, asked.overwrite)
    return False


def run(asked: Request, quiet: bool = False) -> Labels:
    """Label all pictures and write the JSON. Killed at any moment and run again, it keeps every whole part and does the rest."""
    plan = make_plan(asked)
    pictures, job = plan.pictures, plan.job
    parts = [pictures[start : start + PART] for start in range(0, len(pictures), PART)]
    if is_finished(plan):
        log.warning("%s is finished already; nothing is labelled", asked.out)
        delete_parts(asked.out)  # of one that was killed as it deleted them
        return _summary(plan, json.loads(asked.out.read_text()))
    if plan.measured:
        write_measured(asked.out, plan.measured)
    keys = [job.fingerprint(part) for part in parts]
    todo = [n for n, key in enumerate(keys) if read_part(part_file(job.parts, n), key, job.skip) is None]
    left = sum(len(parts[number]) for number in todo)
    with progress("label", len(pictures), quiet=quiet) as row:
        if left < len(pictures):
            row.line(f"label: {len(pictures) - left} of {len(pictures)} images are labelled already")
        if todo:
            work = [{"number": number, "pictures": json.dumps(parts[number])} for number in todo]
            if asked.workers:
                _on_cluster(job, work, left, row, asked.workers)
            else:
                _here(job, work, left, row)
        row.stage("writing")
        said = [read_part(part_file(job.parts, number), key, job.skip) for number, key in enumerate(keys)]
        lost = [number for number, part in enumerate(said) if part is None]
        if lost:
            raise QskdError(
                part_file(job.parts, lost[0]),
                "is gone or changed",
                "a part's file",
                "run the same command again; on several nodes, with OUT in a folder that all of them share",
            )
        whole = [part for part in said if part is not None]
        annotations = (entry for part in whole for entry in part["annotations"])
        problems = [*plan.dataset.problems, *(entry for part in whole for entry in part["problems"])]
        tree: dict[str, Any] = {
            "info": {
                "fingerprint": job.fingerprint(pictures),
                "teacher": asked.model,
                "threshold_rule": RULE,
                "thresholds": plan.thresholds,
                **({"measured": plan.measured} if plan.measured else {}),
                **({} if asked.onto is None else {"joined_to": asked.onto.name, "joined_by": JOINED}),
                "left_out": [{"where": each["where"], "found": each["found"]} for each in problems],
            },
            "categories": [asdict(one) for one in plan.categories],
            "images": [entry for part in whole for entry in part["images"]],
            "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
        }
        if not tree["images"]:
            raise QskdError(str(asked.images), "no picture could be read", "at least one", "see what is said of each")
        if isinstance(plan.dataset, LabelledPictures):
            tree = plan.dataset.with_labels(tree)
        write_labels(asked.out, tree)
        delete_parts(asked.out)
    return _summary(plan, tree)


def _summary(plan: Plan, tree: Mapping[str, Any]) -> Labels:
    names, counts = {one.id: one.name for one in plan.categories}, dict.fromkeys((one.name for one in plan.known), 0)
    ids = set(plan.job.category_ids)  # the dataset's objects are of other categories, and may have scores, too
    ours = [entry for entry in tree["annotations"] if entry["category_id"] in ids]
    for entry in ours:
        counts[names[entry["category_id"]]] += 1
    scores = [entry["score"] for entry in ours]
    return Labels(
        plan.request.out,
        len(tree["images"]),
        plan.thresholds,
        counts,
        float(np.mean(scores)) if scores else None,
        len(tree["images"]) - len({entry["image_id"] for entry in tree["annotations"]}),
        tree["info"]["left_out"],
        None if plan.request.onto is None else len(tree["annotations"]) - len(ours),
    )


def _here(job: Job, work: Sequence[Mapping[str, Any]], left: int, row: Row) -> None:
    before, actor = row.shown.total - left, LabelActor(job)
    for each in work:
        for said in actor({name: np.array([value], object) for name, value in each.items()}):
            _raise(said)
        row.at(before + actor.images)


def _on_cluster(job: Job, work: Sequence[Mapping[str, Any]], left: int, row: Row, workers: int) -> None:
    row.stage("starting Ray")
    start_ray()
    import ray

    quiet_ray_data()
    say_if_on_cpus(job.device)
    there = bool(ray.cluster_resources().get("GPU"))
    if job.device == "cuda":
        check_gpus(1)
    row.stage("loading the teacher")
    subject = f"labels-{uuid.uuid4().hex}"
    done = ray.data.from_items(list(work), override_num_blocks=len(work)).map_batches(
        LabelActor,
        fn_constructor_args=(job, subject),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(len(work), workers)),
        num_gpus=1 if job.device == "cuda" or (job.device == "auto" and there) else 0,
        num_cpus=1,
    )
    with CountWatch(row, subject, left):
        for said in done.iter_batches(batch_size=None):
            _raise(said)


def _raise(said: Mapping[str, Any]) -> None:
    for failure in said["failure"]:
        if failure:
            raise QskdError.from_json(str(failure))
