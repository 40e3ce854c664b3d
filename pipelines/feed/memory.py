"""Whether a machine has the memory that a shuffling window takes: what ends a training otherwise names no remedy."""

from __future__ import annotations

import os
from pathlib import Path

FEWEST_BYTES = 2**30  # that a reader may hold, however small the window


def memory_bytes() -> int:
    """What this process may use: the machine's memory or its container's limit; 0 where that can't be known."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(sizes)


def too_much_for(held_bytes: int, window_images: int, there_bytes: int) -> list[str]:
    """A sentence where a reader may hold more than half of the memory that is there (0: not known), and a smaller window takes
    less. window_images: the recipe's `data.shuffle_window_images`, to which what is held is in proportion."""
    if held_bytes <= FEWEST_BYTES or not 0 < there_bytes < 2 * held_bytes:
        return []
    fits = max(1, int(window_images * there_bytes / (4 * held_bytes)))
    return [
        f"a reader may hold {held_bytes / 1e9:.3g} GB of encoded pictures, in memory where it is alone and in TMPDIR where a "
        f"machine has several, and this machine has {there_bytes / 1e9:.3g} GB of memory: --set data.shuffle_window_images={fits} "
        f"takes a quarter of it, and mixes fewer images ({window_images} now)"
    ]
