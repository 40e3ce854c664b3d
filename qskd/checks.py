"""What can be wrong with a recipe's data, cache and classes, found from manifests and configurations alone."""

from __future__ import annotations

import ast
import contextlib
import shlex
from collections.abc import Sequence

from qskd.config import Config
from qskd.datasets.classes import listing, respelled
from qskd.datasets.findings.leaving_out import LEFT_OUT
from qskd.datasets.manifest import Manifest
from qskd.detectors import read_config
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.storage.listing import wrong_files
from qskd.storage.ownership import listed
from qskd.teacher.by_number import check_derived
from qskd.teacher.columns.attended import ATTENDED
from qskd.teacher.columns.table import COLUMNS
from qskd.teacher.decoder import check_decodes
from qskd.teacher.identity import cache_identity, cache_names, teacher_preprocessing
from qskd.teacher.manifest import CacheManifest, check_identity, check_views, load_cache_manifest, sizes_of
from qskd.teacher.memory.basis import cached_basis
from qskd.teacher.memory.directions import FILES as DIRECTIONS
from qskd.teacher.memory.directions import load_directions
from qskd.teacher.several.checks import check_several_teachers
from qskd.teacher.several.members import Member, members_of, told_of


def check_teacher(config: Config) -> None:
    """QskdError when no teacher is named."""
    if not config.teacher.path:
        remedy = "--set teacher.path=..., or train without one: `qskd train`"
        raise QskdError("teacher.path", "empty", "a Hub name or folder of a detector", remedy)


def check_data(config: Config, fields: Sequence[str]) -> None:
    """QskdError when a shard folder is not given."""
    for field in fields:
        if not getattr(config.data, field):
            raise QskdError(
                f"data.{field}", "empty", "a shard folder made by `qskd prepare`", f"--set data.{field}=FOLDER"
            )


def check_unlabeled(config: Config, labels: Sequence[str]) -> None:
    """QskdError where images without labels, or labels that lack classes, would have nobody who says what is there. Reads no
    weights."""
    if config.data.completed and config.distillation.method == "none":
        raise QskdError(
            "data.completed",
            "true, and a training without a teacher",
            "a teacher, who says what the labels lack",
            "`qskd distill`; or complete the labels once: `qskd label TEACHER IMAGES OUT.json --onto LABELS.json`; or "
            "leave it out: --set data.completed=false",
        )
    if not config.data.unlabeled:
        return
    if config.distillation.method == "none":
        raise QskdError(
            "data.unlabeled",
            f"{listing(config.data.unlabeled)}, and a training without a teacher",
            "a teacher, who says what is in images without labels",
            "`qskd distill`; or have a teacher label them once: `qskd label TEACHER IMAGES OUT.json`, then `qskd prepare`; or "
            "leave them out: --set data.unlabeled=[]",
        )
    if silent := _nobody_s(members_of(config, labels), labels):
        raise QskdError(
            "data.unlabeled",
            f"images of which nobody says where there is {listing(silent)}: teacher.class_map leaves that to nobody",
            "a teacher that knows all classes, or its objects in these images would be taught as background",
            "leave them out: --set data.unlabeled=[]",
        )
    train, batch = config.data.train, config.training.batch_size
    if train and not 0 < unlabeled_in_batch(config) < batch:
        found = f"{config.data.unlabeled_share:g} of training.batch_size {batch}: {unlabeled_in_batch(config)} images"
        raise QskdError(
            "data.unlabeled_share",
            found,
            "at least one image of either kind in a batch",
            "another share, or larger batches",
        )


def unlabeled_in_batch(config: Config) -> int:
    """Images of a batch that are without labels."""
    if not config.data.unlabeled:
        return 0
    size = config.training.batch_size
    return round(config.data.unlabeled_share * size) if config.data.train else size


def check_objects(uri: str, data: Manifest, purpose: str) -> None:
    """QskdError where a shard folder has not a single object (crowds aside). purpose: what they are wanted for."""
    if not data.num_objects:
        crowds = f" ({data.num_crowds} crowds)" if data.num_crowds else ""
        raise QskdError(
            uri,
            f"no object in {data.num_images} images{crowds}",
            f"at least one object, {purpose}",
            f"{data.source}, which the shards were made of, has no usable annotation: see `problems` and `findings` in their "
            "manifest.json, correct it, and run `qskd prepare` again",
        )


def check_shards(uri: str, manifest: Manifest) -> None:
    """QskdError that names the shards that are missing or have other sizes than the manifest says. One listing."""
    wrong = wrong_files(uri, {shard.file: shard.bytes for shard in manifest.shards})
    if wrong:
        source = [manifest.source, "IMAGES"] if manifest.labelled else ["--unlabeled", manifest.source]
        command = shlex.join(["qskd", "prepare", *source, uri, *_prepare_options(manifest)])
        raise QskdError(
            uri,
            listed([f"{name} {problem}" for name, problem in wrong.items()]),
            f"all {len(manifest.shards)} shards as its manifest.json says",
            f"copy them again, or make them again: `{command}` and, where they were given then, --exif, --split, --classes, "
            "--box-format and --also, which no manifest keeps, from the same data; with the same version of pyarrow they come out "
            "the same, and what was made with them (a cache, runs) goes on",
        )


