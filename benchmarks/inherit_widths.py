"""Does a student of half the teacher's width gain from evenly chosen channels of its layers (`student.inherit`)?

    python -m benchmarks.inherit_widths                    # two seeds, 200 steps: eight short trainings

The quickstart's task and teacher, a student of half its width and FFN, with as many heads of half the channels, or with half of
the heads; plain training on the objects, no distillation, so that nothing but the start differs. Printed: the last layer's
weighted detection loss, mean of 20 steps in the middle and at the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from pipelines.demo.quickstart import BACKBONE, RECIPE, TEACHER, TRAIN
from pipelines.feed.stream import local_stream
from pipelines.prepare import prepare
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.shapes import make_shapes
from qskd.from_recipe import ground_truth, make_student
from qskd.training.step import Training

HALF = ("student.width=32", "student.ffn_width=64", f"student.backbone.init={BACKBONE}", f"teacher.path={TEACHER}")

HEADS = (8, 4)


def losses(shards: str, seed: int, steps: int, heads: int, inherit: bool) -> list[float]:
    """The weighted detection loss of the last layer, step by step."""
    own = [f"data.train={shards}", f"data.val={shards}", f"seed={seed}", f"training.max_steps={steps}"]
    more = ["training.warmup_steps=20", "training.epochs=1000", f"student.inherit={str(inherit).lower()}"]
    more += [f"student.heads={heads}"]
    config = load(RECIPE, [*HALF, *own, *more, "distillation.method=none"])
    labels = [name for _, name in ground_truth(shards).categories]
    training = Training(config, make_student(config, labels), None, steps, torch.device("cpu"))
    weights, found = training.module.weights, []
    for share in local_stream(make_plan(ResolvedConfig(config), "train").stream):
        if share.subset == "train":
            said = training.train_step(train_batch(share.arrays))
            found.append(sum(float(said[name]) * weights[name] for name in ("class", "l1", "giou")))
            if len(found) == steps:
                break
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inherit_widths", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=3200)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qskd-widths-") as scratch:
        annotations, images = make_shapes(TRAIN.model_copy(update={"images": given.images}), Path(scratch) / "coco")
        shards = f"{scratch}/shards"
        prepare(annotations, images, shards, quiet=True)
        print("| seed | heads (the teacher's: 8) | start | middle | end |\n| --- | --- | --- | ---: | ---: |")
        for seed, heads in itertools.product(range(given.seeds), HEADS):
            for inherit in (False, True):
                found = losses(shards, seed, given.steps, heads, inherit)
                middle = found[max(0, given.steps // 2 - 10) : given.steps // 2 + 10]
                start = "the teacher's channels" if inherit else "random"
                print(f"| {seed} | {heads} | {start} | {fmean(middle):.2f} | {fmean(found[-20:]):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
