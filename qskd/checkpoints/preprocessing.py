"""From uint8 pixels to what a detector is given, as the checkpoint's image processor would do it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from qskd.checkpoints.files import checkpoint_file
from qskd.checkpoints.graph_words import words_file
from qskd.checkpoints.graphs import is_graph, read_graph
from qskd.checkpoints.json_files import read_json_file, shown
from qskd.checkpoints.weights import check_path, read_config
from qskd.config import ResizeConfig
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.precision import channels_first
from qskd.untrusted import is_number

log = logging.getLogger(__name__)
Channels = tuple[float, float, float]
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
_CORRECT = "correct its preprocessor_config.json: say how the model was trained"
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR, the filter of every DETR
_MOST_PIXELS = 8192  # of a side, as `ResizeConfig` has it
_MOST_LONGEST = 10**6  # of one that is only a limit
_LONGEST = ("longest_edge", "max_size")
_SET_RESIZE = "set teacher.resize in the config"
_SWITCHES = ("do_rescale", "do_resize", "do_normalize")
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized, and the mean and standard deviation (of values in 0..1, RGB) they are normalised with."""

    resize: ResizeConfig
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD


def read_preprocessing(folder_or_name: str | Path, resize: ResizeConfig | None = None) -> Preprocessing:
    """What a checkpoint's own image processor says; without one, with a warning, what its family's says by default.

    resize: instead of the processor's own, which is then not read. Raises QskdError when the processor asks for something
    that is not done here.
    """
    if is_graph(folder_or_name):
        return _of_graph(folder_or_name, resize)
    where = check_path(folder_or_name, weights=False)
    return _preprocessing(_processor(where), where, resize)


def _of_graph(path: str | Path, resize: ResizeConfig | None) -> Preprocessing:
    """What an ONNX file is to be given. QskdError where it does not take images of this size."""
    graph = read_graph(path)
    if graph.words is None:
        found = read_preprocessing(Path(graph.file).expanduser().parent, resize)
    else:
        own = graph.words.resizing(graph.side, str(words_file(path)))
        found = Preprocessing(resize or own, graph.words.mean, graph.words.std)
        if graph.letterbox and found.resize != own:
            raise QskdError("teacher.resize", f"another size than {path} says", "its own", "leave it out")
    sides = {found.resize.size, *(() if found.resize.mode == "square" else (found.resize.longest,))}
    if graph.side is not None and (sides != {graph.side} or (found.resize.mode != "square" and not graph.letterbox)):
        expected = f"squares of {graph.side} pixels, which its input {shown(graph.given)} says"
        if resize is None and graph.words is not None:
            remedy = f"leave size out: the graph takes {graph.side} alone"
            raise QskdError(str(words_file(path)), f"size: {graph.words.size}", expected, remedy)
        remedy = (
            f"export it again; or, in a recipe, teacher.resize: {{mode: square, size: {graph.side}}}"
            if resize is None
            else "leave teacher.resize out; or export the detector for this size"
        )
        raise QskdError(str(path), f"images of {found.resize.mode} {found.resize.size}", expected, remedy)
    return found


def preprocessing_of(processor: Any) -> Preprocessing:
    """What one of transformers' image processors does to pictures. QskdError as for `read_preprocessing`."""
    where, said = type(processor).__name__, dict(processor.to_dict())
    if said.get("size") is not None and not isinstance(said["size"], int):
        said["size"] = dict(said["size"])
    return _preprocessing(_checked(said, where), where, None)


def _preprocessing(said: dict[str, Any], where: str, resize: ResizeConfig | None) -> Preprocessing:
    if not said.get("do_rescale", True):
        # transformers then takes 0..255 for 0..1 where it normalises: nobody trains so, but a loader may do the dividing.
        raise QskdError(
            where, "an image processor with do_rescale: false", "pixels in 0..1 (do_rescale: true)", _CORRECT
        )
    if abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise QskdError(
            where, f"an image processor that multiplies pixels by {said['rescale_factor']}", "1/255", _CORRECT
        )
    if said.get("do_resize", True) is False and resize is None:
        raise QskdError(where, "an image processor that does not resize", remedy="set teacher.resize in the config")
    if said.get("resample", BILINEAR) != BILINEAR:
        log.warning("%s resizes with PIL's filter %s; bilinear is used", where, shown(said["resample"]))
    if said.get("pad_size"):
        log.warning("%s pads to a size of its own; here a batch is padded to its largest image", where)
    normalise = said.get("do_normalize", True)
    mean = said.get("image_mean", IMAGENET_MEAN) if normalise else (0.0, 0.0, 0.0)
    std = said.get("image_std", IMAGENET_STD) if normalise else (1.0, 1.0, 1.0)
    return Preprocessing(resize or _resize(said, where), _channels(mean), _channels(std))


