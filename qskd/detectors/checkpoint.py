"""Detectors from and to plain Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file

from qskd.config import ResizeConfig
from qskd.detectors.backbone import ThawedBatchNorm2d
from qskd.detectors.detector import Detector
from qskd.detectors.families import FAMILIES, find_family
from qskd.detectors.preprocessing import Channels, Preprocessing
from qskd.detectors.timm_resnet import dilate, find_timm, is_dilated, rename, resnet_config
from qskd.detectors.weights import (
    check_keys,
    check_path,
    check_timm,
    quiet,
    read_config,
    read_weights,
    reading,
    weight_files,
)
from qskd.durable import sync_folder, sync_tree
from qskd.errors import QskdError
from qskd.files import sha256_of

log = logging.getLogger(__name__)

EXTRA_FILE = "qskd.json"


def load_detector(path_or_name: str | Path) -> Detector:
    """A detector of any supported family from a folder or the Hub, in eval mode, float32.

    Only safetensors are read, and every weight must be there and expected. A timm ResNet becomes transformers' own, with
    the same outputs; timm is not needed. Raises QskdError otherwise.
    """
    path, config = check_path(path_or_name), read_config(path_or_name)
    family = find_family(config.model_type, path)
    timm = find_timm(config)
    if timm is None:
        check_timm(path, config)
    config.auxiliary_loss = False
    if hasattr(config, "decoder_layerdrop"):
        config.decoder_layerdrop = 0.0  # a dropped layer would say nothing, and every layer is asked
    with reading(path), quiet():
        given: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if timm is not None:
            state = rename(read_weights(path), path)
            config.backbone_config = resnet_config(state, timm, path)
            given = {"pretrained_model_name_or_path": None, "state_dict": state}
        else:
            weight_files(path)  # says what to do where there are none
        model, info = family.model_class.from_pretrained(
            **given, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    kinds = [kind for kind in config.architectures or [] if kind != family.model_class.__name__]
    of_another = f" (config.json names a {kinds[0]})" if kinds else ""
    check_keys(path, info, what=f"a {family.model_class.__name__}{of_another}")
    if timm is not None:
        log.info("%s: timm's %s read as transformers' ResNet", path, timm.name)
        dilate(family.backbone(model).get_submodule("model"), timm.output_stride, path)
    return Detector(model).eval()


def checkpoint_digests(path_or_name: str | Path) -> dict[str, str]:
    """sha256 of a checkpoint's weights (its safetensors files) and of what its configuration says. No weights are loaded.

    The version of transformers that wrote the configuration, and the place it was read from, don't count.
    """
    path = check_path(path_or_name)
    with reading(path):
        files = weight_files(path)
        said = json.loads(Path(str(cached_file(path, CONFIG_NAME))).read_text())
    weights = hashlib.sha256("".join(sha256_of(open(file, "rb")) for file in files).encode()).hexdigest()  # noqa: SIM115
    meaning = {key: value for key, value in said.items() if key not in ("transformers_version", "_name_or_path")}
    config = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    return {"teacher.weights_sha256": weights, "teacher.config_sha256": config}


@contextmanager
def replacing(folder: str | Path, durable: bool = True) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`: that appears whole or not at all. durable: also after
    a power cut, which costs a wait for the disk.

    A detector's folder that is there already is replaced, any other that is not empty is refused (QskdError).
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise QskdError(str(target), "a file", "a folder to save to")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise QskdError(str(target), "a folder with other things in it", "a new, an empty or a detector's folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        if durable:
            sync_tree(fresh)
        stale = fresh.with_suffix(".old")
        if target.exists():
            os.rename(target, stale)
        os.rename(fresh, target)
        if durable:
            sync_folder(target.parent)
        shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def save_detector(
    detector: Detector,
    folder: str | Path,
    resize: ResizeConfig,
    extra: dict[str, Any] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    durable: bool = True,
) -> None:
    """Write a folder that plain transformers loads: weights, config.json and the image processor with `resize`, and with
    `mean` and `std` (the detector's own where they are not given).

    `extra` (JSON values) goes to qskd.json, which transformers does not read. The folder appears whole or not at all; a
    detector's folder that is there already is replaced, any other that is not empty is refused (QskdError). durable: see
    `replacing`.
    """
    if is_dilated(detector.model):
        raise QskdError(
            str(folder),
            "a detector on a dilated ResNet (DC5)",
            "one that transformers can describe without timm",
            "choose a checkpoint without dilation; this one can be a teacher",
        )
    with replacing(folder, durable) as fresh:
        _write(detector, fresh, Preprocessing(resize, mean or detector.mean, std or detector.std))
        if extra is not None:
            (fresh / EXTRA_FILE).write_text(json.dumps(extra, indent=2, sort_keys=True) + "\n")


def _write(detector: Detector, folder: Path, preprocessing: Preprocessing) -> None:
    thawed = {
        f"{name}.num_batches_tracked"
        for name, module in detector.model.named_modules()
        if isinstance(module, ThawedBatchNorm2d)
    }
    state = {name: value for name, value in detector.model.state_dict().items() if name not in thawed}
    with quiet():
        detector.model.save_pretrained(folder, state_dict=state)
        FAMILIES[detector.family].processor_class(
            size=processor_size(preprocessing.resize),
            do_pad=preprocessing.resize.mode != "square",  # a square batch has nothing to pad
            do_normalize=True,  # RT-DETR's processor would not
            image_mean=list(preprocessing.mean),
            image_std=list(preprocessing.std),
        ).save_pretrained(folder)


def processor_size(resize: ResizeConfig) -> dict[str, int]:
    """A resize as transformers' image processors write it."""
    if resize.mode == "square":
        return {"height": resize.size, "width": resize.size}
    return {"shortest_edge": resize.size, "longest_edge": resize.longest}