def _prepare_options(manifest: Manifest) -> list[str]:
    """How the shards were prepared, as far as that shows."""
    rows, usual = manifest.shards[0].rows, 512
    sized = ["--rows-per-shard", str(rows)] if rows > usual or (len(manifest.shards) > 1 and rows != usual) else []
    left_out, others = [], False
    for problem in manifest.problems:
        if problem.get("found") == LEFT_OUT:
            with contextlib.suppress(ValueError, SyntaxError):  # a name that was too long to be kept whole
                left_out += [LEFT_OUT, str(ast.literal_eval(problem.get("where", "").removeprefix("category ")))]
        else:
            others = True
    return [*sized, *left_out, *(["--on-error", "skip"] if others else [])]


def check_cache_files(uri: str, manifest: CacheManifest, views: int) -> None:
    """QskdError that names the files of the views 0 to views - 1 that are missing or have other sizes than the manifest says.
    One listing."""
    wrong = wrong_files(uri, sizes_of(manifest, range(views)))
    if wrong:
        raise QskdError(
            uri,
            listed([f"{name} {problem}" for name, problem in wrong.items()]),
            "all files of the cache as its manifest.json says",
            "`qskd cache RECIPE` makes these again, and no others",
        )


def check_cache(config: Config, train: Manifest, known: str = "") -> CacheManifest:
    """The manifest of the recipe's cache; QskdError unless it is there, whole, this teacher's, on these views, and enough.

    known: the fingerprint of a cache that was found to be this recipe's already; the teacher's weights are then not read.
    """
    path, views = config.teacher.cache.path, config.data.views.count
    check_enough(config)
    manifest = load_cache_manifest(path)
    if manifest is None:
        raise QskdError(
            path,
            "no cache of teacher outputs",
            "one made by `qskd cache` with this recipe",
            "run `qskd cache RECIPE`; or run the teacher in every step, which is slower: --set teacher.cache.path=",
        )
    if manifest.fingerprint != known:
        check_identity(manifest, cache_identity(config, train), path, cache_names(config))
    check_views(manifest, views, path)
    check_cache_files(path, manifest, views)
    cached_basis(path, manifest)
    return manifest


def check_directions(config: Config, manifest: CacheManifest) -> None:
    """QskdError unless the directions that the recipe's method asks for lie beside its first cache, which has them for all."""
    if lacks_directions(config, manifest):
        raise QskdError(
            config.teacher.cache.path,
            "a cache without the directions of the teacher's memory, which the recipe's method asks for",
            f"{DIRECTIONS[directions_asked(config)]} in its folder",
            "`qskd cache RECIPE` adds it, and computes nothing else anew; or without: --set distillation.features.whitening=0",
        )


def lacks_directions(config: Config, manifest: CacheManifest) -> bool:
    """Whether the recipe's method asks for directions that are not beside its cache. QskdError where they are damaged."""
    asked = directions_asked(config) if manifest.sizes.channels else ""  # a teacher of boxes alone has no memory
    return bool(asked) and load_directions(config.teacher.cache.path, manifest, asked) is None


def directions_asked(config: Config) -> str:
    """Which directions the recipe's method asks for: "variance", "decoder", or "" for none."""
    needs = teacher_needs(config.distillation)
    return needs.directions if needs is not None else ""


def check_classes(config: Config, train: Manifest) -> None:
    """QskdError where the teacher does not know all classes. Reads no weights."""
    if config.distillation.method != "none":
        members_of(config, train.labels)


def _nobody_s(members: Sequence[Member], labels: Sequence[str]) -> list[str]:
    known = {name for each in members for name in each.classes(labels)}
    return [name for name in labels if name not in known]


def check_decoder(config: Config) -> None:
    """QskdError where a method asks for the teacher's decoder, and this teacher's can't be asked. Reads no weights."""
    needs = teacher_needs(config.distillation)
    if needs is not None and (needs.decoder or needs.directions == "decoder"):
        if config.teacher.also:
            raise QskdError(
                "teacher.also",
                "several teachers, and a recipe that asks the teacher's decoder",
                "one teacher",
                "take them out; or another method (of qskd: features.whitened_by: variance)",
            )
        if config.teacher.levels is not None:
            raise QskdError(
                "teacher.levels",
                f"{list(config.teacher.levels)}, and a method that asks the teacher's decoder, which reads all of its maps",
                "all of the teacher's maps",
                "--set teacher.levels=null; or another method",
            )
        if needs.directions == "decoder" and config.teacher.cache.cells == ATTENDED:
            raise QskdError(
                "teacher.cache.cells",
                f"{ATTENDED}, and distillation.features.whitened_by: decoder: the teacher's decoder reads every cell",
                "all",
                "make a cache with --set teacher.cache.cells=all; or --set distillation.features.whitened_by=variance",
            )
        check_decodes(read_config(config.teacher.path).model_type, teacher_preprocessing(config).resize)


