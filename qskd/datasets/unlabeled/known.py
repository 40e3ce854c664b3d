"""Which pictures are in shards already, by what their files hold."""

from __future__ import annotations

from collections.abc import Sequence

from qskd.datasets.findings.splits import picture_rows, unpacked_pictures
from qskd.datasets.findings.survey import content_of
from qskd.datasets.shards import ShardReader


def pictures_in(folders: Sequence[str]) -> dict[int, str]:
    """`content_of` each picture in these shard folders -> where it is. The manifest has them, unless it was cut or is old: then
    the pictures are read."""
    found: dict[int, str] = {}
    for uri in folders:
        reader = ShardReader(uri)
        kept = reader.manifest.pictures
        whole = len(picture_rows(kept)) == reader.manifest.num_images  # of a picture that is there twice both rows
        contents = unpacked_pictures(kept) if whole else _read(reader)
        for content, image_id in contents.items():
            found.setdefault(content, f"image {image_id} of {uri}")
    return found


def _read(reader: ShardReader) -> dict[int, int]:
    found: dict[int, int] = {}
    for shard, rows in enumerate(reader.manifest.shard_rows):
        first = 0
        while first < rows:
            group = reader.group_rows(shard, first)
            for sample in reader.read(shard, list(group), ["image_id", "encoded"]):
                found[content_of(sample.encoded)] = sample.image_id
            first = group.stop
    return found
