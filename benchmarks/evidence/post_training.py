"""Post-training quantisation: a trained student gets quantisers that begin as those of a training do, and learn nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from qskd.config import Config
from qskd.detectors import Detector, Preprocessing
from qskd.evaluation.inference import predict_batch
from qskd.quantization.model import activation_quantisers, quantise
from qskd.quantization.stages import Stages

CALIBRATION_BATCHES = 32  # four times what a training begins with: nothing repairs a bad beginning here


def quantise_after_training(detector: Detector, config: Config, batches: Iterable[Mapping[str, Any]]) -> None:
    """Quantise a detector in place, with the bits and in the places of `student.quantization`. batches: a loader's, of training
    images."""
    bits = config.student.quantization_taken
    assert bits is not None
    quantise(detector.model, detector.family, bits)
    at_once = bits.model_copy(update={"rest_from": 0.0})  # all layers are trained, wherever they began
    stages = Stages(detector.model, at_once, total_steps=1_000)
    watching = activation_quantisers(detector.model).values()
    for each in watching:
        each.train()
    for arrays in islice(batches, CALIBRATION_BATCHES):
        predict_batch(detector, arrays, Preprocessing(config.student.resize), [0], slots=[0])
    stages.advance(stages.last)
    detector.eval()
