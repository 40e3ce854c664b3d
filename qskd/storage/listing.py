"""Whether the files that a manifest names are there, with the bytes it says: one listing of their folder, no file is opened.

What is wrong is then known in a second, of a terabyte too, and not when a reader comes to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs

from qskd.storage.places import open_folder
from qskd.storage.stores import patiently

MISSING = "is missing"
_ASKED_FIRST = 8  # files that a listing does not have, asked for by name before the listing is believed


def sizes_in(uri: str) -> dict[str, int | None]:
    """Bytes of each file of a folder by name, None where its file system does not say; empty where there is no such folder."""
    filesystem, root = open_folder(uri)
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
        filesystem.handler.fs.invalidate_cache()  # it keeps listings, and other processes write
    selector = pafs.FileSelector(root, allow_not_found=True)
    infos = patiently(uri, filesystem, lambda: filesystem.get_file_info(selector))
    return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}


def wrong_files(uri: str, expected: Mapping[str, int]) -> dict[str, str]:
    """What is wrong with these files of a folder, by name, in the order given: "is missing", or its bytes and those expected
    (expected: bytes by name). Empty when all are as they should be."""
    there = sizes_in(uri)
    missing = [name for name in expected if name not in there]
    # A web server has no listing that can be trusted.
    found = _asked(uri, missing[:_ASKED_FIRST])
    if found:
        there |= found | _asked(uri, missing[_ASKED_FIRST:])
    wrong = {}
    for name, size in expected.items():
        if name not in there:
            wrong[name] = MISSING
        elif there[name] not in (None, size):
            wrong[name] = f"has {there[name]} bytes instead of {size}"
    return wrong


def _asked(uri: str, names: Sequence[str]) -> dict[str, int | None]:
    filesystem, root = open_folder(uri)

    def ask(name: str) -> pafs.FileInfo:
        return patiently(uri, filesystem, lambda: filesystem.get_file_info(f"{root}/{name}"))

    with ThreadPoolExecutor(16) as pool:
        infos = zip(names, pool.map(ask, names), strict=True)
        return {name: info.size for name, info in infos if info.type == pafs.FileType.File}
