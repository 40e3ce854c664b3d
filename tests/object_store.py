"""A real S3 server on loopback (moto's), over HTTP, that can be told to fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class ObjectStore:
    """`url` for AWS_ENDPOINT_URL; `fail(times, status)` answers that many further requests with an error."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._failures, self._status, self._matches = 0, 503, lambda _: True
        self.failed: list[str] = []
        self.asked: list[str] = []  # every request
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self._lock:
            self.asked.append(request)
            broken = self._failures > 0 and self._matches(request)
            if broken:
                self._failures -= 1
                self.failed.append(request)
        if not broken:
            return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = "SlowDown" if self._status == 503 else "AccessDenied"
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
        start_response(f"{self._status} {code}", [("Content-Type", "application/xml")])
        return [b"" if request.startswith("HEAD") else body]

    def fail(self, times: int, status: int = 503, matches: Callable[[str], bool] = lambda _: True) -> None:
        """Answer the next requests ("METHOD /path") that match with this status."""
        with self._lock:
            self._failures, self._status, self._matches, self.failed = times, status, matches, []

    def make_bucket(self, name: str) -> None:
        import boto3

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=self.url, **keys).create_bucket(Bucket=name)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket, folders' markers left out."""
        import boto3

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=self.url, **keys)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names if not name.endswith("/")
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    try:
        yield store
    finally:
        store.close()
