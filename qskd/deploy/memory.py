"""The most memory that a detector takes at work, measured in a process that does nothing else.

`python -m qskd.deploy.memory '{"model": FOLDER, ...}'` is that process; `peak_memory` starts it and reads what it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qskd.errors import QskdError


def _peak_bytes() -> int:
    """The largest resident set of this process since `_forget_peak`, or since it began where that can't be reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):  # no Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else 1024 * peak)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory(
    model: str | Path,
    height: int,
    width: int,
    batches: Sequence[int],
    threads: int = 1,
    device: str = "cpu",
    precision: str = "float32",
) -> dict[int, int]:
    """Batch size -> bytes, weights and activations; what Python and its libraries take before the model comes is not in it.

    model: a Hub name or folder, or an .onnx or .xml file, which onnxruntime or OpenVINO then runs. On the CPU the resident memory
    of the process, which an allocator may keep larger than what is in use; on cuda what torch has allocated.
    Raises QskdError when the process fails.
    """
    request = {"model": str(model), "height": height, "width": width, "batches": sorted(batches), "threads": threads}
    request |= {"device": device, "precision": precision}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "qskd.deploy.memory", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise QskdError(str(model), f"measuring its memory failed: {last}", remedy="--no-memory goes without")
    return {int(batch): peak for batch, peak in json.loads(done.stdout.splitlines()[-1]).items()}


def _measure(request: dict[str, Any]) -> dict[int, int]:
    size, threads = (request["height"], request["width"]), request["threads"]
    if request["model"].endswith(".onnx"):
        import numpy as np
        import onnxruntime

        before = _before()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])

        def run_onnx(batch: int) -> None:
            session.run(None, {"pixel_values": np.zeros((batch, 3, *size), np.float32)})

        return {batch: _peak_of(run_onnx, batch, before) for batch in request["batches"]}
    if request["model"].endswith(".xml"):
        import numpy as np

        from qskd.deploy.runtimes import need_openvino, session_of_openvino

        need_openvino()
        before = _before()
        compiled = session_of_openvino(Path(request["model"]), threads)

        def run_openvino(batch: int) -> None:
            compiled.run(["logits"], {"pixel_values": np.zeros((batch, 3, *size), np.float32)})

        return {batch: _peak_of(run_openvino, batch, before) for batch in request["batches"]}
    import torch

    from qskd.deploy.speed import Size, torch_runner
    from qskd.detectors import load_detector

    torch.set_num_threads(threads)
    device, before = torch.device(request["device"]), _before()
    runner = torch_runner(load_detector(request["model"]), Size(*size), device, request["precision"])

    def run(batch: int) -> None:
        runner(batch)()

    if device.type != "cuda":
        return {batch: _peak_of(run, batch, before) for batch in request["batches"]}
    found = {}
    for batch in request["batches"]:
        torch.cuda.reset_peak_memory_stats(device)
        run(batch)
        torch.cuda.synchronize(device)
        found[batch] = torch.cuda.max_memory_allocated(device)
    return found


def _before() -> int:
    _forget_peak()
    return _peak_bytes()


def _peak_of(run: Callable[[int], None], batch: int, before: int) -> int:
    _forget_peak()
    run(batch)
    return _peak_bytes() - before


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
