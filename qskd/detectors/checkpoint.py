"""Detectors from and to plain Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from qskd.checkpoints.files import checkpoint_file, read_weights, weight_files
from qskd.checkpoints.graphs import is_graph, read_graph
from qskd.checkpoints.json_files import shown
from qskd.checkpoints.preprocessing import Channels, Preprocessing
from qskd.checkpoints.timm_resnet import dilate, find_timm, is_dilated, rename, resnet_config
from qskd.checkpoints.weights import (
    check_keys,
    check_path,
    check_timm,
    load_model,
    quiet,
    read_config,
    read_said,
    reading,
)
from qskd.config import ResizeConfig
from qskd.detectors.backbone import ThawedBatchNorm2d
from qskd.detectors.detector import Detector, labels_of
from qskd.detectors.norms import keep_precision
from qskd.detectors.teachers.asked import AskedDetector
from qskd.detectors.teachers.boxes import BoxesDetector
from qskd.detectors.teachers.graph import GraphDetector
from qskd.detectors.teachers.prompt import TOKENIZER, Prompt, make_prompt
from qskd.errors import QskdError, writing
from qskd.families.facts import TEACHERS_ONLY
from qskd.families.table import FAMILIES, TEACHERS, find_family
from qskd.quantization import files as quantization
from qskd.quantization.files import restore_quantisers
from qskd.quantization.model import FIELD
from qskd.storage.durable import sync_folder, sync_tree
from qskd.storage.files import sha256_of
from qskd.storage.ownership import EXTRA_FILE, check_replaceable, foreign_to_detector, remove_own_detector_files

log = logging.getLogger(__name__)


def load_detector(path_or_name: str | Path, quantised: bool = True, words: Sequence[str] = ()) -> Detector:
    """A detector of any supported family from a folder or the Hub, in eval mode, float32.

    Only safetensors are read, and every weight must be there and expected. A timm ResNet becomes transformers' own, with
    the same outputs; timm is not needed. A quantised student has its quantisers again, as it was trained; quantised=False: its
    weights alone, as plain transformers loads them. words: what a detector that has no classes of its own is asked for
    (`words_for`); of others without effect. Raises QskdError otherwise.
    """
    if is_graph(path_or_name):
        return GraphDetector(read_graph(path_or_name)).eval()
    path, config = check_path(path_or_name), read_config(path_or_name)
    family = find_family(config.model_type, path)
    prompt = make_prompt(path, config, words) if family.asked_in_words else None
    timm = find_timm(config)
    if timm is None:
        check_timm(path, config)
    config.auxiliary_loss = False
    if getattr(config, "anchor_image_size", None) is not None:
        config.anchor_image_size = None  # transformers keeps those anchors, in evaluation, for images of every size
    if hasattr(config, "decoder_layerdrop"):
        config.decoder_layerdrop = 0.0  # a dropped layer would say nothing, and every layer is asked
    state = None
    if timm is not None:
        with reading(path):
            state = rename(read_weights(path), path)
            config.backbone_config = resnet_config(state, timm, path)
    model, info = load_model(family.model_class, config, path, state)
    kinds = [kind for kind in config.architectures or [] if kind != family.model_class.__name__]
    of_another = f" (config.json names a {kinds[0]})" if kinds else ""
    what = f"a {family.model_class.__name__}{of_another}"
    left = check_keys(path, info, ignore=family.other_weights, what=what)
    if left:
        log.info("%s: %d weights of another task are left out", path, len(left))
    if timm is not None:
        log.info("%s: timm's %s read as transformers' ResNet", path, timm.name)
        dilate(family.trunk(model), timm.output_stride, path)
    keep_precision(model)
    family.drop_unused(model)
    if quantised and (file := quantisers_file(path)) is not None:
        restore_quantisers(model, file)
    if prompt is not None:
        return AskedDetector(model, prompt).eval()
    return (BoxesDetector(model) if family.boxes_alone else Detector(model)).eval()


def classes_of(path_or_name: str | Path, words: Sequence[str] = ()) -> tuple[str, ...]:
    """Class names by slot, as `load_detector` with the same arguments has them. Reads no weights."""
    return tuple(words) if asked_in_words(path_or_name) else labels_of(read_config(path_or_name))


def check_classes(path_or_name: str | Path, classes: Sequence[str]) -> None:
    """QskdError where a detector is told what to look for that has classes of its own."""
    if classes and not asked_in_words(path_or_name):
        raise QskdError(
            "--classes",
            f"{', '.join(classes)}, and {path_or_name}, which has classes of its own",
            "a detector that is asked in words, such as Grounding DINO",
            "leave it out",
        )


def prompt_of(path_or_name: str | Path, words: Sequence[str]) -> Prompt:
    """What such a detector is asked for these words, text by text. Reads its tokenizer, and no weights."""
    return make_prompt(check_path(path_or_name), read_config(path_or_name), words)


def asked_in_words(path_or_name: str | Path) -> bool:
    """Whether a checkpoint is of a detector that finds what it is asked for, and has no classes of its own. Reads no weights."""
    return find_family(read_config(path_or_name).model_type, str(path_or_name)).asked_in_words


def quantisers_file(path: str) -> Path | None:
    """The file with a quantised student's quantisers; None of a model in float. path: as `check_path` gives it. QskdError where
    config.json says that there is one, and it isn't there."""
    said, where = read_said(path)
    if not said.get(FIELD):
        return None
    with reading(path):
        file = checkpoint_file(path, quantization.FILE)
    if file is None:
        raise QskdError(
            where,
            f"a student of {shown(said[FIELD])}, and no {quantization.FILE} beside it",
            "the file with its quantisers",
            "copy the whole folder again; or load it with transformers, which reads the weights alone",
        )
    return file


