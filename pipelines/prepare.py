"""COCO JSON and a folder of images, or a dataset in another format -> Parquet shards (`qskd prepare`).

python -m pipelines.prepare annotations.json images/ shards/
python -m pipelines.prepare data.yaml shards/train --split train
python -m pipelines.prepare --unlabeled photos/ shards/photos --not-in shards/val
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
    from qskd.datasets.shards import SampleSource

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
            help="COCO JSON (instances), YOLO's data.yaml, or a folder with Pascal VOC or a Hugging Face dataset; on a local disk. "
            "With --unlabeled: a folder of pictures, or a text file that lists some. Or a selection of labelled shards.",
        ),
    ],
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGES] DESTINATION",
            help="IMAGES: local folder that the JSON's file names, or a list's lines, are relative to; other formats need none. "
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
    unlabeled: Annotated[
        bool, typer.Option("--unlabeled", help="The pictures have no labels: for data.unlabeled of a distillation.")
    ] = False,
    not_in: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="With --unlabeled: pictures that are in this shard folder too, byte for byte, are broken ones (--on-error).",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Of shards, or a selection of `qskd select`: gather these too (shards or selections), classes joined by name; "
            "repeatable.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Turn COCO JSON and a folder of images into Parquet shards, and say what looks wrong in them."""
    from qskd.datasets.findings.finding import refuse
    from qskd.datasets.shards import outlined, replaceable
    from qskd.storage.places import check_uri

    policy = one_of("--on-error", on_error, "stop", "skip")
    drawn = one_of("--exif", exif, "auto", "upright", "stored")
    images, destination = _images_and_destination(annotations, places)
    if accept and not strict:
        raise QskdError(f"--accept {accept[0]}", "has no effect without --strict", "both, or neither", "add --strict")
    if dry_run:
        check_uri(destination)
        dataset = opened(
            *(annotations, images, policy, leave_out or (), drawn, split, classes, box_format, unlabeled, not_in or ()),
            also=also or (),
        )
        replaceable(dataset, destination, overwrite)
        shards, what = -(-len(dataset) // rows_per_shard), f"{len(dataset.categories)} categories"
        what = "no labels" if unlabeled else what
        tell(f"{len(dataset)} images, {what} → {shards} shard(s) in {destination}")
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
        unlabeled=unlabeled,
        not_in=not_in or (),
        also=also or (),
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
    unlabeled: bool = False,
    not_in: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Manifest:
    """Write the shards, with a bar to watch unless `quiet`. Raises QskdError at the first problem, or skips and records it; when
    `strict`, for what looks wrong and is not named in `accept` too. leave_out: categories, by name. unlabeled: `annotations` is a
    folder of pictures, or a list; not_in: shard folders whose pictures it may not have. also: shards or selections
    that are gathered with `annotations`, which is one of these then."""
    from pipelines.reporting.board import progress
    from qskd.datasets.packing import cores
    from qskd.datasets.shards import write_shards

    with progress("prepare", quiet=quiet) as row:
        row.stage(f"reading {one_line(annotations.name)}")
        dataset = opened(
            *(annotations, images, on_error, leave_out, exif, split, classes, box_format, unlabeled, not_in),
            also=also,
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


def opened(
    source: Path,
    images: Path | None,
    on_error: Literal["stop", "skip"],
    leave_out: Sequence[str],
    exif: Literal["auto", "upright", "stored"],
    split: str | None,
    classes: Path | None,
    box_format: str | None,
    unlabeled: bool,
    not_in: Sequence[str],
    also: Sequence[str] = (),
) -> SampleSource:
    """The dataset that the options name. QskdError for an option that has nothing to act on."""
    from qskd.datasets.findings.leaving_out import without
    from qskd.datasets.gathered import GatheredShards, is_gathered

    if also or (not unlabeled and source.is_file() and is_gathered(source)):
        of_files = {"--split": split, "--classes": classes, "--box-format": box_format, "--not-in": list(not_in)}
        of_files |= {
            "--exif": None if exif == "auto" else exif,
            "--unlabeled": "given" if unlabeled else None,
            "IMAGES": images,
        }
        for option, value in of_files.items():
            if value:
                raise QskdError(option, str(value), "no such thing for shards that are made already", "leave it away")
        return without(GatheredShards([str(source), *also], on_error), leave_out)
    if not unlabeled:
        from qskd.datasets.formats.opening import open_dataset

        if not_in:
            raise QskdError(
                "--not-in", not_in[0], "--unlabeled beside it", "two labelled splits are compared by `qskd train`"
            )
        labelled = open_dataset(
            source, images, on_error, split=split, classes=classes, box_format=box_format, exif=exif
        )
        return without(labelled, leave_out)
    from qskd.datasets.unlabeled.known import pictures_in
    from qskd.datasets.unlabeled.pictures import UnlabeledDataset

    of_labels = {"--split": split, "--classes": classes, "--box-format": box_format, "--leave-out": list(leave_out)}
    of_labels["--exif"] = None if exif == "auto" else exif
    for option, value in of_labels.items():
        if value:
            raise QskdError(option, str(value), "no such thing for pictures without labels", "leave it away")
    pictures = UnlabeledDataset(source, images, on_error, pictures_in(not_in))
    pictures.read_shards += tuple(not_in)
    return pictures


def describe(manifest: Manifest, destination: str) -> str:
    """What `qskd prepare` says when it is done."""
    size_mb = sum(shard.bytes for shard in manifest.shards) / 2**20
    stored = f"{len(manifest.shards)} shard(s), {size_mb:.1f} MiB"
    if not manifest.labelled:
        lines = [f"{destination}: {manifest.num_images} images without labels, {stored}"]
    else:
        lines = [
            f"{destination}: {manifest.num_images} images, {manifest.num_objects} objects ({manifest.num_crowds} crowds), "
            f"{len(manifest.categories)} categories, {stored}",
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
