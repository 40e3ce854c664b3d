"""How well derived views agree with what the teacher says when it is asked (`--verify-derived`), and what that allows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.caching.actors import decode
from pipelines.caching.looks import BATCH, IMAGES, SECONDS, some_images
from pipelines.caching.plan import CachePlan, make_cache_plan
from pipelines.cluster.devices import device_here
from pipelines.run.resolve import resolve
from qskd.config import Config, ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.views import derived_crop
from qskd.distillation.method import teacher_needs
from qskd.distillation.shared.maps import resample
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.structures import TeacherRecord
from qskd.teacher.columns.table import ALWAYS, TeacherRow, collate, decode_batch, mirrored
from qskd.teacher.crops import cropped
from qskd.teacher.identity import cache_sources, teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.positives import Agreement, mirrored_arrays
from qskd.teacher.told.teacher import ToldTeacher

# Derived and real positives differ by 0.01 to 0.02 for the package's teacher (docs/cache.md).
PREDICTIONS_MARGIN = 0.05
# The package's teacher has 0.51 for flips (0.42 to 0.55 on few images), which a training forgives; of more nothing is known.
MEMORY_MARGIN = 0.7
NO_VIEWS = "data.views.derived=none, with data.views.count for more views"
COLUMNS = ("image_id", *ALWAYS)
CROP = "crop_"  # before the names of what is measured of crops


def verify_derived(config: Config, count: int) -> dict[str, float]:
    """Ask the teacher about views of `count` images, and about their mirror images; compare what it says of these with what is
    derived from the first, through the cache's own columns and precision. `Agreement.summary`; no cache need be there. Where the
    recipe crops, of crops of whole images too: the same names after `CROP`."""
    plan = make_cache_plan(cache_sources(resolve(config, "cache"))[0])
    teacher = make_teacher(plan.config, plan.data.labels)
    assert teacher is not None
    if isinstance(teacher, ToldTeacher):
        raise QskdError(
            "--verify-derived",
            f"{plan.config.teacher.path}, whose boxes are exact in any view",
            "a teacher to ask",
            "leave it out",
        )
    torch.set_num_threads(plan.config.compute.threads_per_worker or torch.get_num_threads())
    found, views = _of_flips(plan, teacher, count).summary(), plan.config.data.views
    if not views.crop_probability or views.crop_min_scale == 1:
        return found
    of_crops = _of_crops(plan, teacher, count).summary()
    return found | {f"{CROP}{name}": value for name, value in of_crops.items()}


def look_at_flips(plan: CachePlan, teacher: OnlineTeacher) -> tuple[bool, str] | None:
    """Whether flips of a few images may be derived, for at most about `SECONDS`, and a sentence that says it. None where the recipe
    derives none, there is no object to look at, or one of the images can't be read: a look stops no job."""
    config = plan.config
    if config.data.views.derived_taken == "none" or isinstance(teacher, ToldTeacher):
        return None
    try:
        agreement = _of_flips(plan, teacher, IMAGES, SECONDS)
    except QskdError:
        return None
    found = agreement.summary()
    if not found.get("objects"):
        return None
    said = (
        f"the teacher's positives on mirrored views, derived from the cache and asked: mean IoU {found['iou_derived']:.2f} and "
        f"{found['iou_real']:.2f}, confidence {found['confidence_derived']:.2f} and {found['confidence_real']:.2f}"
    )
    try:
        _allowed(config, found, "flip", asked=True)
    except QskdError as error:
        return False, f"{said}; {error.found}. What to do: {error.remedy}"
    return True, said


def _of_flips(plan: CachePlan, teacher: OnlineTeacher, count: int, seconds: float = math.inf) -> Agreement:
    """seconds: no further batch after so long."""
    config, started = plan.config, time.perf_counter()
    device, sizes = device_here(config), teacher.sizes(config.teacher.cache.all_layers)
    maker, found = CacheMaker(config, teacher, device), Agreement(config.detection)
    for part in _parts(plan, count):
        arrays = _seen(config, config.data.views, part, 0)
        turned = mirrored_arrays(arrays)
        derived = _record((mirrored(row, sizes, COLUMNS) for row in maker.rows(arrays)), sizes, device)
        found.add(derived, maker.ask(turned), train_batch(turned, device).targets)
        if time.perf_counter() - started > seconds:
            break
    return found


def _of_crops(plan: CachePlan, teacher: OnlineTeacher, count: int) -> Agreement:
    config, views = plan.config, plan.config.data.views
    device, sizes = device_here(config), teacher.sizes(config.teacher.cache.all_layers)
    maker, found = CacheMaker(config, teacher, device), Agreement(config.detection)
    fresh = {"count": 1, "derived": "flip_and_crop", "crop_probability": 1.0, "flip_probability": 0.0}
    policy = views.model_copy(update=fresh)
    for part in _parts(plan, count):
        arrays = _seen(config, policy, part, 1)
        crops = torch.tensor([derived_crop(policy, image_id, 1) for _, _, image_id in part], device=device)
        whole, real = _record(maker.rows(_seen(config, policy, part, 0)), sizes, device), maker.ask(arrays)
        derived = _on_cells_of(real, cropped(whole, crops, views.min_visible))
        found.add(derived, real, train_batch(arrays, device).targets)
    return found