def check_columns(config: Config) -> None:
    """QskdError where the recipe's cache is to keep, or its method reads, what no teacher of this family can say. Reads no
    weights."""
    check_several_teachers(config)
    needs, kept = teacher_needs(config.distillation), config.teacher.cache.columns
    for column in COLUMNS:
        if column.name in kept or (column.optional and needs is not None and column.asked(needs)):
            column.check_teacher(read_config(config.teacher.path).model_type)


def class_notices(config: Config, train: Manifest) -> list[str]:
    """What there is to say of classes that the teacher spells otherwise, or knows nothing of. Reads no weights."""
    if config.distillation.method == "none":
        return []
    members = members_of(config, train.labels)
    told = told_of(members, train.labels)
    for each in members:
        if said := respelled(train.labels, each.labels, each.slots):
            told.append(f"classes that {'the teacher' if len(members) == 1 else each.path} spells otherwise: {said}")
    if silent := _nobody_s(members, train.labels):
        told.append(
            f"teacher.class_map leaves to nobody: {listing(silent)}; the student learns these from objects alone"
        )
    return told


def check_enough(config: Config) -> None:
    """QskdError when a method asks for what a cache with the recipe's settings does not hold."""
    needs, cache = teacher_needs(config.distillation), config.teacher.cache
    if needs is None:
        return

    def refused(need: str, expected: str, remedy: str) -> QskdError:
        field, asked = needs.reasons.get(need, ("method", f"{config.distillation.method}, which needs {need}"))
        return QskdError(f"distillation.{field}", asked, expected, remedy)

    if needs.online:
        remedy = "run it in every step, which is slower: --set teacher.cache.path="
        raise refused("online", "what a cache can answer: this method asks the teacher itself", remedy)
    floored = [column.name for column in COLUMNS if column.floored and column.asked(needs)]
    if floored and needs.attention_giou_floor < cache.attention_giou_floor:
        low, floor = needs.attention_giou_floor, cache.attention_giou_floor
        raise refused(
            "attention_giou_floor",
            f"GIoU {floor:g} or more: the cache holds the {' and the '.join(floored)} of queries from there up (and of the "
            "matched ones)",
            f"raise the boundaries, or make a cache with a lower floor: --set teacher.cache.attention_giou_floor={low:g}",
        )
    if cache.cells == ATTENDED:
        whole = "make a cache with --set teacher.cache.cells=all"
        if needs.memory and not needs.attended:
            expected = "features that are compared in attended cells alone, which is all that the cache keeps"
            background = needs.reasons.get("memory", ("", ""))[0].endswith("background")
            raise refused("memory", expected, f"set it to 0, or {whole}" if background else whole)
        if config.data.views.derived_taken == "flip_and_crop":
            raise QskdError(
                "data.views.derived",
                "flip_and_crop, and a cache of attended cells (teacher.cache.cells): what is cropped and resampled reads further",
                "flip, or none",
                f"--set data.views.derived=flip; or {whole}",
            )
    serves = {cache.attention_layers} | ({"last"} if cache.attention_layers == "all" else set())
    if needs.attention and needs.attention_layers not in serves:
        both = " teacher.cache.all_layers=true" if needs.attention_layers == "all" else ""
        raise refused(
            "attention_layers",
            f"{cache.attention_layers}, as the cache has it",
            f"make a cache with --set teacher.cache.attention_layers={needs.attention_layers}{both}",
        )
    known = sorted(column.name for column in COLUMNS if column.optional)
    if strange := sorted(set(cache.columns) - set(known)):
        expected = f"some of: {', '.join(known)}" if known else "none: there are no further columns"
        raise QskdError("teacher.cache.columns", ", ".join(strange), expected, "take it out")
    if missing := sorted(needs.columns - set(cache.columns)):
        columns = ",".join([*cache.columns, *missing])
        raise refused(
            "columns",
            f"what the cache holds: it has no column {', '.join(missing)}",
            f"make a cache with --set teacher.cache.columns=[{columns}]",
        )
    check_derived(config)
    fixed = sorted(column.name for column in COLUMNS if column.asked(needs) and not column.mirrors)
    if config.data.views.derived_taken != "none" and fixed:
        raise QskdError(
            "data.views.derived",
            f"{config.data.views.derived_taken}, and the column {', '.join(fixed)} of the cache, which can't be mirrored",
            "columns that say what they are in a mirrored view (`mirrored` in qskd/teacher/columns/column.py)",
            "--set data.views.derived=none, with data.views.count for more views; or give the column a `mirrored`",
        )
    further = sorted(column.name for column in COLUMNS if column.asked(needs) and column.optional)
    if config.data.views.derived_taken == "flip_and_crop" and further:
        raise QskdError(
            "data.views.derived",
            f"flip_and_crop, and the column {', '.join(further)} of the cache, which can't be cropped",
            "flip, or a method that reads predictions, memory and attention alone",
            "--set data.views.derived=flip",
        )
    if needs.all_layers and not cache.all_layers:
        raise refused(
            "all_layers",
            "last: the cache holds the last layer's logits and boxes",
            "make a cache with --set teacher.cache.all_layers=true",
        )
