"""Detectors that can teach and no more: those that are asked in words, and those that are no DETR."""