def _parts(plan: CachePlan, count: int) -> Iterator[list[tuple[int, int, int]]]:
    images = list(some_images(plan, count))
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def _seen(
    config: Config, policy: ViewConfig, part: Sequence[tuple[int, int, int]], view: int
) -> Mapping[str, NDArray[np.generic]]:
    rows = np.array([(shard, row, view) for shard, row, _ in part], np.int32)
    (arrays,) = decode((config.data.train, policy, teacher_preprocessing(config).resize, True), [rows])
    return arrays


def _record(rows: Iterable[TeacherRow], sizes: CacheSizes, device: torch.device) -> TeacherRecord:
    """As a training reads them."""
    tensors = collate(list(rows), sizes, COLUMNS)
    return decode_batch({name: torch.from_numpy(value).to(device) for name, value in tensors.items()})


def _on_cells_of(real: TeacherRecord, derived: TeacherRecord) -> TeacherRecord:
    """With maps of the other's sizes: a crop of another shape has others than the whole image."""

    def moved(maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        both = zip(maps, derived.memory_valid, real.memory_valid, strict=True)
        return tuple(resample(map_, valid, onto) * onto[:, None] for map_, valid, onto in both)

    attention = moved(derived.attention)
    total = torch.stack([part.flatten(2).sum(2) for part in attention]).sum(0).clamp(min=1e-12)
    attention = tuple(part / total[..., None, None] for part in attention)
    return replace(derived, memory=moved(derived.memory), attention=attention, memory_valid=real.memory_valid)


def allowed(config: Config, found: Mapping[str, float]) -> str:
    """What the agreement allows, as a sentence, or of crops too as two. QskdError where it does not allow what the recipe asks
    for."""
    flips = _allowed(config, found, "flip", config.data.views.derived_taken != "none")
    if f"{CROP}objects" not in found:
        return flips
    of_crops = {name.removeprefix(CROP): value for name, value in found.items() if name.startswith(CROP)}
    crops = _allowed(config, of_crops, "flip_and_crop", config.data.views.derived_taken == "flip_and_crop")
    return f"{flips}\n{crops}"


def _allowed(config: Config, found: Mapping[str, float], choice: str, asked: bool) -> str:
    """Of flips, or of crops. asked: whether the recipe has this `choice` of `data.views.derived`, or more."""
    if not found.get("objects"):
        raise QskdError(
            "--verify-derived",
            "no object of a class that the teacher knows",
            "some",
            "try more images: --verify-derived N",
        )
    of, crops = ("crops: ", True) if choice == "flip_and_crop" else ("", False)
    gaps = {name: found[f"{name}_derived"] - found[f"{name}_real"] for name in ("iou", "confidence")}
    # Few teachers see a crop as well as the whole image: what is derived may then be the better record.
    apart = [
        f"{name} {gap:+.3f}"
        for name, gap in gaps.items()
        if gap < -PREDICTIONS_MARGIN or (gap > PREDICTIONS_MARGIN and not crops)
    ]
    memory, needs = found.get("memory_unexplained", 0.0), teacher_needs(config.distillation)
    if apart:
        said = f"{of}derived positives differ from real ones by {', '.join(apart)} (allowed: {PREDICTIONS_MARGIN:g})"
        remedy = NO_VIEWS
        if crops:
            remedy = "data.views.derived=flip; or raise data.views.crop_min_scale"
        if asked:
            like = "a teacher that sees a cropped image as a part of the image" if crops else ""
            raise QskdError(
                "data.views.derived", said, like or "a teacher that sees a mirrored image as it sees the image", remedy
            )
        return f"not allowed: {said}. Keep {remedy}"
    if memory > MEMORY_MARGIN and needs is not None and needs.memory and not _spared(config):
        said = (
            f"{of}derived memory leaves {memory:.2f} of the real one's variance in objects unexplained "
            f"(allowed: {MEMORY_MARGIN:g})"
        )
        if not hasattr(
            config.distillation, "features"
        ):  # a method that has nothing but features to teach, or another's
            if asked:
                raise QskdError("data.views.derived", said, f"none, with {config.distillation.method}", NO_VIEWS)
            return f"not allowed with {config.distillation.method}: {said}. Keep {NO_VIEWS}"
        remedy = (
            f"data.views.derived={choice} with distillation.features.derived_weight=0: features of real views alone, "
            "predictions of all; or with distillation.features.weight=0: predictions alone"
        )
        if asked:
            raise QskdError("distillation.features.weight", said, "0 with such views", f"set {remedy}")
        return f"allowed in part: {said}. Set {remedy}"
    return f"allowed: {of}data.views.derived={choice}"


def _spared(config: Config) -> bool:
    """Whether the method's feature loss leaves derived views out."""
    features = getattr(config.distillation, "features", None)
    return getattr(features, "derived_weight", 1.0) == 0
