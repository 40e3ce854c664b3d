"""Detectors that are asked in words: what they are asked, and how their answers become classes."""
