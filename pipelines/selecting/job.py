"""Choose images of a shard folder (`qskd select`): a file that says which and how often each is drawn, and a picture. Without Ray.

python -m pipelines.select shards/photos photos.json --budget 1000 --by uncertainty --recipe student.yaml
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.fs as pafs
from numpy.typing import NDArray

from pipelines.cluster.devices import device_here
from pipelines.inspection.predict import write_picture
from pipelines.reporting.board import progress
from pipelines.run.resolve import resolve
from pipelines.training.plan import Plan, make_plan
from qskd.config import Config
from qskd.datasets.batch import train_batch
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.order.chosen import ChosenImage, Selection, is_selection
from qskd.datasets.samples import flat_column
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError, writing
from qskd.from_recipe import make_student, teacher_for_training
from qskd.redaction import redacted_uri
from qskd.selection.distribution import choose_alike, likeness
from qskd.selection.gradients import GradientMaker
from qskd.selection.matching import match, mismatch, shuffled
from qskd.selection.report import class_table, ends, ends_picture
from qskd.selection.uncertainty import choose_balanced, class_masses
from qskd.storage.files import publish_bytes
from qskd.storage.ownership import check_picture
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for
from qskd.teacher.identity import cache_sources
from qskd.training.step import Training

By = Literal["random", "classes", "uncertainty", "gradients"]
_AT_ONCE = 64
_DRAWN = 5  # selections by chance of the same size, that matched gradients are compared with


@dataclass(frozen=True)
class Request:
    """shards: a folder, labelled or not. out: the selection's file; its picture is beside it, OUT's name with .png. config: of a
    recipe whose cache has the teacher's outputs of the folder, for anything but random, and classes of labelled images."""

    shards: str
    out: Path
    budget: int
    by: By = "random"
    seed: int = 0
    config: Config | None = None
    overwrite: bool = False

    @property
    def picture(self) -> Path:
        return self.out.with_suffix(".png")


@dataclass(frozen=True)
class Choice:
    """numbers: of images in stored order, in the order of their choice; weights, scores: theirs. said: for the report."""

    numbers: Sequence[int]
    weights: Sequence[float]
    scores: Sequence[float]
    said: tuple[str, ...] = ()


@dataclass
class Told:
    """What is known of all images. objects: of each, how many of each label, and what they are called; None: nobody has said."""

    objects: list[Mapping[int, int]] | None = None
    what: str = "objects"
    labels: tuple[str, ...] = ()
    said: list[str] = field(default_factory=list)


def check_fields(recipe: object, fields: Collection[str] | None) -> None:
    """QskdError for fields of a recipe that is not there: they would change nothing."""
    if recipe is None and fields:
        raise QskdError(
            "--set", f"{len(fields)} field(s), and no recipe", "a recipe whose fields they are", "--recipe RECIPE"
        )


def check(asked: Request) -> Manifest:
    """The shards' manifest; QskdError for what can't be chosen, or not be written."""
    if asked.out.suffix == ".png":
        raise QskdError(str(asked.out), "a picture's name", "a name for JSON, such as chosen.json")
    manifest = load_manifest(asked.shards)
    if not 0 < asked.budget <= manifest.num_images:
        expected = f"1 to {manifest.num_images}, the images of {redacted_uri(asked.shards)}"
        raise QskdError("--budget", str(asked.budget), expected)
    if asked.config is None and not (asked.by == "random" or (asked.by == "classes" and manifest.labelled)):
        remedy = "--recipe RECIPE, whose teacher.cache.path `qskd cache` has filled; or --by random"
        raise QskdError(f"--by {asked.by}", "no recipe", "a recipe, whose cache has what the teacher says", remedy)
    _check_out(asked, lambda there: _may_be(asked, manifest, there))
    check_picture(asked.picture, [])
    return manifest


def _check_out(asked: Request, is_same: Callable[[str], bool]) -> None:
    """QskdError where OUT is a file that is not to be replaced. is_same: whether what is there is what will be written."""
    out = asked.out
    if not os.path.lexists(out):
        return
    ours = out.is_file() and is_selection(out.read_bytes()[:200])
    if not ours:
        raise QskdError(str(out), "is there already, and `qskd select` did not write it", "a new file", "another name")
    if not asked.overwrite and not is_same(out.read_text()):
        remedy = "choose another name, or pass --overwrite, which replaces this file and its picture"
        raise QskdError(str(out), "another selection", "a new file, or the same selection", remedy)


def _may_be(asked: Request, manifest: Manifest, there: str) -> bool:
    """Whether a selection that is there may be the one that is asked for, as far as can be told before anything is chosen."""
    found = Selection.from_json(there, str(asked.out))
    exactly = (manifest.fingerprint, asked.by, asked.seed) == (found.fingerprint, found.by, found.seed)
    fewer = asked.by == "gradients" and len(found.images) < asked.budget
    return exactly and (len(found.images) == asked.budget or fewer)


