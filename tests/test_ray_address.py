"""A RAY_ADDRESS that no cluster answers at is an error within seconds, before Ray is asked, that names it and says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from dead_ends import closed, dropped, named, silent, web_server
from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest

from pipelines.cluster import address, logins
from pipelines.cluster.address import check_address
from pipelines.cluster.environment import joined
from pipelines.cluster.logins import LOGINS
from pipelines.cluster.start import start_ray
from pipelines.health.machine import _ray_cluster
from pipelines.tracking import answers
from qskd.errors import QskdError

LIMIT_S = 10.0  # of the fifteen that a command has


def test_what_is_waited_for_leaves_a_command_time_to_start() -> None:
    assert address.CONNECT_S + address.ANSWER_S < LIMIT_S
    assert answers.ANSWER_S < LIMIT_S


@contextmanager
def grpc_server(code: grpc.StatusCode | None) -> Iterator[str]:
    """With a GCS's service, which answers so; without a code it is one that is no GCS."""

    def answer(request: CheckAliveRequest, context: grpc.ServicerContext) -> CheckAliveReply:
        if code is not grpc.StatusCode.OK:
            context.abort(code, "")
        return CheckAliveReply()

    method = grpc.unary_unary_rpc_method_handler(
        answer, CheckAliveRequest.FromString, CheckAliveReply.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(1))
    if code is not None:
        handlers = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": method})
        server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


DEAD = {
    "a closed port": (closed, "connection refused"),
    "packets are dropped": (dropped, "no answer within 0.5 s"),
    "something that says nothing": (silent, "does not answer as a Ray cluster's head"),
    "a web server": (web_server, "does not answer as a Ray cluster's head"),
    "another service of gRPC's": (lambda: grpc_server(None), "UNIMPLEMENTED"),
    "a name that is none": (lambda: named("no-such-head.invalid:6379"), "no machine of that name is known"),
    "no port": (lambda: named("head"), "no HOST:PORT"),
    "Ray Client": (lambda: named("ray://127.0.0.1:1"), "Ray Client, which qskd does not use"),
    "the dashboard": (lambda: named("http://127.0.0.1:8265"), "Ray's dashboard"),
}


@pytest.mark.parametrize("kind", DEAD)
def test_an_address_where_no_cluster_answers_is_an_error_within_seconds_that_names_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = DEAD[kind]
    monkeypatch.setattr(address, "CONNECT_S", 0.5)
    monkeypatch.setattr(address, "ANSWER_S", 0.5)
    with make() as at:
        monkeypatch.setenv("RAY_ADDRESS", at)
        monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' own
        began = time.monotonic()
        with pytest.raises(QskdError) as raised:
            start_ray()
        assert time.monotonic() - began < LIMIT_S
        assert raised.value.where == f"RAY_ADDRESS={at}"
        assert said in raised.value.found
        assert "unset RAY_ADDRESS" in raised.value.remedy or "ray job submit" in raised.value.remedy
        check = _ray_cluster()
        assert (check.status, check.found) == ("problem", f"{raised.value.where}: {raised.value.found}")


@pytest.mark.parametrize("left", ["", "dead"])
def test_auto_where_a_cluster_was_is_an_error_too(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())  # other tests' own
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "ray_current_cluster"))
    with closed() as dead:
        if left:
            (tmp_path / "ray_current_cluster").write_text(dead)
        with pytest.raises(QskdError) as raised:
            check_address()
    found = f"auto, which means {dead}: connection refused" if left else "no Ray cluster runs on this machine"
    assert (raised.value.where, raised.value.found) == ("RAY_ADDRESS=auto", found)


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED], ids=lambda code: code.name)
def test_a_head_that_answers_or_wants_a_token_is_one(code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_server(code) as at:
        monkeypatch.setenv("RAY_ADDRESS", at)
        check_address()
        assert _ray_cluster().status == "ok"


def test_what_ray_says_of_a_head_that_answers_and_can_not_be_joined_is_told_with_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(**_: object) -> None:
        raise RuntimeError("Version mismatch:\n  Ray 2.59")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuses)
    with grpc_server(grpc.StatusCode.OK) as at:
        monkeypatch.setenv("RAY_ADDRESS", at)
        with pytest.raises(
            QskdError, match=r"joined from this machine: RuntimeError: Version mismatch: Ray 2\.59"
        ) as raised:
            start_ray()
    assert raised.value.where == f"RAY_ADDRESS={at}"


@pytest.mark.parametrize("word", ["", "local"])
def test_where_no_cluster_is_meant_nothing_is_asked(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", word)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.delattr(address, "head_problem")
    check_address()
    assert not joined()
    assert _ray_cluster().status == "ok"


@pytest.mark.parametrize("lacking", [True, False])
def test_logins_that_do_not_travel_to_a_cluster_that_is_joined_are_named_and_their_values_are_not(
    lacking: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[dict[str, str]] = []
    asked: list[tuple[str, ...]] = []

    def nodes(names: tuple[str, ...]) -> dict[str, list[str]]:
        asked.append(names)
        return {"10.0.0.1": list(names), "10.0.0.2": [name for name in names if name != "HF_TOKEN" or not lacking]}

    for name in LOGINS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda runtime_env, **_: given.append(runtime_env["env_vars"]))
    monkeypatch.setattr(logins, "_ask_nodes", nodes)
    with grpc_server(grpc.StatusCode.OK) as at:
        monkeypatch.setenv("RAY_ADDRESS", at)
        start_ray()
        assert not asked
        monkeypatch.setenv("HF_TOKEN", "hf_sesame")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
        start_ray()
    assert asked == [("AWS_SECRET_ACCESS_KEY", "HF_TOKEN")]
    said = "".join(record.getMessage() for record in caplog.records)
    assert ("HF_TOKEN: set here, and not for workers on 10.0.0.2," in said) is lacking
    assert "sesame" not in said + str(given)
    assert "AWS_SECRET" not in said


def test_a_ray_that_was_imported_before_us_asks_for_a_token_and_one_that_has_begun_keeps_its_mode() -> None:
    code = (
        "import ray, os; from ray._raylet import get_authentication_mode as mode\n"
        "ray.is_initialized = lambda: {begun}\n"
        "import pipelines; print(mode() == 1, os.environ.get('RAY_AUTH_MODE'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    for begun, expected in ((False, "True token"), (True, "False None")):
        program = [sys.executable, "-c", code.format(begun=begun)]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == expected
