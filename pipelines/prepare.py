"""COCO JSON and a folder of images, or a dataset in another format -> Parquet shards (`qskd prepare`).

python -m pipelines.prepare annotations.json images/ shards/
python -m pipelines.prepare data.yaml shards/train --split train
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.command import DryRun, local_path, one_of, run
from pipelines.run.logs import tell
from qskd.errors import QskdError
from qskd.printable import escaped, one_line, shown_value

if TYPE_CHECKING:
    from qskd.datasets.manifest import Manifest

SkipBroken = Annotated[
    str, typer.Option(help="stop: name the first broken sample and stop. skip: leave it out, and record it.")
]


def command(
    annotations: Annotated[
        Path,
        typer.Argument(
            parser=local_path,
            help="COCO JSON (instances), YOLO's data.yaml, or a folder with Pascal VOC or a Hugging Face dataset; on a local disk.",
        ),
    ],
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGES] DESTINATION",
            help="IMAGES: local folder that the JSON's file names are relative to; other formats need none. "
            "DESTINATION: shard folder to write, a path or a URI.",
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Of a dataset in another format: train, val, ...")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(parser=local_path, help="File of class names, one a line, for VOC or Hugging Face."),
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(help="Of a Hugging Face dataset: xywh (COCO's), xyxy or cxcywh, or these with -relative (0..1)."),
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 512,
    on_error: SkipBroken = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards made from another source.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn COCO JSON and a folder of images, or YOLO, Pascal VOC and Hugging Face datasets, into Parquet shards."""
    from qskd.datasets.formats.opening import open_dataset
    from qskd.storage.files import check_uri

    policy = one_of("--on-error", on_error, "stop", "skip")
    images, destination = _images_and_destination(annotations, places)
    if dry_run:
        check_uri(destination)
        dataset = open_dataset(annotations, images, policy, split=split, classes=classes, box_format=box_format)
        shards = -(-len(dataset) // rows_per_shard)
        tell(f"{len(dataset)} images, {len(dataset.categories)} categories → {shards} shard(s) in {destination}")
        return
    manifest = prepare(
        *(annotations, images, destination, rows_per_shard, policy, overwrite),
        split=split,
        classes=classes,
        box_format=box_format,
    )
    tell(describe(manifest, destination))


def _images_and_destination(annotations: Path, places: list[str]) -> tuple[Path | None, str]:
    if len(places) > 2:
        usage = "qskd prepare ANNOTATIONS [IMAGES] DESTINATION"
        raise QskdError(str(annotations), f"{len(places) + 1} paths", usage, "quote paths that have spaces")
    return (local_path(places[0]) if len(places) == 2 else None), places[-1]


def prepare(
    annotations: Path,
    images: Path | None,
    destination: str,
    rows_per_shard: int = 512,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    quiet: bool = False,
    split: str | None = None,
    classes: Path | None = None,
    box_format: str | None = None,
) -> Manifest:
    """Write the shards, with a bar to watch unless `quiet`. Raises QskdError at the first problem, or skips and records it.

    images, split, classes, box_format: as of `qskd.datasets.formats.opening.open_dataset`.
    """
    from rich.markup import escape
    from rich.progress import Progress

    from qskd.datasets.formats.opening import open_dataset
    from qskd.datasets.shards import write_shards

    dataset = open_dataset(annotations, images, on_error, split=split, classes=classes, box_format=box_format)
    with Progress(disable=quiet, transient=True) as progress:
        task = progress.add_task(escape(f"{one_line(annotations.name)} → {one_line(destination)}"), total=len(dataset))
        return write_shards(
            dataset,
            destination,
            rows_per_shard=rows_per_shard,
            overwrite=overwrite,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def describe(manifest: Manifest, destination: str) -> str:
    """What `qskd prepare` says when it is done."""
    size_mb = sum(shard.bytes for shard in manifest.shards) / 2**20
    lines = [
        f"{destination}: {manifest.num_images} images, {manifest.num_objects} objects ({manifest.num_crowds} crowds), "
        f"{len(manifest.categories)} categories, {len(manifest.shards)} shard(s), {size_mb:.1f} MiB",
        "category id → class: "
        + ", ".join(
            f"{category.id}→{index} {one_line(category.name)}" for index, category in enumerate(manifest.categories)
        ),
    ]
    if manifest.problems:
        lines.append(f"{len(manifest.problems)} problem(s), all in {destination}/manifest.json; the first:")
        lines += [f"  {shown_value(problem)}" for problem in manifest.problems[:3]]
    return escaped("\n".join(lines))


if __name__ == "__main__":
    run(command, "prepare")
