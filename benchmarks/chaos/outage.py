"""A disk that fills up and a store that goes away: a small tmpfs, and a TCP proxy before a real S3 server on loopback."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "qskd-chaos"


class Proxy:
    """Passes connections on to a port. While it is cut there are none: those that exist are reset, new ones refused."""

    def __init__(self) -> None:
        self.target = 0
        self.port = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.mend()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        if self._listener is not None:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> int:
        """How many connections there were."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        with self._lock:
            torn, self._open = self._open, set()
        for connection in torn:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no farewell
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        return len(torn) // 2

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                if self._listener is not listener:
                    near.close()
                    far.close()
                    return
                self._open |= {near, far}
            threading.Thread(target=self._pass_on, args=(near, far), daemon=True).start()

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        other, open_still = {near: far, far: near}, True
        with contextlib.suppress(OSError, ValueError):
            while open_still:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(1 << 16)
                    open_still = open_still and bool(data)
                    other[ready].sendall(data)
        self._close(near, far)

    def _close(self, *connections: socket.socket) -> None:
        with self._lock:
            self._open -= set(connections)
        for connection in connections:
            connection.close()


class Store:
    """moto's S3 server in a process of its own, behind the proxy. Its objects outlive every outage."""

    def __init__(self, proxy: Proxy, log: Path) -> None:
        import boto3  # type: ignore[import-untyped]

        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        proxy.target = port
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.1)
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=proxy.url, **keys).create_bucket(Bucket=BUCKET)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class SmallDisk:
    """A file system of its own (tmpfs: needs root), which a file can fill to the last byte."""

    def __init__(self, folder: Path, mebibytes: int = 48) -> None:
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "qskd-chaos", str(folder)], check=True)

    def fill(self) -> int:
        """The bytes that were still free."""
        block, written = bytes(1 << 16), 0
        descriptor = os.open(self.filler, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            while block:
                try:
                    written += os.write(descriptor, block)
                except OSError:
                    block = block[: len(block) // 2]
        finally:
            os.close(descriptor)
        return written

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)

    def end(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=False)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
