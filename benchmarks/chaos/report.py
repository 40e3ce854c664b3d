"""Records -> the table of counts, and every loss with its cause."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.chaos.plan import CHECKS, FAULTS, RECORDS, VERBS, applicable_checks, applies


def read_records(folder: str = "*") -> list[dict[str, Any]]:
    """All that are committed, in the order of their names."""
    paths = sorted(path for verb in VERBS for path in (RECORDS / verb).glob(f"{folder}/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def of(records: Sequence[dict[str, Any]], verb: str, fault: str) -> list[dict[str, Any]]:
    return [record for record in records if (record["verb"], record["fault"]) == (verb, fault)]


def losses(record: dict[str, Any]) -> dict[str, str]:
    """The checks that failed, with what was found."""
    return {check: cause for check, cause in record["checks"].items() if cause}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Verb x fault: how many runs were struck, and how many of them passed each check."""
    head = ["verb", "fault", "moments", "by itself", *CHECKS.values()]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " --- |" * (len(head) - 2)]
    for verb in VERBS:
        for fault, words in FAULTS.items():
            mine = [record for record in of(records, verb, fault) if record["struck"]]
            if not mine or not applies(verb, fault):
                continue
            alone = sum(len(record["commands"]) == 1 for record in mine)
            cells = [verb, words, str(len(mine)), str(alone)]
            for check in CHECKS:
                passed = (
                    sum(not record["checks"][check] for record in mine) if check in applicable_checks(verb) else None
                )
                cells.append("" if passed is None else str(passed) if passed == len(mine) else f"**{passed}**")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def loss_list(records: Sequence[dict[str, Any]]) -> str:
    """A line for each check that failed."""
    lines = []
    for record in records:
        for check, cause in losses(record).items():
            where = f"{record['verb']}, {record['fault']} {record['number']:02d}"
            lines.append(f"- {where}, *{CHECKS[check]}*: {' '.join(cause.split())}")
    return "\n".join(lines)


def missed(records: Sequence[dict[str, Any]]) -> int:
    """Runs that were over before there was anything to strike."""
    return sum(not record["struck"] for record in records)


def markdown() -> str:
    """The whole of `python -m benchmarks.chaos table`."""
    records = read_records()
    struck = len(records) - missed(records)
    codes = sorted({record["code"] for record in records})
    seen = sum(record.get("dashboard", False) for record in records)
    text = f"{struck} moments, {missed(records)} more in which the run was over before anything could be struck; "
    text += f"{seen} on a cluster with a dashboard; " if seen else ""
    text += f"{len(codes)} version(s) of the code: {', '.join(codes)}.\n\n{table(records)}\n"
    listed = loss_list(records)
    return text + (f"\nLosses:\n\n{listed}\n" if listed else "\nNo loss.\n")
