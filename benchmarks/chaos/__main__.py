"""What becomes of a run that is disturbed at a random moment? A table of verb x fault, and every loss with its cause.

    python -m benchmarks.chaos run --moments 20       every moment that has no record yet (one to six minutes each)
    python -m benchmarks.chaos run --verbs cache --faults actor node --moments 3
    python -m benchmarks.chaos table                  the table, from the committed records

A simulated cluster, on loopback: a head without CPUs for work, and a node. One run at a time, as a user would start it; at
a moment drawn from a seed (the pair and the number of the moment) a process, a node or the head is killed, the disk is
filled, or the store is cut off. Then the same command again, where the driver is gone. A record each, in
benchmarks/chaos/records, whatever came of it; it is not made again. Wants root (a small tmpfs is mounted) for `disk`,
and moto for `store`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos import moment as moments
from benchmarks.chaos import report
from benchmarks.chaos.moment import Undisturbed
from benchmarks.chaos.plan import FAULTS, VERBS, Moment
from benchmarks.chaos.plan import moments as planned
from benchmarks.chaos.world import World, world


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--moments", type=int, default=20, help="of each verb and fault")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no moment later than this; 0: no limit")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(f"/tmp/qskd-chaos-{os.getpid()}"),
        help="a short name; data in it is used again",
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder of work, for its logs")
    parser.add_argument(
        "--dashboard", action="store_true", help="a cluster with Ray's, as real ones have; slower to start"
    )
    return parser.parse_args(arguments)


def references(verbs: Sequence[str], made: World) -> dict[str, Undisturbed]:
    """The undisturbed runs, and the cache that distill and tune read."""
    found = {}
    if not (made.folder / "data" / "cached").exists():
        moments.make_cache(made)
        (made.folder / "data" / "cached").touch()
    for verb in verbs:
        found[verb] = Undisturbed.read(verb) or Undisturbed.make(verb, made)
        print(f"undisturbed {verb}: {found[verb].seconds:.0f} s", flush=True)
    return found


def run_all(wanted: Sequence[Moment], made: World, minutes: float) -> int:
    """How many moments have a loss in them."""
    began, lossy = time.monotonic(), 0
    expected = references(sorted({moment.verb for moment in wanted}), made)
    for number, moment in enumerate(wanted, 1):
        if minutes and time.monotonic() - began > 60 * minutes:
            print(
                f"{minutes:g} minutes are over; {len(wanted) - number + 1} moments are left for another time",
                flush=True,
            )
            break
        started = time.monotonic()
        record = moments.run(moment, made, expected[moment.verb])
        lost = report.losses(record)
        lossy += bool(lost)
        told = "; ".join(f"{check}: {cause}" for check, cause in lost.items()) or (record["struck"] and "all right")
        took = time.monotonic() - started
        print(
            f"{number:3}/{len(wanted)} {moment.name:<18} {took:4.0f} s  at {record['after_s']:5.1f} s: "
            f"{record['struck'] or 'the run was over first'}; {len(record['commands'])} command(s)  {told}",
            flush=True,
        )
    return lossy


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.action == "table":
        print(report.markdown(), end="")
        return 0
    named = list(planned(given.verbs, given.faults, given.moments))
    wanted = [moment for moment in named if moment.read() is None]
    print(f"{len(named)} moments, {len(named) - len(wanted)} of them have a record", flush=True)
    if not wanted:
        return 0
    if "disk" in given.faults and (os.geteuid() != 0 or not shutil.which("mount")):
        print("error: --faults disk mounts a small tmpfs, which takes root; leave it out", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster is ended on the way out
    with world(given.work, given.keep, given.dashboard) as made:
        return int(run_all(wanted, made, given.minutes) > 0)


if __name__ == "__main__":
    sys.exit(main())
