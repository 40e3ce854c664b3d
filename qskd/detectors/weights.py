"""Reading what others made: only safetensors, every key accounted for, every failure told with its remedy."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from qskd.detectors.families import find_family
from qskd.detectors.timm_resnet import spell_out
from qskd.errors import QskdError
from qskd.stores import redacted

_ONLY_SAFETENSORS = "model.safetensors (a pickle can run code when it is read, so none is)"
_CONVERT = (
    "where you trust the file: AutoModelForObjectDetection.from_pretrained(path, use_safetensors=False)"
    ".save_pretrained(new_folder), which writes safetensors"
)


def uri_refused(uri: str, field: str = "") -> QskdError:
    """What is said of a checkpoint's URI, where it is read from a disk. field: of the recipe, that has it."""
    remedy = "copy it to a local disk first, for example with `aws s3 sync`"
    where, found = (field, f"{redacted(uri)}, a URI") if field else (redacted(uri), "a URI")
    return QskdError(where, found, "a local folder or a Hub name", remedy)


def check_path(path: str | Path, weights: bool = True) -> str:
    """Refuse what is plainly meant as a folder and is none, or holds no safetensors, before a Hub is asked for it.

    weights=False: a folder without any will do. Returns the folder, or the Hub name as it is.
    """
    if not str(path):
        raise QskdError("checkpoint", "an empty path", "a folder saved by transformers, or a Hub name")
    if "://" in str(path):
        raise uri_refused(str(path))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1:
            raise QskdError(str(path), "no such folder", "a folder saved by transformers, or a Hub name")
        return str(path)
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
        _ONLY_SAFETENSORS,
        _CONVERT,
    )


def weight_files(path: str) -> list[Path]:
    """A checkpoint's safetensors files; `path` as `check_path` gives it. Refuses a Hub repository that has none."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    found = [cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in names]
    if None in found:
        raise QskdError(path, f"no {names[found.index(None)]} in it", _ONLY_SAFETENSORS, _CONVERT)
    return [Path(str(file)) for file in found]


def read_weights(path: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state |= load_file(file)
    return state


def read_config(path_or_name: str | Path) -> Any:
    """transformers' configuration of a checkpoint of any supported family. Reads no weights."""
    path = check_path(path_or_name, weights=False)
    with reading(path):
        said = PreTrainedConfig.get_config_dict(path)[0]
    find_family(said.get("model_type", "unknown"), path)
    with reading(path):
        return CONFIG_MAPPING[said["model_type"]].from_dict(spell_out(said))


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
        text = str(error).strip().splitlines()
        remedy = "give a folder saved by transformers, or a Hub name that can be reached and has safetensors"
        if "size mismatch" in str(error) or "mismatched" in str(error):
            remedy = "config.json and model.safetensors are of different models: save them again together"
        raise QskdError(
            str(path), f"cannot be loaded: {text[0] if text else type(error).__name__}", "", remedy
        ) from error


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
    if getattr(config.backbone_config, "model_type", "") == "timm_backbone" and not importlib.util.find_spec("timm"):
        raise QskdError(
            str(path),
            f"its backbone is timm's {getattr(config.backbone_config, 'backbone', '?')}, and timm is not installed",
            "a backbone of transformers, timm's ResNet-18, 34, 50, 101 or 152 (read without timm), or timm",
            "pip install timm (it needs torchvision), or choose another checkpoint",
        )