def run(asked: Request, quiet: bool = False) -> list[str]:
    """Choose, write, and say what was chosen."""
    manifest = check(asked)
    plan = None if asked.config is None else plan_of(asked.config, asked.shards, manifest)
    with progress("select", manifest.num_images, quiet=quiet) as row:
        row.stage("looking at what there is")
        told = _told(asked, manifest, plan)
        if asked.by == "random":
            choice = by_chance(manifest.num_images, asked.budget, asked.seed)
        elif asked.by == "classes":
            choice = by_classes(told, asked.budget)
        elif asked.by == "uncertainty":
            assert plan is not None
            choice = by_uncertainty(plan, asked.budget, row.at)
        else:
            assert plan is not None
            choice = by_gradients(plan, asked.budget, asked.seed, row.at)
        row.stage("writing")
        selection = _selection(asked, manifest, choice)
        text = selection.to_json()
        _check_out(asked, lambda there: there == text)
        _draw(asked, manifest, selection)
        with writing(asked.out):
            publish_bytes(text.encode(), pafs.LocalFileSystem(), str(asked.out.absolute()))
    chosen = f"{len(choice.numbers)} of {manifest.num_images} images of {redacted_uri(asked.shards)}, by {asked.by}"
    lines = [f"{asked.out}: {chosen} (pictures: {asked.picture})", *choice.said]
    if len(choice.numbers) < asked.budget:
        lines.append(f"no other image would help, so that they are fewer than {asked.budget}")
    if told.objects is not None:
        lines += class_table(told.objects, choice.numbers, told.labels, told.what)
    return lines


def plan_of(config: Config, shards: str, manifest: Manifest) -> Plan:
    """Of a distillation on this folder alone, its cache looked at. QskdError."""
    given, cache = config.data, config.teacher.cache.path
    if not cache:
        raise QskdError("teacher.cache.path", "empty", "a cache of this folder", "`qskd cache RECIPE` makes it")
    data = {"train": shards, "unlabeled": ()}
    if not manifest.labelled:  # the classes are then those of `val`; the cache was made with those of `train`
        data = {"train": "", "unlabeled": (shards,), "val": given.train or given.val}
    config = config.model_copy(update={"data": given.model_copy(update={**data, "selection": ()})})
    try:
        return make_plan(resolve(config, "distill"), "distill")
    except QskdError as error:
        named = [load_manifest(uri).fingerprint for uri in (given.train, *given.unlabeled) if uri]
        if not error.where.startswith(cache) or manifest.fingerprint in named:
            raise
        field = "data.train, with a cache of its own," if manifest.labelled else "data.unlabeled"
        remedy = f"name it in {field} and `qskd cache RECIPE` first"
        raise QskdError(
            error.where, f"{error.found}. The recipe does not name {redacted_uri(shards)}", error.expected, remedy
        ) from None


def _cache(plan: Plan) -> str:
    return cache_sources(plan.config)[0].teacher.cache.path


def _said_by_teacher(plan: Plan) -> Iterator[NDArray[np.floating]]:
    """Logits [Q, K] of each image's first view, in stored order, one after the other."""
    reader = TeacherCacheReader(_cache(plan), columns_for(TeacherNeeds()))
    for shard, (rows, _) in enumerate(reader.manifest.views[0]):
        for start in range(0, rows, _AT_ONCE):
            for row in reader.read(shard, 0, range(start, min(start + _AT_ONCE, rows))):
                yield row.logits[-1]


def _told(asked: Request, manifest: Manifest, plan: Plan | None) -> Told:
    if manifest.labelled:
        reader, objects = ShardReader(asked.shards), list[Mapping[int, int]]()
        for shard in range(len(manifest.shards)):
            table = reader.read_table(shard, ["category_ids", "iscrowd"])
            (offsets, ids), (_, crowds) = flat_column(table, "category_ids"), flat_column(table, "iscrowd")
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                own = ids[start:stop][~crowds[start:stop].astype(bool)]
                objects.append(Counter(manifest.category_index[category] for category in own.tolist()))
        return Told(objects, labels=manifest.labels)
    if plan is None:
        return Told()
    floor = np.log(plan.config.data.unlabeled_score / (1 - plan.config.data.unlabeled_score))
    seen = [Counter(logits.argmax(-1)[logits.max(-1) >= floor].tolist()) for logits in _said_by_teacher(plan)]
    return Told(list(seen), "pseudo-objects", plan.train.labels)


def by_chance(count: int, budget: int, seed: int) -> Choice:
    numbers = shuffled(count, seed)[:budget].tolist()
    return Choice(numbers, [1.0] * budget, [0.0] * budget)


