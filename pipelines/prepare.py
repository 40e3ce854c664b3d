"""COCO JSON and a folder of images -> Parquet shards (`qskd prepare`).

python -m pipelines.prepare annotations.json images/ shards/
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.progress import Progress

from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import Manifest
from qskd.datasets.shards import write_shards
from qskd.printable import escaped, one_line, shown_value


def prepare(
    annotations: Path,
    images: Path,
    destination: str,
    rows_per_shard: int = 512,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Write the shards, with a bar to watch unless `quiet`. Raises QskdError at the first problem, or skips and records it."""
    dataset = read_coco(annotations, images, on_error)
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
    from pipelines.cli import main_of

    main_of("prepare")
