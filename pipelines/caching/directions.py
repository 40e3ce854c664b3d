"""In which directions a teacher's memory varies: beside caches that are whole, for the methods that ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.run.logs import say
from qskd.checks import directions_asked, lacks_directions
from qskd.config import Config
from qskd.from_recipe import find_directions
from qskd.teacher.manifest import load_cache_manifest
from qskd.teacher.memory.directions import FILES as DIRECTIONS
from qskd.teacher.memory.directions import load_directions, save_directions


def add_directions(configs: Sequence[Config], quiet: bool) -> None:
    """Beside caches that are whole, what the recipe's method asks for and is not there. configs: of each folder of images. The
    first one's are all's: a training reads those, and `qskd select` those of the folder that it looks at."""
    whole = [(config, load_cache_manifest(config.teacher.cache.path)) for config in configs]
    lacking = [(config, of) for config, of in whole if of is not None and lacks_directions(config, of)]
    (first, manifest), kind = whole[0], directions_asked(configs[0])
    if manifest is None or not lacking:
        return
    found = load_directions(first.teacher.cache.path, manifest, kind) or find_directions(first, manifest)
    for config, of in lacking:
        save_directions(config.teacher.cache.path, found, of)
    widths = ", ".join(str(len(each.variances)) for each in found)
    what = "in which the memory varies" if kind == "variance" else "that the teacher's decoder looks along"
    say(f"cache: the directions {what}, of maps {widths} wide → {DIRECTIONS[kind]}", quiet)
