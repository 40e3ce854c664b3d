"""Train without a teacher (`qskd train`): baselines, and teachers.

python -m pipelines.train configs/shapes_teacher.yaml
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
    """Train a detector without a teacher: baselines, and teachers. The same command again goes on where it was stopped."""
    check_all_fields(all_fields=all_fields, dry_run=dry_run)
    from pipelines.training.driver import start

    start("train", recipe, set, dry_run=dry_run, all_fields=all_fields, restart=restart)


if __name__ == "__main__":
    run(command, "train")
