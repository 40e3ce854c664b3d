"""The verbs as functions: what they share, and those that `pipelines/api.py` has no room for."""
