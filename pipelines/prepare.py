"""COCO JSON and a folder of images, or a dataset in another format -> Parquet shards (`qskd prepare`).

python -m pipelines.prepare annotations.json images/ shards/
python -m pipelines.prepare data.yaml shards/train --split train
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.command import DryRun, local_path, one_of, run
from pipelines.run.logs import tell
from qskd.errors import QskdError
from qskd.printable import escaped, one_line, shown_value

if TYPE_CHECKING:
    from qskd.datasets.findings.finding import Finding
    from qskd.datasets.manifest import Manifest

Drawn = Annotated[
    str,
    typer.Option(
        help="Where EXIF turns a picture, its boxes refer to the upright or the stored one. auto: as the JSON's size says, "
        "where it can't tell as the other turned pictures' sizes say, else upright."
    ),
]
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
    exif: Drawn = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards made from another source.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="What looks wrong is an error; no shards are made.")] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What --strict lets pass, by the finding's name; repeatable."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="CATEGORY", help="Leave a category out, with its annotations, by its name; repeatable."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Turn COCO JSON and a folder of images into Parquet shards, and say what looks wrong in them."""
    from qskd.datasets.findings.finding import refuse
    from qskd.datasets.findings.leaving_out import without
    from qskd.datasets.formats.opening import open_dataset
    from qskd.datasets.shards import outlined
    from qskd.storage.places import check_uri

    policy = one_of("--on-error", on_error, "stop", "skip")
    drawn = one_of("--exif", exif, "auto", "upright", "stored")
    images, destination = _images_and_destination(annotations, places)
    if dry_run:
        check_uri(destination)
        dataset = without(
            open_dataset(annotations, images, policy, split=split, classes=classes, box_format=box_format, exif=drawn),
            leave_out or (),
        )
        shards = -(-len(dataset) // rows_per_shard)
        tell(f"{len(dataset)} images, {len(dataset.categories)} categories → {shards} shard(s) in {destination}")
        findings = outlined(dataset)  # pictures are not looked at
        tell("\n".join(looks_wrong(findings)))
        if strict:
            refuse(findings, str(annotations), accept or ())
        return
    manifest = prepare(
        annotations,
        images,
        destination,
        rows_per_shard,
        policy,
        overwrite,
        False,
        strict,
        accept or (),
        leave_out or (),
        exif=drawn,
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
    strict: bool = False,
    accept: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    exif: Literal["auto", "upright", "stored"] = "auto",
    split: str | None = None,
    classes: Path | None = None,
    box_format: str | None = None,
) -> Manifest:
    """Write the shards, with a bar to watch unless `quiet`. Raises QskdError at the first problem, or skips and records it; when
    `strict`, for what looks wrong and is not named in `accept` too. leave_out: categories, by name."""
    from pipelines.reporting.board import progress
    from qskd.datasets.findings.leaving_out import without
    from qskd.datasets.formats.opening import open_dataset
    from qskd.datasets.packing import cores
    from qskd.datasets.shards import write_shards

    with progress("prepare", quiet=quiet) as row:
        row.stage(f"reading {one_line(annotations.name)}")
        dataset = without(
            open_dataset(annotations, images, on_error, split=split, classes=classes, box_format=box_format, exif=exif),
            leave_out,
        )
        row.shown.total = len(dataset)
        return write_shards(
            dataset,
            destination,
            rows_per_shard=rows_per_shard,
            overwrite=overwrite,
            progress=lambda done, total: row.at(done),
            strict=strict,
            accept=accept,
            processes=cores(),
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
    if manifest.picture_counts is not None:
        lines += manifest.picture_counts.lines()
    if manifest.problems:
        lines.append(f"{len(manifest.problems)} problem(s), all in {destination}/manifest.json; the first:")
        lines += [f"  {shown_value(problem)}" for problem in manifest.problems[:3]]
    return escaped("\n".join([*lines, *looks_wrong(manifest.findings)]))


def looks_wrong(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines."""
    if not findings:
        return ["nothing looks wrong"]
    lines = [f"  {line}" for finding in findings for line in finding.lines()]
    return [f"{len(findings)} thing(s) look wrong (--strict makes that an error):", *lines]


if __name__ == "__main__":
    run(command, "prepare")
