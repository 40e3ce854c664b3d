"""The chaos table: its records against its plan, what its checks find wrong, and its outages; no run is disturbed here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from benchmarks.chaos import report
from benchmarks.chaos.checks import Left, check_mlflow, compare_content, compare_files
from benchmarks.chaos.faults import Blow, judge_end
from benchmarks.chaos.outage import Proxy, SmallDisk
from benchmarks.chaos.plan import CHECKS, FAULTS, RECORDS, VERBS, Moment, applicable_checks, moments

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted(path for verb in VERBS for path in (RECORDS / verb).glob("*/*.json"))
WELL, BADLY, KILLED, HUNG = (
    {"ended": end, "seconds": 1.0, "said": ""} for end in ("exit code 0", "exit code 1", "killed", "hung")
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RECORDS).with_suffix("")))
def test_a_committed_record_is_of_its_moment_and_whole(path: Path) -> None:
    record = json.loads(path.read_text())
    moment = Moment(record["verb"], record["fault"], record["number"])
    assert moment.record == path
    assert (record["seed"], record["variant"]) == (moment.seed, moment.variant)
    assert record["fraction"] == round(moment.draw()[0], 3)
    assert list(record["checks"]) == (applicable_checks(moment.verb) if record["struck"] else [])
    assert record["commands"]
    assert all(record[field] for field in ("job", "code", "machine", "date"))


def test_the_documented_table_is_what_the_records_say() -> None:
    assert report.markdown() in (ROOT / "docs" / "faults.md").read_text()


def test_moments_are_spread_evenly_and_every_fault_befalls_every_verb_but_the_actors() -> None:
    planned = list(moments(list(VERBS), list(FAULTS), 3))
    pairs = {(each.verb, each.fault) for each in planned}
    assert len(pairs) == 3 * len(FAULTS) - 2
    assert len(planned) == len({each.name for each in planned}) == 3 * len(pairs)
    assert {(each.verb, each.fault) for each in planned[: len(pairs)]} == pairs


def made(verb: str, fault: str, number: int, commands: int = 1, struck: str = "it", **wrong: str) -> dict[str, object]:
    checks = {check: wrong.get(check, "") for check in applicable_checks(verb)} if struck else {}
    return {
        "verb": verb, "fault": fault, "number": number, "commands": [WELL] * commands, "struck": struck, "checks": checks,
        "code": "c",
    }  # fmt: skip


def test_the_table_counts_what_passed_and_names_what_did_not() -> None:
    records = [
        made("cache", "node", 0),
        made("cache", "node", 1, commands=2, once="image 3 of 000 2 times"),
        made("cache", "node", 2, struck=""),
    ]
    row = report.table(records).splitlines()[-1]
    assert row == f"| cache | {FAULTS['node']} | 2 | 1 | 2 | 2 | **1** |  | 2 | 2 |"
    assert report.loss_list(records) == f"- cache, node 01, *{CHECKS['once']}*: image 3 of 000 2 times"
    assert report.missed(records) == 1


@pytest.mark.parametrize(
    ("fault", "blow", "commands", "said"),
    [
        ("worker", Blow("it"), [WELL], ""),
        ("worker", Blow("it"), [BADLY, WELL], "given 2 times"),
        ("driver", Blow("it", again=True), [KILLED, WELL], ""),
        ("driver", Blow("it", again=True), [KILLED, BADLY, WELL], "given 3 times"),
        ("node", Blow("it"), [HUNG, WELL], "hung for 9 s"),
        ("node", Blow("it"), [BADLY] * 4, "never ended well"),
        ("disk", Blow("it", outage=True), [WELL], ""),
        ("disk", Blow("it", outage=True), [BADLY, WELL], "does not name it"),
        ("disk", Blow("it", outage=True), [{**BADLY, "said": "[Errno 28] No space left on device: a"}, WELL], ""),
        ("store", Blow("it", outage=True), [{**BADLY, "said": "error: s3://bucket/a: the store failed"}, WELL], ""),
    ],
)
def test_a_run_must_go_on_by_itself_or_name_what_ended_it(
    fault: str, blow: Blow, commands: list[dict[str, object]], said: str
) -> None:
    found = judge_end(Moment("distill", fault, 0), blow, commands, 9)
    assert said in found
    assert bool(found) == bool(said)


def test_other_bytes_missing_files_and_what_lies_about_are_told() -> None:
    expected = Left({"a": "1", "b": "2"}, {"a": 1, "checkpoint_TIME/state.json": 2}, {})
    assert not compare_content(expected, expected)
    assert compare_content(expected, Left({"a": "9"}, {}, {})) == "no b; a has other bytes"
    assert not compare_files(expected, expected, [])
    found = compare_files(expected, Left({}, {"a": 1, "checkpoint_TIME/state.json": 3}, {}), ["qskd-checkpoint-x"])
    assert found == "3 checkpoint_TIME/state.json instead of 2; temporary: qskd-checkpoint-x"


def test_a_second_mlflow_run_another_id_and_a_point_written_twice_are_told() -> None:
    def left(top: list[list[str]], steps: list[int], trials: dict[str, list[list[str]]]) -> Left:
        return Left({}, {}, {"top": top, "trials": trials, "steps": {"val/AP": steps}})

    expected = left([["r", "FINISHED"]], [4, 8], {"0": [["t", "FINISHED"]]})
    assert not check_mlflow(expected, left([["x", "FINISHED"]], [4, 8], {"0": [["y", "FINISHED"]]}), "x", "x")
    told = {
        "another run id": left([["z", "FINISHED"]], [4, 8], {"0": [["y", "FINISHED"]]}),
        "instead of one FINISHED": left([["x", "FINISHED"], ["w", "RUNNING"]], [4, 8], {"0": [["y", "FINISHED"]]}),
        "val/AP at steps [4, 4, 8]": left([["x", "FINISHED"]], [4, 4, 8], {"0": [["y", "FINISHED"]]}),
        "trial 0: runs ['FINISHED', 'RUNNING']": left(
            [["x", "FINISHED"]], [4, 8], {"0": [["y", "FINISHED"], ["v", "RUNNING"]]}
        ),
    }
    for words, found in told.items():
        assert words in check_mlflow(expected, found, "x", found.mlflow["top"][0][0]), words


def test_a_cut_proxy_resets_what_is_open_and_refuses_what_comes_and_passes_on_again_when_mended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=lambda c=connection: c.sendall(c.recv(99)), daemon=True).start()

        threading.Thread(target=echo, daemon=True).start()
        proxy = Proxy()
        proxy.target = server.getsockname()[1]
        for _ in range(2):
            there = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
            there.sendall(b"words")
            assert there.recv(99) == b"words"
            assert proxy.cut() == 1
            with contextlib.suppress(ConnectionError):
                assert there.recv(99) == b""
            with pytest.raises(ConnectionError):
                socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
            proxy.mend()
        proxy.cut()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_a_full_disk_takes_nothing_more_until_it_is_freed(tmp_path: Path) -> None:
    try:
        disk = SmallDisk(tmp_path / "disk", mebibytes=1)
    except Exception as error:  # a container without the right to mount
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    try:
        (disk.folder / "before").write_bytes(bytes(4096))
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "after").write_bytes(bytes(1))
        disk.free()
        (disk.folder / "after").write_bytes(bytes(4096))
    finally:
        disk.end()
    assert not (tmp_path / "disk").exists()
