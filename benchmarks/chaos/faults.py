"""The faults: each strikes once, and says what it struck; "" means that there was nothing to strike yet."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.cluster import kill, title
from benchmarks.chaos.plan import TITLES, Moment
from benchmarks.chaos.work import Driver
from benchmarks.chaos.world import World

NOT_AT_WORK = {"ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}


@dataclass
class Blow:
    """struck: in words; "" while there was nothing. again: the command must be given again, since the driver is gone too.
    mend_at: when (time.monotonic) an outage ends; None: when the run has given up."""

    struck: str = ""
    again: bool = False
    outage: bool = False
    mend_at: float | None = field(default=None)


def strike(moment: Moment, world: World, driver: Driver) -> Blow:
    """Do it now."""
    _, outage_s, chance = moment.draw()
    if moment.fault in ("worker", "actor"):
        wanted = TITLES[moment.verb, moment.fault]
        victims = [process for process in world.cluster.workers() if wanted in title(process)]
        if not victims:
            return Blow()
        victim = victims[int(chance * len(victims))]
        name = title(victim)
        kill([victim])
        return Blow(f"1 of {len(victims)} processes {name}")
    if moment.fault == "node":
        node = world.cluster.nodes[int(chance * len(world.cluster.nodes))]
        busy = sorted({name for process in node.family() if (name := title(process)).startswith("ray::")} - NOT_AT_WORK)
        count = world.cluster.lose_node(node)
        return Blow(f"a node's {count} processes, at work: {', '.join(busy) or 'none'}")
    if moment.fault == "driver":
        driver.kill()
        return Blow("the driver", again=True)
    if moment.fault == "head":
        count = world.lose_head()
        driver.kill()
        return Blow(f"the head's {count} processes and the driver", again=True)
    if moment.fault == "disk":
        free = world.disk.fill()
        return Blow(
            f"the disk's last {free // 1024} KiB, for {outage_s:.1f} s",
            outage=True,
            mend_at=time.monotonic() + outage_s,
        )
    torn = world.proxy.cut()
    if moment.variant == "for good":
        return Blow(f"{torn} connections to the store, until the run gave up", outage=True)
    return Blow(
        f"{torn} connections to the store, for {outage_s:.1f} s", outage=True, mend_at=time.monotonic() + outage_s
    )


def mend(moment: Moment, world: World) -> None:
    """End the outage."""
    if moment.fault == "disk":
        world.disk.free()
    elif moment.fault == "store":
        world.proxy.mend()


# What the last words of a run must name when an outage has ended it.
NAMED = {"disk": ("No space left", "errno 28", "ENOSPC"), "store": ("s3://", "qskd-chaos", "the store")}


def names_the_cause(moment: Moment, said: str) -> bool:
    return any(word in said for word in NAMED[moment.fault])


def judge_end(moment: Moment, blow: Blow, commands: Sequence[Mapping[str, Any]], limit_s: float) -> str:
    """ "" or what is wrong with how the commands ended, in their order. A run goes on by itself, unless its driver is gone,
    or an outage has ended it with an error that names it; then the same command finishes it."""
    ends = [command["ended"] for command in commands]
    if ends[-1] != "exit code 0":
        return f"never ended well: {', '.join(ends)}"
    if "hung" in ends:
        return f"hung for {limit_s:.0f} s, and ended when the command was given again"
    if len(ends) > (2 if blow.again or blow.outage else 1):
        return f"the command had to be given {len(ends)} times: {', '.join(ends)}"
    if blow.outage and len(ends) == 2 and not names_the_cause(moment, commands[0]["said"]):
        return "the outage ended it with an error that does not name it"
    return ""
