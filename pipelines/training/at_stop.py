"""What a training that a signal ends says of itself: how far it came, and where the same command goes on."""

from __future__ import annotations

from pipelines.run.folder import Folder
from pipelines.run.history import last_step, read_history
from pipelines.run.logs import say
from pipelines.training.checkpoint_list import last_report
from qskd.errors import QskdError


def say_where_it_stopped(folder: Folder, name: str, total_steps: int) -> None:
    """The last step that is kept: each report of a training comes with a checkpoint. Nothing where a store does not answer: the
    program is to end."""
    try:
        last = last_report(folder)
        step = max(last_step(read_history(folder)), last[0]["step"] if last else 0)
    except (QskdError, OSError):
        return
    if not step:
        told = f"stopped before its first checkpoint: it will begin at step 0 of {total_steps} again"
    elif step >= total_steps:
        told = f"stopped after its last step, {step} of {total_steps}: what is left is to write the student down"
    else:
        # Ray ends the workers after this is said, and meanwhile they may make a step more.
        told = f"stopped at step {step} of {total_steps}, its last checkpoint; it will go on there or a little later"
    say(f"\n{name}: {told}", run=name, step=step)
