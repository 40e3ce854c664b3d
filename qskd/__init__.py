"""qskd: query-selection knowledge distillation for DETR detectors.

The library: torch, numpy and transformers, free of Ray and MLflow (those live in `pipelines`). Importing this package
imports nothing heavy, so that data workers, which need only numpy and Pillow, start fast.
"""

__version__ = "0.1.0"
