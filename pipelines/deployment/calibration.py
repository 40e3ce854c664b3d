"""Images for an exported graph: those that INT8 is calibrated with, and labelled ones that AP is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.inspection.predict import read_image
from pipelines.inspection.sources import IMAGE_ENDINGS
from qskd.checks import check_shards
from qskd.config import ViewConfig
from qskd.datasets.classes import NOBODY, map_classes, model_side
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import MANIFEST, Manifest, check_labelled, load_manifest
from qskd.datasets.views import View, view_image
from qskd.deploy.side_by_side import Pictures, Truth
from qskd.detectors import Detector, Preprocessing, to_pixels
from qskd.errors import QskdError
from qskd.from_recipe import ground_truth

MOST_CALIBRATION = 64  # more changed no AP (docs/export.md)
KEEP_BYTES = 2**28  # of encoded rows


class ShardImages:
    """Shards as a graph takes them, by number through all of them."""

    def __init__(self, uri: str, manifest: Manifest, seen_as: Preprocessing) -> None:
        self.uri, self.manifest, self._seen_as = uri, manifest, seen_as
        self._loader = BatchLoader("", uri, ViewConfig(), seen_as.resize, None, KEEP_BYTES)
        self._starts = np.cumsum([0, *manifest.shard_rows])

    def __len__(self) -> int:
        return self.manifest.num_images

    def load(self, numbers: Sequence[int]) -> Pictures:
        """Those of these numbers, in this order."""
        wanted = np.asarray(numbers)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        rows = np.stack([shards, wanted - self._starts[shards], np.zeros_like(wanted)], 1).astype(np.int32)
        arrays = self._loader.load("val", rows)
        images, sizes = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["sizes"])
        pixels, _ = to_pixels(images, sizes, self._seen_as.mean, self._seen_as.std)
        return Pictures(pixels.numpy(), arrays["image_ids"], arrays["original_sizes"])

    def all(self, batch: int = 16) -> Iterator[Pictures]:
        for start in range(0, len(self), batch):
            yield self.load(range(start, min(start + batch, len(self))))


class FileImages:
    """Image files as a graph takes them."""

    def __init__(self, files: Sequence[Path], seen_as: Preprocessing) -> None:
        self._files, self._seen_as = files, seen_as

    def __len__(self) -> int:
        return len(self._files)

    def load(self, numbers: Sequence[int]) -> Pictures:
        """Those of these numbers, in this order."""
        resize = self._seen_as.resize
        pixels = np.stack([view_image(read_image(self._files[number]), View.IDENTITY, resize) for number in numbers])
        sizes = torch.full((len(pixels), 2), resize.size)
        values, _ = to_pixels(torch.from_numpy(pixels), sizes, self._seen_as.mean, self._seen_as.std)
        return Pictures(values.numpy())


class Calibration:
    """At most so many of the images, spread evenly over all of them, as batches that a graph takes (`reduced.Images`)."""

    def __init__(self, images: ShardImages | FileImages, batch: int, most: int = MOST_CALIBRATION) -> None:
        count = min(most, len(images))
        self._images, self._batch = images, batch
        self._numbers = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()

    @property
    def count(self) -> int:
        """Of images."""
        return len(self._numbers)

    def __len__(self) -> int:
        return -(-self.count // self._batch)

    def __getitem__(self, number: int) -> np.ndarray:
        some = self._numbers[number * self._batch : (number + 1) * self._batch]
        return self._images.load([*some, *[some[-1]] * (self._batch - len(some))]).pixels

    def pictures(self) -> Iterator[Pictures]:
        """Each once."""
        for number in self._numbers:
            yield self._images.load([number])


def is_shards(given: str) -> bool:
    return "://" in given or (Path(given) / MANIFEST).is_file()


def images_to_calibrate(given: Sequence[str], seen_as: Preprocessing) -> ShardImages | FileImages:
    """given: one shard folder, labelled or not; or image files and folders. QskdError for none, and for a folder without any."""
    if not given:
        raise QskdError(
            "--int8",
            "no images to calibrate with",
            "some tens of images as the detector will see: their activations say what range 8 bits stand for",
            "--calibration SHARDS (the folder of `qskd prepare` that it was trained on), or --calibration PHOTOS",
        )
    if any(is_shards(one) for one in given):
        if len(given) > 1:
            raise QskdError("--calibration", f"{len(given)} places, shards among them", "one shard folder, or images")
        manifest = load_manifest(given[0])
        check_shards(given[0], manifest)
        if not manifest.num_images:
            raise QskdError(given[0], "shards without images", "images to calibrate INT8 with")
        return ShardImages(given[0], manifest, seen_as)
    files: list[Path] = []
    for path in map(Path, given):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        some = [file for file in inside if file.suffix.lower() in IMAGE_ENDINGS] if path.is_dir() else inside
        if not path.exists():
            raise QskdError(str(path), "no such file or folder", "images to calibrate INT8 with", "check the path")
        if not some or not all(file.is_file() for file in some):
            raise QskdError(
                str(path),
                "no images to calibrate INT8 with",
                f"a shard folder, or files that end in {', '.join(IMAGE_ENDINGS)}",
                "--calibration SHARDS, or a folder of photographs",
            )
        files += some
    for file in files[:1]:  # complain before minutes are spent on the graph
        read_image(file)
    return FileImages(files, seen_as)


def labelled_images(uri: str, model: str, detector: Detector, seen_as: Preprocessing) -> tuple[ShardImages, Truth]:
    """What AP is measured on. model: as the user named it. QskdError for shards that nobody labelled or of other classes."""
    manifest = load_manifest(uri)
    check_labelled(uri, manifest)
    check_shards(uri, manifest)
    slots = map_classes(manifest.labels, detector.labels, {}, model_side(model))
    known = [(slot, one.id) for slot, one in zip(slots, manifest.categories, strict=True) if slot != NOBODY]
    truth = Truth(ground_truth(uri), [number for _, number in known], [slot for slot, _ in known])
    return ShardImages(uri, manifest, seen_as), truth
