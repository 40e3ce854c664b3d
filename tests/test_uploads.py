"""A file on a store is whole, or the one before: whatever breaks off its upload."""

from __future__ import annotations

import gc
import io
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

pytest.importorskip("moto", reason="moto (the S3 server of these tests) is not installed: pip install -e '.[dev]'")
pytest.importorskip("flask", reason="flask, which moto's server needs, is not installed")

from qskd.storage import files
from qskd.storage.files import publish_bytes
from qskd.storage.places import open_folder


class Broken(io.BytesIO):
    """A disk that breaks off after two blocks."""

    def __init__(self, content: bytes, error: BaseException | None) -> None:
        super().__init__(content)
        self.error, self.blocks = error, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.blocks += 1
        if self.blocks > 2:
            if self.error is None:
                return b""
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(5, "Input/output error"), None])
def test_an_upload_that_breaks_off_leaves_what_was_there(store: Any, error: BaseException | None) -> None:
    """pyarrow completes the upload with what it has when its stream is closed or dropped: a cut file would take the place."""
    filesystem, root = open_folder(store.uri)
    content = b"x" * (16 << 20)
    for there in ({}, {"file": b"before"}):
        if there:
            publish_bytes(there["file"], filesystem, f"{root}/file")
        with pytest.raises(type(error) if error else OSError, match=None if error else "8388608 of 16777216 bytes"):
            files._send(lambda: Broken(content, error), len(content), filesystem, f"{root}/file")
        gc.collect()
        assert store.objects() == there


def test_what_the_store_refuses_half_way_leaves_what_was_there(store: Any) -> None:
    filesystem, root = open_folder(store.uri)
    publish_bytes(b"before", filesystem, f"{root}/file")
    puts = itertools.count()
    store.fail(1000, matches=lambda request: request.startswith("PUT") and next(puts) > 0)
    content = b"x" * (32 << 20)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        files._send(lambda: io.BytesIO(content), len(content), filesystem, f"{root}/file")
    store.fail(0)
    gc.collect()
    assert store.objects() == {"file": b"before"}


_PUBLISHES = """
import sys
from pathlib import Path
from qskd.storage.files import publish
from qskd.storage.places import open_folder

print("begins", flush=True)
for _ in range(1000):
    spool = Path(sys.argv[1])
    spool.write_bytes(b"y" * (24 << 20))
    publish(spool, *open_folder(sys.argv[2]))
"""


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.6])
def test_a_process_interrupted_at_its_uploads_ends_soon_and_leaves_a_whole_file(
    store: Any, tmp_path: Path, after_s: float
) -> None:
    publish_bytes(b"before", *open_folder(f"{store.uri}/file"))
    command = [sys.executable, "-c", _PUBLISHES, str(tmp_path / "spool"), f"{store.uri}/file"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt" in said
    assert store.objects()["file"] in (b"before", b"y" * (24 << 20))


def test_an_interrupted_file_behind_fsspec_is_taken_away_and_the_one_before_stays(tmp_path: Path) -> None:
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("file")))
    publish_bytes(b"before", filesystem, f"{tmp_path}/file")
    with pytest.raises(KeyboardInterrupt):
        files._send(lambda: Broken(b"x" * (16 << 20), KeyboardInterrupt()), 16 << 20, filesystem, f"{tmp_path}/file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


class Half(io.FileIO):
    def write(self, data: Any, /) -> int:
        super().write(bytes(data)[: len(data) // 2])
        return len(data)


class Losing(pafs.FSSpecHandler):
    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(Half(path, "wb"), "w")


def test_a_file_of_which_the_store_lost_a_part_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    filesystem = pafs.PyFileSystem(Losing(fsspec.filesystem("file")))
    with pytest.raises(OSError, match="500 of 1000 bytes arrived"):
        files._send(lambda: io.BytesIO(b"x" * 1000), 1000, filesystem, f"{tmp_path}/file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
