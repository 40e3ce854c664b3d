"""Patience with stores. Object stores answer slowly, or not at all for a while: what may pass is tried again, for so long;
then the store is named.

pyarrow's S3 client tries each request for some six seconds by itself. What is here comes on top, for outages of minutes.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs as pafs

from qskd.errors import QskdError, full_disk_named
from qskd.redaction import redacted

log = logging.getLogger("qskd")
__all__ = [
    "PATIENCE",
    "check_whole",
    "is_local",
    "join",
    "may_pass",
    "patience_s",
    "patiently",
    "redacted",
]
PATIENCE = "QSKD_STORE_PATIENCE_S"  # environment variable: how long a store that fails is tried again
DEFAULT_PATIENCE_S = 120.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0
REMEDY = (
    f"check network, address, bucket and credentials; `qskd doctor --storage URI` tries it; {PATIENCE} is the limit"
)
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# What pyarrow's S3 client says of requests that will fail the next time too; it knows no exceptions of their own for them.
_FINAL_TEXT = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|"
    r"INVALID_SIGNATURE|UNRECOGNIZED_CLIENT|Bucket '.*' not found|allow_bucket_creation|"
    r"Unable to load lib"  # a machine without what HDFS needs
)
T = TypeVar("T")


def patience_s() -> float:
    """Seconds for which a failing store is tried again; QskdError when the variable holds no number."""
    said = os.environ.get(PATIENCE, "")
    try:
        seconds = float(said) if said else DEFAULT_PATIENCE_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise QskdError(PATIENCE, repr(said), "seconds, 0 or more", f"export {PATIENCE}=120")
    return seconds


def is_local(filesystem: pafs.FileSystem) -> bool:
    return isinstance(filesystem, pafs.LocalFileSystem)


def may_pass(error: OSError) -> bool:
    """Whether the same request may succeed later."""
    return not isinstance(error, _FINAL) and not _FINAL_TEXT.search(str(error))


def patiently(where: str, filesystem: pafs.FileSystem | None, request: Callable[[], T]) -> T:
    """The answer of `request`, tried again while it raises OSErrors that may pass, each time after a longer wait.

    where: what messages name. filesystem: None while it is being opened. `request` must do no harm when it is done twice. Errors
    that will not pass, and all of local disks, are raised as they are; a store that fails for `patience_s` is a QskdError.
    """
    began, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            with full_disk_named(where):
                answer = request()
        except OSError as error:
            if (filesystem is not None and is_local(filesystem)) or not may_pass(error):
                raise
            limit_s, spent_s = patience_s(), time.monotonic() - began
            if spent_s + wait_s > limit_s:
                found = f"the store failed {tries} time{'s' * (tries > 1)} in {spent_s:.0f} s, at last with: {error}"
                raise QskdError(redacted(where), redacted(found), "a store that answers", REMEDY) from None
            if tries == 1:
                log.warning("%s: %s; trying again for up to %.0f s", redacted(where), redacted(str(error)), limit_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            if tries > 1:
                log.warning("%s: answered at try %d, after %.1f s", redacted(where), tries, time.monotonic() - began)
            return answer


def check_whole(uri: str) -> None:
    """QskdError for a URI with a #: pyarrow leaves out what follows it, and two folders would be one."""
    if "://" in uri and "#" in uri:
        written = redacted(uri).replace("#", "%23")
        raise QskdError(
            uri, "a URI with a #, at which its path would end", "a URI without", f"write %23 for it: {written}"
        )


def join(uri: str, *names: str) -> str:
    """A path or URI with names appended to its path: before its query, where it has one (`s3://bucket/a?region=...`)."""
    check_whole(uri)
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/") or path, *names]) + mark + query
