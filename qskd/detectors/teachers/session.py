"""An ONNX file at work in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qskd.errors import QskdError
from qskd.imports import need


def open_session(
    file: Path, threads: int = 1, device: torch.device | str = "cpu", remedy: str = "try --exporter dynamo"
) -> Any:
    """An onnxruntime session on so many threads; on cuda where its build has that, else a QskdError."""
    onnxruntime = need("onnxruntime", str(file))
    wanted = "CUDAExecutionProvider" if torch.device(device).type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise QskdError(
            "onnxruntime",
            f"providers {onnxruntime.get_available_providers()}",
            wanted,
            "install onnxruntime-gpu in place of onnxruntime, or --device cpu",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: it warns of every constant that it leaves for later
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[wanted])
    except Exception as error:
        raise QskdError(
            str(file), f"onnxruntime can't run it: {str(error).splitlines()[0][:300]}", remedy=remedy
        ) from error
