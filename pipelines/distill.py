"""Train a student with a teacher (`qskd distill`).

python -m pipelines.distill student.yaml --set compute.workers=8
"""

from __future__ import annotations

from pipelines.command import AllFields, DryRun, Methods, Recipe, Restart, Set, check_all_fields, run


def command(
    recipe: Recipe = None,
    set: Set = None,
    methods: Methods = None,
    dry_run: DryRun = False,
    all_fields: AllFields = False,
    restart: Restart = False,
) -> None:
    """Distil a student from a teacher. The same command again goes on where it was stopped."""
    check_all_fields(all_fields=all_fields, dry_run=dry_run)
    from pipelines.training.driver import start

    start("distill", recipe, set, dry_run=dry_run, all_fields=all_fields, restart=restart)


if __name__ == "__main__":
    run(command, "distill")
