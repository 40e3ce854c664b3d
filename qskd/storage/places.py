"""Folders on any file system: a path or a URI opened, a model's folder fetched, and how two of them stand to each other.

Folders may be local paths, URIs of pyarrow's file systems or, failing those, of fsspec's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from qskd.errors import QskdError
from qskd.redaction import STORE_REMEDY, redacted, redacted_uri, secret_in
from qskd.storage.models import local_model, model_place
from qskd.storage.ownership import same_file
from qskd.storage.scratch import scratch_folder
from qskd.storage.stores import check_whole, patiently

_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PYARROW_S = ("s3://", "gs://", "gcs://", "abfs://", "abfss://")  # schemes that need no package of fsspec's
_LONGEST_PATH = 4096  # bytes: Linux opens no longer one


def local_name(path: str) -> str:
    """The path as it is; QskdError for what would make a folder called `s3:`, or is too long for any file system."""
    if _ONE_SLASH.match(path):
        raise QskdError(redacted_uri(path), "neither a path nor a URI", "SCHEME://..., or a path", "write it with ://")
    if len(path.encode(errors="replace")) > _LONGEST_PATH:
        raise QskdError(
            f"{path[:60]}...", f"a path of {len(path)} characters", f"at most {_LONGEST_PATH}", "shorten it"
        )
    return path


def check_uri(uri: str) -> None:
    """QskdError where a URI has a secret in it, or a #; no store is asked."""
    if secret := secret_in(uri):
        found = f"{secret}, which recipes, MLflow and logs would all keep"
        raise QskdError(redacted_uri(uri), found, "a URI without", STORE_REMEDY)
    check_whole(uri)


def open_folder(uri: str) -> tuple[pafs.FileSystem, str]:
    """Local path, or a URI of pyarrow's or else fsspec's -> (filesystem, path in it). Some stores are asked at this already: one
    that fails is tried again."""
    return _opened_once(uri) if "://" in uri else _opened(uri, patient=True)


@lru_cache(maxsize=64)
def _opened_once(uri: str) -> tuple[pafs.FileSystem, str]:
    """Of a store alone: what a path means changes with the working folder."""
    return _opened(uri, patient=True)


def open_at_once(uri: str) -> tuple[pafs.FileSystem, str]:
    """The same, where a store that fails is an error at once."""
    return _opened(uri, patient=False)


def _opened(uri: str, patient: bool) -> tuple[pafs.FileSystem, str]:
    if "\0" in uri or any("\ud800" <= letter <= "\udfff" for letter in uri):
        raise QskdError(uri, "a path with a NUL character, or one that is not UTF-8", "a path in UTF-8", "rename it")
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(local_name(uri)))
    check_uri(uri)
    try:
        return (
            patiently(uri, None, partial(pafs.FileSystem.from_uri, uri)) if patient else pafs.FileSystem.from_uri(uri)
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if uri.startswith(_PYARROW_S):  # what is wrong is the rest
            encoded = _encoded(uri)
            remedy = f"write it as {encoded}" if encoded != uri else "correct it"
            raise QskdError(uri, f"can't be opened: {error}", "a URI of pyarrow's", remedy) from None
    except OSError as error:
        raise QskdError(uri, f"can't be reached: {error}", "a reachable store", "check address and access") from None
    try:
        import fsspec  # type: ignore[import-untyped]

        filesystem, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        remedy = "check the scheme, or install the fsspec package that serves it"
        raise QskdError(uri, f"can't be opened: {error}", "a path or a file system URI", remedy) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _encoded(uri: str) -> str:
    """With what may not stand in a URI, as spaces and letters beyond ASCII, as %XX; what is so already stays."""
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(rest, safe="/?%!$&'()*+,;=:@~"))


@contextmanager
def fetched(uri: str) -> Iterator[str]:
    """A local copy of a model's folder, for what reads only local ones, until the block ends; of a run's folder its student's.
    A local folder is not copied, and a Hub name is given back as it is."""
    if "://" not in uri:
        yield os.path.expanduser(local_model(uri))
        return
    filesystem, root = open_folder(uri)
    with scratch_folder("fetched") as local:
        try:
            place = model_place(filesystem, root, uri)
            patiently(uri, filesystem, lambda: pafs.copy_files(place, local, source_filesystem=filesystem))
        except (OSError, pa.ArrowException) as error:
            raise QskdError(redacted(uri), f"can't be read: {error}", "a folder with files in it") from None
        try:
            yield str(local)
        except QskdError as error:  # it names the copy, which the user never saw
            words = (error.where, error.found, error.expected, error.remedy)
            raise QskdError(*(word.replace(str(local), redacted(uri)) for word in words)) from None


def check_not_read(destination: str, read: Iterable[str]) -> None:
    """QskdError where a folder that is written is, contains or lies in one of those that are read for it."""
    for folder in read:
        if relation := relation_of(destination, folder):
            found = f"{relation} the folder {redacted(folder)}, whose shards are read: new ones would take their place"
            remedy = "choose another folder (--overwrite does not help); nothing was written"
            raise QskdError(redacted(destination), found, "a folder apart from all shards that are read", remedy)


def relation_of(one: str, other: str) -> str:
    """How a folder stands to another: "is", "contains", "lies in", or "" for apart."""
    first, second = place_of(one), place_of(other)
    if isinstance(first, Path) and isinstance(second, Path):
        if same_file(first, second):
            return "is"
        if any(same_file(first, parent) for parent in second.parents):
            return "contains"
        return "lies in" if any(same_file(second, parent) for parent in first.parents) else ""
    if isinstance(first, Path) or isinstance(second, Path):
        return ""
    if first == second:
        return "is"
    if second[: len(first)] == first:
        return "contains"
    return "lies in" if first[: len(second)] == second else ""


def place_of(path: str) -> Path | tuple[str, ...]:
    """A local folder, links followed; the scheme, host and names of a URI. Stores decode %61, and of a chain (`a::b`) the last
    link is the place."""
    if "://" not in path:
        return Path(os.path.realpath(os.path.expanduser(path)))
    parts = urlsplit(path.rpartition("::")[2])
    if parts.scheme in ("file", "local"):
        return Path(os.path.realpath(unquote(f"{parts.netloc}{parts.path}")))
    names = [name for name in os.path.normpath(f"/{unquote(parts.path)}").split("/") if name]
    return ({"gcs": "gs"}.get(parts.scheme, parts.scheme), parts.netloc.rpartition("@")[2], *names)