@lru_cache(maxsize=64)
def _sha256_once(file: Path, size: int, changed_ns: int) -> str:
    """Of a file as it is now: a process asks for a teacher's several times, and reading gigabytes takes a while."""
    return sha256_of(file.open("rb"))


def checkpoint_digests(path_or_name: str | Path) -> dict[str, str]:
    """sha256 of a checkpoint's weights (its safetensors files) and of what its configuration says. No weights are loaded.

    The version of transformers that wrote the configuration, and the place it was read from, don't count.
    """
    if is_graph(path_or_name):
        return _graph_digests(path_or_name)
    path = check_path(path_or_name)
    with reading(path):
        files = weight_files(path)
    said, _ = read_said(path)
    quantisers = quantisers_file(path)
    with reading(path):
        tokenizer = checkpoint_file(path, TOKENIZER) if said.get("model_type") in TEACHERS else None
    files += [file for file in (quantisers, tokenizer) if file is not None]  # they decide its outputs as the weights do
    sums = [_sha256_once(file, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    weights = hashlib.sha256("".join(sums).encode()).hexdigest()
    meaning = {key: value for key, value in said.items() if key not in ("transformers_version", "_name_or_path")}
    with reading(path):  # what can be read may lie too deep to be written
        config = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    return {"teacher.weights_sha256": weights, "teacher.config_sha256": config}


def _graph_digests(path: str | Path) -> dict[str, str]:
    """Of an ONNX file, and of all that is said of it."""
    graph, file = read_graph(path), Path(path).expanduser()
    found = file.stat()
    meaning = (graph.labels, graph.softmax, graph.boxes, graph.units, graph.outputs, graph.letterbox)
    config = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
    weights = _sha256_once(file, found.st_size, found.st_mtime_ns)
    return {"teacher.weights_sha256": weights, "teacher.config_sha256": config}


@contextmanager
def replacing(folder: str | Path, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """An empty folder to fill with a detector, which then takes the place of `folder`: that appears whole or not at all.
    durable: also after a power cut, which costs a wait for the disk.

    Only a folder that is new, empty, or a detector's that qskd made is written to (QskdError). One with other things in it
    too is refused, or, with `overwrite`, its own files are replaced one after the other, config.json last, and the rest stays.
    """
    with writing(folder):
        check_replaceable(Path(folder), overwrite)
    target = Path(os.path.realpath(folder))  # a link to a folder stays one
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
    try:
        yield fresh
        _share(fresh)
        if durable:
            sync_tree(fresh)
        if overwrite and target.is_dir() and foreign_to_detector(target):
            _replace_own(fresh, target)
            return
        check_replaceable(target)  # what came while the new one was made
        stale = fresh.with_suffix(".old")
        if target.exists():
            os.rename(target, stale)
        try:
            os.rename(fresh, target)
        except OSError:
            if stale.exists():
                os.rename(stale, target)
            raise
        if durable:
            sync_folder(target.parent)
        if stale.exists():
            remove_own_detector_files(stale)
            try:
                stale.rmdir()
            except OSError:
                log.warning("%s: what others wrote into %s meanwhile was kept there", stale, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _share(fresh: Path) -> None:
    """Give files the rights that the user's umask gives a new one, as its folder has them: safetensors writes for their owner
    alone, whom a server that reads the folder need not be."""
    rights = fresh.stat().st_mode & 0o666
    for path in fresh.iterdir():
        if path.is_file():
            path.chmod(rights)


def _replace_own(fresh: Path, target: Path) -> None:
    """Without config.json the folder is no detector: half of this can't be taken for one."""
    (target / CONFIG_NAME).unlink(missing_ok=True)
    names = sorted((path.name for path in fresh.iterdir()), key=lambda name: name == CONFIG_NAME)
    remove_own_detector_files(target, keep=names)
    for name in names:
        os.replace(fresh / name, target / name)


def check_saveable(family: str, where: str) -> None:
    """QskdError of a detector that can only teach: its checkpoint is there already, and no student can be made of it."""
    if family in TEACHERS_ONLY:
        raise QskdError(
            where,
            f"a {TEACHERS_ONLY[family]}, which can only teach",
            f"a detector of {', '.join(FAMILIES)}",
            "distil a student from it (teacher.path), and save or export that",
        )


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

    `extra` (JSON values) goes to qskd.json, which transformers does not read, and which marks the folder as qskd's. The folder
    appears whole or not at all; one that qskd made is replaced, any other that is not empty is refused (QskdError). durable:
    see `replacing`.
    """
    check_saveable(detector.family, str(folder))
    if is_dilated(detector.model):
        raise QskdError(
            str(folder),
            "a detector on a dilated ResNet (DC5)",
            "one that transformers can describe without timm",
            "choose a checkpoint without dilation; this one can be a teacher",
        )
    with replacing(folder, durable=durable) as fresh:
        _write(detector, fresh, Preprocessing(resize, mean or detector.mean, std or detector.std))
        (fresh / EXTRA_FILE).write_text(json.dumps(extra or {}, indent=2, sort_keys=True) + "\n")


def _write(detector: Detector, folder: Path, preprocessing: Preprocessing) -> None:
    thawed = {
        f"{name}.num_batches_tracked"
        for name, module in detector.model.named_modules()
        if isinstance(module, ThawedBatchNorm2d)
    }
    state = {name: value for name, value in quantization.plain_state(detector.model).items() if name not in thawed}
    quantization.save_quantisers(detector.model, folder)
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
