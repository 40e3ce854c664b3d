"""What a training will do, found and checked before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipelines.feed.memory import memory_bytes, too_much_for
from pipelines.feed.stream import StreamConfig, keep_bytes_for
from pipelines.run.folder import Folder
from pipelines.run.resolve import ResolvedConfig
from pipelines.tracking.store import tracking_uri
from pipelines.training.notices import notices
from qskd.checks import (
    check_cache,
    check_classes,
    check_columns,
    check_data,
    check_decoder,
    check_directions,
    check_enough,
    check_objects,
    check_shards,
    check_teacher,
    check_unlabeled,
    class_notices,
    unlabeled_in_batch,
)
from qskd.datasets.findings.splits import between, shared
from qskd.datasets.manifest import Manifest, check_labelled, load_manifest
from qskd.datasets.order.chosen import ChosenRows, by_folder, chosen_rows
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.shards import read_annotations
from qskd.datasets.splits import check_splits
from qskd.datasets.unlabeled.joined import source_manifest, training_manifest, unlabeled_manifests
from qskd.detectors import describe_student
from qskd.detectors.student import queries_of
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.from_recipe import start_student
from qskd.redaction import redacted
from qskd.teacher.by_number import check_asked, check_numbers
from qskd.teacher.cache import ROW_GROUP_BYTES
from qskd.teacher.columns.table import columns_for
from qskd.teacher.identity import cache_sources, teacher_preprocessing
from qskd.teacher.manifest import CacheManifest, load_cache_manifest
from qskd.teacher.memory.basis import check_one_basis
from qskd.teacher.several.members import teachers_named
from qskd.teacher.told.checks import check_told
from qskd.teacher.told.fits import fit_notices

SLOW_PATH = "run in every training step: the slow path (`qskd cache` runs it once, for all trainings)"


@dataclass(frozen=True)
class Plan:
    """All a training needs to know before it starts."""

    config: ResolvedConfig
    train: Manifest
    val: Manifest
    stream: StreamConfig
    verb: str
    cache_is_missing: bool = False  # of a dry run alone
    classes: tuple[str, ...] = ()  # what there is to say of classes that are joined by name
    unlabeled: tuple[Manifest, ...] = ()
    selections: Mapping[str, str] = field(default_factory=dict)  # the fingerprint of each, by its field

    @property
    def fingerprints(self) -> dict[str, str]:
        own = {f"data.unlabeled[{number}]": each.fingerprint for number, each in enumerate(self.unlabeled)}
        return {"data.train": self.train.fingerprint, "data.val": self.val.fingerprint, **own, **self.selections}

    @property
    def inputs(self) -> dict[str, tuple[str, Manifest]]:
        """What each folder of images is for, in MLflow's words -> the folder and its manifest."""
        data = self.config.data
        found = {"training": (data.train, self.train)} if data.train else {}
        pairs = zip(data.unlabeled, self.unlabeled, strict=True)
        found |= {f"unlabeled {number}": pair for number, pair in enumerate(pairs)}
        return found | {"validation": (data.val, self.val)}

    @property
    def folder(self) -> tuple[str, Manifest]:
        """The first folder of images that it trains on."""
        data = self.config.data
        return (data.train, self.train) if data.train else (data.unlabeled[0], self.unlabeled[0])

    @cached_property
    def data_notices(self) -> list[str]:
        """Of the splits alone, and of what the student can find of them."""
        student, data = self.config.student, self.config.data
        said = between(self.train, self.val, queries_of(student), from_checkpoint=bool(student.init))
        for uri, each in zip(data.unlabeled, self.unlabeled, strict=True):
            remedy = f"Prepare it with --not-in {data.val}"
            said += shared(each, self.val, f"data.unlabeled: {uri}", "it", remedy)
        trained_on = (*([self.train] if data.train else []), *self.unlabeled)
        there = sum(shard.bytes for each in trained_on for shard in each.shards)  # no more is held than there is
        held = min(self.stream.keep_bytes, there)
        return said + too_much_for(held, self.stream.schedule.window_images, memory_bytes())

    @property
    def notices(self) -> list[str]:
        schedule = self.stream.schedule
        return [
            *self.classes,
            *self.data_notices,
            *notices(self.config, schedule.total_steps / schedule.steps_per_epoch),
        ]

    def describe(self, cache_command: str = "qskd cache RECIPE") -> str:
        """What `--dry-run` prints below the configuration. cache_command: makes the cache that is missing."""
        schedule, compute = self.stream.schedule, self.config.compute
        readers = f"{compute.loader_workers or 'as many as the CPUs allow'} reader(s) for each"
        workers = f"{compute.min_workers} to {compute.workers}" if compute.min_workers else f"{compute.workers}"
        lines = [
            f"student: {describe_student(self.config.student, len(self.train.labels))}",
            f"train: {self.train.num_images} images, {self.train.num_objects} objects, {len(self.train.labels)} classes"
            + _part(schedule.train_chosen),
            *self._describe_completed(),
            f"val:   {self.val.num_images} images, {self.val.num_objects} objects",
            *self._describe_unlabeled(),
            f"{schedule.total_steps} steps = {schedule.total_steps / schedule.steps_per_epoch:g} epochs of "
            f"{schedule.steps_per_epoch} batches of {schedule.batch_size}",
            f"{workers} worker(s), {readers}, device {compute.device}",
            f"output: {Folder(self.config).path}",
            f"MLflow: {tracking_uri(self.config)}",
        ]
        if self.verb == "distill":
            cache = self.config.teacher.cache.path
            how = f"its outputs from {cache}" if self.stream.teacher_cache else SLOW_PATH
            if self.cache_is_missing:
                how = f"its outputs from {cache}, where no cache is yet. To be made first: {cache_command}"
            several = bool(self.config.teacher.also)
            how = how.replace("its outputs", "their outputs", 1) if several else how
            lines.insert(0, f"teacher{'s' if several else ''}: {teachers_named(self.config)}, {how}")
        lines += [f"notice: {notice}" for notice in self.notices]
        if self.config.student.inherit:
            lines.append(start_student(self.config, self.train.labels)[1])
        return redacted("\n".join(lines))

    def _describe_completed(self) -> list[str]:
        if not self.config.data.completed:
            return []
        score = self.config.data.unlabeled_score
        return [
            f"completed: beside these, the teacher's predictions of score {score:g} or more that overlap none of them"
        ]

    def _describe_unlabeled(self) -> list[str]:
        if not self.unlabeled:
            return []
        schedule, score = self.stream.schedule, self.config.data.unlabeled_score
        images = sum(each.num_images for each in self.unlabeled)
        return [
            f"unlabelled: {images} images{_part(schedule.unlabeled_chosen)}, {schedule.unlabeled_in_batch} of each batch, "
            f"{schedule.total_steps / schedule.unlabeled_steps:.3g} passes; their objects are the teacher's predictions of score "
            f"{score:g} or more"
        ]


