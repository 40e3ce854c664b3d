"""`qskd label` and `qskd select` as functions; `pipelines.api` has them with the other verbs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pipelines.command import local_path
from pipelines.functions.recipes import Fields, Folder, Recipe, as_the_command, choice, configuration, unless

if TYPE_CHECKING:
    from pipelines.labelling.job import Labels
    from qskd.datasets.order.chosen import Selection


@as_the_command("label")
def label(
    model: Folder,
    images: Folder,
    out: Folder,
    *,
    like: Folder = "",
    threshold: float | None = None,
    onto: Folder | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    recipe: Recipe = None,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    batch_size: int = 16,
    workers: int = 0,
    threads: int = 1,
    overwrite: bool = False,
    classes: Sequence[str] = (),
) -> Labels:
    """Label a folder of pictures, or a text file that lists some, by a detector's detections: COCO JSON, with scores; the same
    call again goes on where it was stopped. recipe, set: as of `evaluate`. workers: 0 does it in this process; otherwise the most
    detector processes of Ray. Options as of `qskd label --help`."""
    from pipelines.labelling import job

    choice("qskd.label: on_error", on_error, "stop", "skip")
    config = configuration(recipe, set, methods)
    asked = job.Request(
        *(os.fspath(model), local_path(images), local_path(out), os.fspath(like), threshold, on_error),
        **job.as_recipe(config),
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        overwrite=overwrite,
        onto=None if onto is None else local_path(onto),
        classes=tuple(classes),
    )
    with unless(False):
        return job.run(asked, quiet=True)


@as_the_command("select")
def select(
    shards: Folder,
    out: Folder,
    budget: int,
    *,
    by: Literal["random", "classes", "uncertainty", "gradients"] = "random",
    recipe: Recipe = None,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> Selection:
    """Choose the images that are worth labelling or training on: a file for `data.selection`, and a picture beside it. recipe:
    whose cache has the teacher's outputs of these shards; random, and classes of labelled ones, need none. Options as of
    `qskd select --help`."""
    from pipelines.selecting import job
    from qskd.datasets.order.chosen import load_selection

    choice("qskd.select: by", by, "random", "classes", "uncertainty", "gradients")
    job.check_fields(recipe, set)
    config = None if recipe is None else configuration(recipe, set, methods)
    with unless(False):
        job.run(job.Request(os.fspath(shards), local_path(out), budget, by, seed, config, overwrite), quiet=True)
    return load_selection(os.fspath(out))
