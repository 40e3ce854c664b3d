"""Imports: the collector waits for them, and only for them."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from qskd.imports import without_collecting


def test_the_collector_is_as_it_was_before_whatever_the_import_did() -> None:
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError, match="no such"), without_collecting():
        raise ImportError("no such thing")
    assert gc.isenabled()


def test_the_detectors_are_imported_without_a_collection_of_the_oldest() -> None:
    """Torch is imported before: what counts is that transformers' half adds none."""
    count = "import gc, torch; old = lambda: gc.get_stats()[2]['collections']; before = old(); import qskd.detectors; "
    count += "print(gc.isenabled(), old() - before)"
    said = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.split() == ["True", "0"]