def _part(chosen: ChosenRows | None) -> str:
    return "" if chosen is None else f"; of these {len(chosen)} by data.selection"


def make_plan(config: ResolvedConfig, verb: str, dry: bool = False, known_cache: str = "") -> Plan:
    """Read the manifests and check what can be checked before anything is started. Raises QskdError. dry: nothing will be
    started, so that a cache may be missing. known_cache: as `check_cache` has it, of a trial whose sweep has looked."""
    check_data(config, ("val",) if config.data.unlabeled else ("train", "val"))
    if verb == "distill":
        check_teacher(config)
    train, val = training_manifest(config.data), load_manifest(config.data.val)
    check_labelled(config.data.val, val)
    check_unlabeled(config, train.labels)
    unlabeled = unlabeled_manifests(config.data)
    folders = [(config.data.train, train)] if config.data.train else []
    folders += zip(config.data.unlabeled, unlabeled, strict=True)
    for uri, manifest in [*folders, (config.data.val, val)]:
        check_shards(uri, manifest)
    chosen, selections = by_folder(config.data.selection, folders)
    of_train, others = chosen[: len(folders) - len(unlabeled)], chosen[len(folders) - len(unlabeled) :]
    said = check_splits(
        train,
        val,
        (config.data.train or config.data.val, config.data.val),
        lambda: Counter(read_annotations(config.data.val)["category_ids"].tolist()),
    )
    if config.data.train:
        check_objects(config.data.train, train, "to learn from")
    if not val.num_images:
        raise QskdError(config.data.val, "no images", "at least one, to evaluate on")
    workers = config.compute.workers
    if config.training.batch_size < workers:
        raise QskdError(
            "training.batch_size", str(config.training.batch_size), f"at least one image a worker ({workers})"
        )
    schedule = Schedule(
        train_shard_rows=train.shard_rows,
        val_shard_rows=val.shard_rows,
        seed=config.seed,
        epochs=config.training.epochs,
        batch_size=config.training.batch_size,
        window_images=config.data.shuffle_window_images,
        views=config.data.views.count,
        fresh_views=config.data.views.derived_taken != "none",
        evaluation_batch_size=config.compute.evaluation_batch_size,
        evaluate_every_epochs=config.training.evaluate_every_epochs,
        max_steps=config.training.max_steps,
        unlabeled_shard_rows=tuple(rows for manifest in unlabeled for rows in manifest.shard_rows),
        unlabeled_in_batch=unlabeled_in_batch(config),
        train_chosen=chosen_rows(of_train, [train]) if of_train else None,
        unlabeled_chosen=chosen_rows(others, unlabeled),
    )
    sources, caches, missing = cache_sources(config), list[CacheManifest](), False
    if verb == "distill":
        check_columns(config)
        path = config.teacher.cache.path
        missing = dry and bool(path) and any(load_cache_manifest(each.teacher.cache.path) is None for each in sources)
        if missing:
            check_enough(config)
        elif path:
            known = [known_cache] + [""] * len(sources)
            caches = [
                check_cache(each, source_manifest(each.data), of) for each, of in zip(sources, known, strict=False)
            ]
            check_directions(sources[0], caches[0])
            check_one_basis({each.teacher.cache.path: of for each, of in zip(sources, caches, strict=True)})
        if not caches:  # else its identity was compared, classes included
            check_classes(config, train)
        check_told(config, caches[0] if caches else None)
        if not caches:  # a cache that is there was made of a file that was looked at
            said += fit_notices(config)
        check_decoder(config)
        check_asked(config)
        check_numbers(config)
        said += class_notices(config, train)
    own = teacher_preprocessing(config).resize if verb == "distill" and not caches else config.student.resize
    stream = StreamConfig(
        train_uri=config.data.train,
        unlabeled_uris=config.data.unlabeled,
        val_uri=config.data.val,
        schedule=schedule,
        views=config.data.views,
        student_resize=config.student.resize,
        teacher_resize=own if own != config.student.resize else None,
        by_aspect=config.student.resize.mode == "shortest_edge"
        and (workers > 1 or config.training.micro_batch_size > 0),
    )
    needs = teacher_needs(config.distillation)
    images = sum(manifest.num_images for _, manifest in folders)
    if caches and needs is not None:
        stream = replace(
            stream,
            teacher_cache=config.teacher.cache.path,
            teacher_columns=columns_for(needs),
            teacher_row_bytes=sum(each.num_bytes // len(each.views) for each in caches) // images,
            unlabeled_caches=tuple(each.teacher.cache.path for each in sources[len(sources) - len(unlabeled) :]),
        )
    row_bytes = sum(shard.bytes for _, manifest in folders for shard in manifest.shards) / images
    if (
        2 * stream.teacher_row_bytes <= ROW_GROUP_BYTES
    ):  # else a row group is one row, and nothing is read along with it
        row_bytes += stream.teacher_row_bytes
    windows = [shards for shards in (schedule.train_shard_rows, schedule.unlabeled_shard_rows) if shards]
    stream = replace(stream, keep_bytes=keep_bytes_for(schedule.window_images * len(windows), row_bytes))
    return Plan(config, train, val, stream, verb, missing, tuple(said), tuple(unlabeled), selections)
