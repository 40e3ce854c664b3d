"""Reading what others made: only safetensors, every key accounted for, every failure told with its remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from torch import Tensor
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from qskd.checkpoints.clean_config import detector_config
from qskd.checkpoints.files import (
    CONVERT,
    ONLY_SAFETENSORS,
    check_sizes,
    checkpoint_file,
    headers_of,
    read_headers,
    read_weights,
    weight_files,
)
from qskd.checkpoints.graphs import is_graph, read_graph
from qskd.checkpoints.json_files import first_line, read_json_file
from qskd.errors import QskdError
from qskd.redaction import redacted
from qskd.storage.models import local_model


def uri_refused(uri: str, field: str = "") -> QskdError:
    """What is said of a checkpoint's URI, where it is read from a disk. field: of the recipe, that has it."""
    remedy = "copy it to a local disk first, for example with `aws s3 sync`"
    where, found = (field, f"{redacted(uri)}, a URI") if field else (redacted(uri), "a URI")
    return QskdError(where, found, "a local folder or a Hub name", remedy)


def check_path(path: str | Path, weights: bool = True) -> str:
    """Refuse what is plainly meant as a folder and is none, or holds no safetensors, before a Hub is asked for it.

    weights=False: a folder without any will do. Returns the folder, of a run's its student's, or the Hub name as it is.
    """
    if not str(path):
        raise QskdError("checkpoint", "an empty path", "a folder saved by transformers, or a Hub name")
    if "://" in str(path):
        raise uri_refused(str(path))
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix.lower() == ".json":
        raise QskdError(
            str(path),
            "a JSON file, and no detector that can be run",
            "a folder saved by transformers, or a Hub name",
            "detections in such a file can teach: teacher.path of a recipe, with teacher.cache.path (docs/teachers.md)",
        )
    if is_graph(path):
        raise QskdError(
            str(path),
            "an ONNX file, of which no part can be a student's",
            "a folder saved by transformers, or a Hub name",
            "a detector in an ONNX file can teach, label, predict and be evaluated (docs/teachers.md)",
        )
    if not folder.is_dir():
        # "student" is what a run calls its own: a mistyped run, of which no Hub need hear, nor see the user's token.
        named = str(path)
        if named.startswith(("/", ".", "~")) or named.count("/") > 1 or named.rpartition("/")[2] == "student":
            raise QskdError(str(path), "no such folder", "a folder saved by transformers, or a Hub name")
        return str(path)
    folder = Path(local_model(str(folder)))
    if not (folder / "config.json").is_file():
        raise QskdError(
            str(path), "no config.json", "a folder saved by save_pretrained (config.json, model.safetensors)"
        )
    if not weights or any(folder.glob("*.safetensors")):
        return str(folder)
    pickles = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    raise QskdError(
        str(path),
        f"no safetensors, only {', '.join(pickles)}" if pickles else "no weights",
        ONLY_SAFETENSORS,
        CONVERT,
    )


def read_said(path: str) -> tuple[dict[str, Any], str]:
    """What a checkpoint's config.json says, as it is (nothing of it may go to transformers), and the file's name for messages.

    path: as `check_path` gives it.
    """
    with reading(path):
        file = checkpoint_file(path, CONFIG_NAME)
    if file is None and not Path(path).is_dir():
        tried = "HF_HUB_OFFLINE keeps it from being asked" if is_offline_mode() else "it was asked"
        raise QskdError(
            path,
            f"no folder here, and as a Hub name nothing with a {CONFIG_NAME} ({tried})",
            "a folder saved by transformers, or a Hub name such as owner/model",
            "check the path, from the folder that the command is given in; download what the Hub has, or unset HF_HUB_OFFLINE",
        )
    if file is None:
        raise QskdError(path, f"no {CONFIG_NAME}", "a checkpoint of transformers")
    return read_json_file(file), f"{path}/{CONFIG_NAME}"


def read_config(path_or_name: str | Path) -> Any:
    """transformers' configuration of a checkpoint of any supported family, clean (`clean_config`), or what stands for it of an ONNX
    file. Reads no weights."""
    if is_graph(path_or_name):
        return read_graph(path_or_name).config
    return detector_config(*read_said(check_path(path_or_name, weights=False)))


def load_model(
    model_class: Any, config: Any, path: str, state: dict[str, Tensor] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with a checkpoint's weights, in float32, and what from_pretrained says of their names.

    config: clean. state: the weights, where they are read already. transformers is given no path and no name, only tensors:
    so it looks for no other file beside them (adapters, generation settings, code) and asks the Hub for nothing.
    """
    with reading(path), quiet():
        if state is None:
            check_sizes(model_class, config, read_headers(weight_files(path)), path)
            state = read_weights(path)
        else:
            check_sizes(model_class, config, headers_of(state), path)
        loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
            None, state_dict=state, config=config, dtype=torch.float32, output_loading_info=True
        )
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notes of transformers; errors still come through."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what transformers raises on a bad or unreachable checkpoint into a QskdError."""
    try:
        yield
    except QskdError:
        raise
    except Exception as error:
        remedy = "give a folder saved by transformers, or a Hub name that can be reached and has safetensors"
        if "size mismatch" in str(error) or "mismatched" in str(error):
            remedy = "config.json and model.safetensors are of different models: save them again together"
        raise QskdError(str(path), f"cannot be loaded: {first_line(error)}", "", remedy) from error


def check_keys(
    path: str | Path, info: dict[str, Any], ignore: Sequence[str] = (), what: str = "what its config.json describes"
) -> list[str]:
    """Stop on missing or unexpected weights as reported by from_pretrained(output_loading_info=True).

    Returns the unexpected keys that were ignored: those starting with one of `ignore`. Batch counters are no weights.
    """
    missing = sorted(info["missing_keys"])
    surplus = sorted(key for key in info["unexpected_keys"] if not key.endswith("num_batches_tracked"))
    ignored = [key for key in surplus if key.startswith(tuple(ignore))]
    unexpected = [key for key in surplus if key not in ignored]
    if missing or unexpected:

        def first(keys: list[str]) -> str:
            return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"

        raise QskdError(
            str(path),
            f"weights missing: {first(missing)}; unexpected: {first(unexpected)}",
            f"exactly the weights that {what} has",
            "the file is of another model or of another version of it: save the checkpoint again with save_pretrained",
        )
    return ignored


def check_timm(path: str | Path, config: Any) -> None:
    """Refuse a checkpoint whose backbone is timm's, and no ordinary ResNet, when timm is not there."""
    backbone = getattr(config, "backbone_config", None)
    if getattr(backbone, "model_type", "") == "timm_backbone" and not importlib.util.find_spec("timm"):
        raise QskdError(
            str(path),
            f"its backbone is timm's {getattr(backbone, 'backbone', '?')}, and timm is not installed",
            "a backbone of transformers, timm's ResNet-18, 34, 50, 101 or 152 (read without timm), or timm",
            "pip install timm (it needs torchvision), or choose another checkpoint",
        )