def by_classes(told: Told, budget: int) -> Choice:
    objects = told.objects or []
    numbers, scores = choose_alike(objects, budget)

    def counted(images: Sequence[int]) -> NDArray[np.float64]:
        sums = np.zeros(len(told.labels))
        for number in images:
            for label, count in objects[number].items():
                sums[label] += count
        return sums

    everything = counted(range(len(objects)))
    best = likeness(everything, everything)
    lucky = [likeness(everything, counted(shuffled(len(objects), 1 + n)[:budget].tolist())) for n in range(_DRAWN)]
    said = (
        f"distribution over classes: {best - scores[-1]:.5f} nats off that of all (Kullback-Leibler); of as many by chance "
        f"{best - float(np.mean(lucky)):.5f}"
    )
    return Choice(numbers, [1.0] * len(numbers), scores, (said,) if everything.any() else ())


def by_uncertainty(plan: Plan, budget: int, at: Callable[[int], None]) -> Choice:
    masses = []
    for logits in _said_by_teacher(plan):
        masses.append(class_masses(logits))
        at(len(masses))
    numbers = choose_balanced(masses, budget)
    return Choice(numbers, [1.0] * budget, [sum(masses[number].values()) for number in numbers])


def by_gradients(plan: Plan, budget: int, seed: int, at: Callable[[int], None]) -> Choice:
    gradients = image_gradients(plan, at)
    weights = match(gradients, budget, seed)
    numbers = np.flatnonzero(weights)
    numbers = numbers[np.argsort(-weights[numbers], kind="stable")]
    if not len(numbers):
        raise QskdError("--by gradients", "no image has a gradient", "a student that differs from its teacher")
    scaled = weights[numbers] * (len(numbers) / weights.sum())
    lengths = np.linalg.norm(gradients[numbers], axis=1)
    by_luck = []
    for other in range(_DRAWN):
        even = np.zeros(len(gradients))
        even[shuffled(len(gradients), seed + 1 + other)[: len(numbers)]] = 1.0
        by_luck.append(mismatch(gradients, even))
    said = (
        f"weighted mean gradient of the chosen: {mismatch(gradients, weights):.3f} off that of all (over its length); of as many "
        f"by chance {np.mean(by_luck):.3f}"
    )
    return Choice(numbers.tolist(), scaled.tolist(), lengths.tolist(), (said,))


def image_gradients(plan: Plan, at: Callable[[int], None] = lambda done: None) -> NDArray[np.float32]:
    """[n, D], of each image's first view, in stored order."""
    config, device = plan.config, device_here(plan.config)
    # What a projector gives has no gradient where it is a value inside a compiled graph.
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"compile": False})})
    student, teacher = make_student(config, plan.train.labels), teacher_for_training(config, plan.train.labels, None)
    training = Training(config, student, teacher, plan.stream.schedule.total_steps, device)
    maker, loader, parts, done = GradientMaker(training.module), plan.stream.loader(), list[NDArray[np.float32]](), 0
    # As many images at once as a worker of the training has: a batch of many workers is more than one device holds.
    size = config.training.micro_batch_size or -(-config.training.batch_size // config.compute.workers)
    _, manifest = plan.folder
    assert training.teacher is not None
    assert training.module.method is not None
    for shard, rows in enumerate(manifest.shard_rows):
        for start in range(0, rows, size):
            places = [(shard, row, 0) for row in range(start, min(start + size, rows))]
            batch = train_batch(loader.load("train", np.array(places, np.int32)), device)
            parts.append(maker.of(batch, training.teacher.record(batch, training.module.method.needs)))
            done += len(places)
            at(done)
    return np.concatenate(parts)


def _selection(asked: Request, manifest: Manifest, choice: Choice) -> Selection:
    starts, reader = np.cumsum([0, *manifest.shard_rows]), ShardReader(asked.shards)
    shards = np.searchsorted(starts, np.asarray(choice.numbers), side="right") - 1
    known = dict[int, tuple[list[int], list[str]]]()
    for shard in np.unique(shards).tolist():
        table = reader.read_table(shard, ["image_id", "file_name"])
        known[shard] = table.column("image_id").to_pylist(), table.column("file_name").to_pylist()
    images = []
    for number, shard, weight, score in zip(
        choice.numbers, shards.tolist(), choice.weights, choice.scores, strict=True
    ):
        row = int(number - starts[shard])
        ids, names = known[shard]
        images.append(ChosenImage(shard, row, ids[row], names[row], round(float(weight), 6), round(float(score), 6)))
    # A weight so small that it is 0 here would never be drawn.
    images = [replace(image, weight=max(image.weight, 1e-6)) for image in images]
    return Selection(redacted_uri(asked.shards), manifest.fingerprint, asked.by, asked.seed, tuple(images))


def _draw(asked: Request, manifest: Manifest, selection: Selection) -> None:
    reader, images = ShardReader(asked.shards), [selection.images[place] for place in ends(len(selection.images))]
    samples = [reader.read(image.shard, [image.row])[0] for image in images]
    about = f"{len(selection.images)} of {manifest.num_images} images, by {asked.by}: the first and the last chosen"
    picture = ends_picture(redacted_uri(asked.shards), about, images, samples, manifest.categories)
    write_picture(picture, asked.picture, [asked.out])
