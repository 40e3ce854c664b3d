"""What a CUDA machine does with qskd: is it right there, how fast is a step, what does the device wait for.

    python -m benchmarks.gpu [--out gpu.json] [--minutes 8]         (make gpu-check)

For whoever has a GPU. It needs no network, no data and, but for the feed (c), no Ray: pictures are noise, weights random.

    a  one training step on the GPU and on the CPU, float32; in bfloat16 and in float32
    b  Conditional DETR and RT-DETR with ResNet-18, at 640 and 800 px, 2 to 32 images: a step plain, taught from a cache, taught
       online; kernels, waits, memory; beside forward and backward alone
    c  images/s that one worker receives from 1, 4, 8 and 16 readers (with Ray)
    d  the making of a cache over its teacher alone
    e  collectives of one process; a run, the same run again, and one that was stopped and gone on with
    f  a step with and without torch.compile

Without a GPU it says so and runs every part at toy size on the CPU. A part that fails is told, and the others run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cache, exact, steps
from benchmarks.gpu.cases import FAMILIES
from benchmarks.timing import load_note, machine, print_table
from benchmarks.work_folder import check_out
from qskd.errors import QskdError
from qskd.precision import allow_tf32

PARTS = "abdefc"  # in this order: what needs Ray comes last
QSKD_GOAL, CACHE_GOAL = 1.05, 0.95


class Check:
    """The parts, what they found, and how they print it."""

    def __init__(self, device: torch.device, until: float) -> None:
        self.device, self.until, self.toy = device, until, device.type != "cuda"
        self.families = FAMILIES[-1:] if self.toy else FAMILIES  # (b) has both in any case
        self.found: dict[str, Any] = {}
        self.wrong: list[str] = []

    def a(self) -> None:
        differences = exact.differences(self.device, self.families, 64 if self.toy else 320, self.toy)
        self.found["a"] = [{"name": d.name, "found": d.value, "allowed": d.allowed} for d in differences]
        self.wrong += [d.name for d in differences if not d.fits and exact.GOAL not in d.name]
        rows = [
            [
                d.name,
                f"{d.value:.2g}",
                f"{d.allowed:.2g}",
                "" if d.fits else "missed" if exact.GOAL in d.name else "WRONG",
            ]
            for d in differences
        ]
        print_table(["a: largest difference of", "found", "allowed", ""], rows)

    def b(self) -> None:
        edges, batches, count = ([64], [2], 1) if self.toy else ([800, 640], [2, 8, 16, 32], 6)
        found, lines, plain = [], [], 0.0
        for row in steps.rows(self.device, edges, batches, count, self.until, self.toy):
            cost = row.cost
            plain = cost.step_ms if row.kind == "plain" else plain
            over = cost.step_ms / plain
            goal = "" if row.kind != "cached" else "met" if over <= QSKD_GOAL else f"missed ({QSKD_GOAL})"
            found.append(row.asdict() | {"over_plain": over})
            lines.append(
                [
                    row.case, row.kind, str(row.batch), f"{cost.step_ms:.1f}", f"{over:.2f}", goal, f"{row.images_per_s:.0f}",
                    f"{cost.device_ms:.1f}", f"{row.bare_ms:.1f}", f"{row.bare_ms / cost.step_ms:.2f}",
                    str(cost.kernels), str(cost.casts), str(cost.waits), f"{cost.peak_gib:.1f}",
                ]
            )  # fmt: skip
            self.found["b"] = found
        head = ["b: a step", "", "images", "ms", "over plain", "goal", "images/s", "device ms", "bare ms", "bare share"]
        work = "operators" if self.toy else "kernels"
        print_table([*head, work, "casts", "waits", "GiB"], lines)

    def c(self) -> None:
        if importlib.util.find_spec("ray") is None:
            self.found["c"] = "no Ray here"
            print("\nc: Ray is not installed here: the feed was not measured")
            return
        from benchmarks.gpu import feed

        counts, images, edge = ([1], 128, 64) if self.toy else ([1, 4, 8, 16], 1536, 800)
        found = list(feed.speeds(self.device, counts, images, edge))
        self.found["c"] = [{"readers": n, "images_per_s": fps, "first_batch_s": first} for n, fps, first in found]
        lines = [[str(n), f"{fps:.0f}", f"{fps / n:.0f}", f"{first:.1f}"] for n, fps, first in found]
        print_table([f"c: readers, {edge} px", "images/s", "of each", "s to the first batch"], lines)

    def d(self) -> None:
        size, count = (2, 1) if self.toy else (16, 4)
        self.found["d"], lines = [], []
        for name, made, bare in cache.speeds(self.device, self.families, size, count, self.toy):
            self.found["d"].append({"case": name, "cache_per_s": made, "teacher_per_s": bare})
            ratio = made / bare[cache.PRECISIONS[-1]]
            alone = [f"{fps:.1f}" for fps in bare.values()]
            lines.append([name, f"{made:.1f}", *alone, f"{ratio:.2f}", "met" if ratio >= CACHE_GOAL else "missed"])
        head = ["d: images/s", "cache made", *(f"teacher, {name}" for name in cache.PRECISIONS), "ratio to the last"]
        print_table([*head, f">= {CACHE_GOAL}"], lines)

    def e(self) -> None:
        found = list(exact.resumed(self.device, self.families, 64 if self.toy else 320, self.toy))
        self.found["e"] = [{"case": name, "again": again, "resumed": resumed} for name, again, resumed in found]
        if self.toy:
            self.wrong += [f"{name}: resume" for name, _, resumed in found if resumed]
        lines = [[name, *("bit for bit" if gap == 0 else f"{gap:.1g} off" for gap in gaps)] for name, *gaps in found]
        print_table(["e: weights after six steps", "the same run again", "stopped, gone on with"], lines)

    def f(self) -> None:
        edge, batch, count = (64, 2, 1) if self.toy else (640, 8, 8)
        lines, self.found["f"] = [], []
        for name, *found in steps.compiled(self.device, edge, batch, count, self.toy):
            without, with_it, first_s, graphs = found
            names = ("plain_ms", "compiled_ms", "first_step_s", "cuda_graphs_ms")
            told = [None if math.isnan(value) else value for value in found]
            self.found["f"].append({"case": name, **dict(zip(names, told, strict=True))})
            lines.append(
                [
                    f"{name}, batch {batch}",
                    f"{without:.1f}",
                    f"{with_it:.1f}",
                    f"{with_it / without:.2f}",
                    f"{first_s:.0f}",
                    "-" if math.isnan(graphs) else f"{graphs:.1f}",
                ]
            )
        print_table(
            ["f: ms a step", "plain", "compute.compile", "ratio", "s for the first", "student in CUDA graphs"], lines
        )


def describe(device: torch.device) -> list[str]:
    facts = [machine("transformers", "ray", "numpy") + f", {load_note()}"]
    if device.type == "cuda":
        facts.append(
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, "
            f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        )
    else:
        facts.append("NO GPU HERE: every part runs at toy size on the CPU. Its times say nothing about a GPU")
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 1 when something is wrong or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default=PARTS, help=f"which, of {PARTS}")
    parser.add_argument(
        "--minutes", type=float, default=8, help="no further size is begun in (b) when 60 %% of it have gone"
    )
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after each part")
    given = parser.parse_args(arguments)
    if wrong := set(given.parts) - set(PARTS):
        parser.error(f"--parts {given.parts}: no {', '.join(sorted(wrong))}, of {PARTS}")
    try:
        check_out(given.out, "--out", lambda found: "machine" in found)
    except QskdError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # as a worker has
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allow_tf32(device)  # as the programs do
    facts = describe(device)
    print("qskd on this machine's GPU", *facts, sep="\n  ")
    started = time.monotonic()
    check = Check(device, started + 0.6 * 60 * given.minutes)
    parts: Mapping[str, Callable[[], None]] = {name: getattr(check, name) for name in given.parts}
    failed = []
    for name, part in parts.items():
        at = time.monotonic()
        try:
            part()
        except Exception:
            failed.append(name)
            check.found[name] = {"failed": traceback.format_exc(), "before": check.found.get(name)}
            print(f"\n{name}: FAILED", traceback.format_exc(), sep="\n")
        print(f"({name}: {time.monotonic() - at:.0f} s)", flush=True)
        if given.out:
            given.out.write_text(json.dumps({"machine": facts, **check.found}, indent=1))
    if check.wrong:
        print("\nWRONG:", *check.wrong, sep="\n  ")
    return int(bool(failed or check.wrong))


if __name__ == "__main__":
    sys.exit(main())
