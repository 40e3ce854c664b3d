"""Distillation methods: one file, or one folder, each. `method` has what they all do, `find` how they are found, `shared` what
several need; `mimic` is the one to copy (docs/methods.md). Importing this package imports no torch."""