def _processor(where: str) -> dict[str, Any]:
    """The image processor's fields as its file has them, over the defaults of the family's processor."""
    family = find_family(read_config(where).model_type, where)
    defaults = family.processor_class().to_dict()
    try:
        said = _said(where)
    except OSError as error:
        size, normalise = defaults["size"], "ImageNet's mean" if defaults["do_normalize"] else "pixels in 0..1"
        log.warning(
            "%s HAS NO IMAGE PROCESSOR that can be read (%s): assuming %s's defaults, size %s, %s. If it was trained "
            "otherwise its outputs are wrong: add its preprocessor_config.json, or set teacher.resize",
            *(where, (str(error).splitlines() or [""])[0], family.processor_class.__name__, dict(size), normalise),
        )
        return dict(defaults)
    return {key: value for key, value in defaults.items() if key != "size" or "size" not in said} | said


def _said(where: str) -> dict[str, Any]:
    """The fields of a checkpoint's image processor that are read here, checked. OSError where it has no image processor.

    They are in preprocessor_config.json, or inside a processor_config.json, which comes first, as for transformers. No class
    that such a file names is ever looked for.
    """
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        file = checkpoint_file(where, name)
        said: Any = {} if file is None else read_json_file(file)
        if name == PROCESSOR_NAME:
            said = said.get("image_processor")
        if file is not None and said is not None:
            return _checked(said, f"{where}/{name}")
    raise OSError(f"no {IMAGE_PROCESSOR_NAME}")


def _checked(said: Any, file: str) -> dict[str, Any]:
    def refused(field: str, expected: str) -> QskdError:
        return QskdError(file, f"{field}: {shown(said.get(field))}", expected, _CORRECT)

    if not isinstance(said, dict):
        raise QskdError(file, f"image_processor: {shown(said)}", "an object", _CORRECT)
    # A null is a default that was not chosen; of a switch it means "no", as for transformers.
    said = {key: value for key, value in said.items() if value is not None or key in _SWITCHES}
    for field in _SWITCHES:
        if not isinstance(said.get(field, True), bool | None):
            raise refused(field, "true or false")
    if not _is_number(said.get("rescale_factor", 1.0)):
        raise refused("rescale_factor", "a number")
    for field in ("image_mean", "image_std"):
        values = said.get(field, IMAGENET_STD)
        three = isinstance(values, list | tuple) and len(values) == 3 and all(_is_number(value) for value in values)
        if not three or (field == "image_std" and not all(value > 0 for value in values)):
            raise refused(field, "three numbers, for red, green and blue" + (" above 0" if field[-3:] == "std" else ""))
    return said


def _is_number(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e6


def _channels(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _resize(said: dict[str, Any], where: str) -> ResizeConfig:
    size = said["size"]
    if not isinstance(size, dict):  # the form before 2022: shortest edge, with max_size beside it
        size = {"shortest_edge": size}
    size = {name: size[name] for name in _SIDES if size.get(name) is not None}
    limits = _LONGEST if size.get("shortest_edge") else ("max_size",)
    for name, side in {**size, "max_size": said.get("max_size") or 1}.items():
        if type(side) is not int or not 1 <= side <= (_MOST_LONGEST if name in limits else _MOST_PIXELS):
            raise QskdError(
                where, f"an image processor of {name} {shown(side)}", f"pixels, 1 to {_MOST_PIXELS} a side", _SET_RESIZE
            )
    height, width, shortest = size.get("height"), size.get("width"), size.get("shortest_edge")
    if height and height == width:
        return ResizeConfig(mode="square", size=height)
    most = size.get("max_height")
    if most and most == size.get("max_width"):  # the longer side to `most`, down or up (to a pixel)
        return ResizeConfig(mode="shortest_edge", size=most, longest=most)
    if not shortest and size.get("longest_edge"):  # Table Transformer's: the longer side to it, as its authors resize
        return ResizeConfig(mode="shortest_edge", size=size["longest_edge"], longest=size["longest_edge"])
    if shortest:
        longest = size.get("longest_edge") or said.get("max_size") or 1333
        return ResizeConfig(mode="shortest_edge", size=shortest, longest=min(longest, _MOST_PIXELS))
    raise QskdError(
        where,
        f"an image processor of size {size}",
        "height = width, or shortest_edge and longest_edge",
        _SET_RESIZE,
    )


def to_pixels(images: Tensor, sizes: Tensor, mean: Channels, std: Channels) -> tuple[Tensor, Tensor]:
    """Normalise on the device the images are on; padding becomes 0 after normalising, as transformers pads.

    images: [B, H, W, 3] uint8, RGB, each in the top left corner. sizes: [B, 2] int, height and width of each. Returns
    pixel_values [B, 3, H, W] float32 and pixel_mask [B, H, W] bool, False on padding.
    """
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) < sizes[:, :1].to(images.device)
    columns = torch.arange(width, device=images.device) < sizes[:, 1:].to(images.device)
    pixel_mask = rows[:, :, None] & columns[:, None, :]
    # Made on the host and copied without waiting; made on the device they would be two waits a step.
    shift, scale = (torch.tensor(v).to(images.device, non_blocking=True).view(3, 1, 1) for v in (mean, std))
    pixel_values = channels_first(images).to(torch.float32, copy=True)
    # In place: four more tensors of a batch's pixels cost more than the arithmetic, on a CPU twice as much.
    return pixel_values.div_(255).sub_(shift).div_(scale).mul_(pixel_mask[:, None]), pixel_mask
