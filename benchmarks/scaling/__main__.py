"""Weak scaling: one and two workers measured, up to 64 by a model that is fed with what was measured.

python -m benchmarks.scaling                     measure, print, and (--record FILE) keep what was found
python -m benchmarks.scaling --from FILE         the model again, from a record
python -m benchmarks.scaling --from FILE --step-ms 180 --gradient-mb 123 --bandwidth-gbit 25 --cpus inf ...
                                                 the same for numbers of your own: nothing of an accelerator is assumed

The quickstart's student with its teacher's cache, batch 16 for each worker, through the real pipeline under Ray Train on one
machine, one thread for each worker; step times are the runs' own metrics. What two workers on one machine can reach at
most is measured beside: two bare processes at once, without Ray and without each other's gradients, over one alone. The
difference is ours: Ray, the data, the all-reduce.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.scaling.model import WORKERS, Costs, all_reduce_seconds, step, with_step
from benchmarks.timing import Ratio, Report, print_table, ratios
from benchmarks.work_folder import check_record
from qskd.errors import QskdError

GOAL = 0.9
BEGIN, END = "<!-- benchmarks.scaling -->", "<!-- end -->"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def report_of(record: object) -> Report:
    from benchmarks.scaling.measure import Record

    assert isinstance(record, Record)
    report = Report("Weak scaling: one and two workers", list(record.facts))
    pipeline, bare = record.pipeline_s, record.bare_s
    mine, limit = ratios(pipeline["1"], pipeline["2"]), ratios(bare["1"], bare["2"])

    def figures(top: Sequence[float], bottom: Sequence[float]) -> str:
        return f"{ms(statistics.median(top))} / {ms(statistics.median(bottom))}"

    report.ratios += [
        Ratio("efficiency of two workers: step of one / of two", mine, figures(pipeline["1"], pipeline["2"]), GOAL),
        Ratio("the machine's limit: bare step alone / two at once", limit, figures(bare["1"], bare["2"])),
        Ratio("ours: efficiency / machine's limit", ratios(mine, limit), "", GOAL),
        Ratio("one worker: bare step / pipeline's", ratios(bare["1"], pipeline["1"]), ""),
    ]
    one, two = record.probes["1"], record.probes["2"]
    waits = " and ".join(ms(statistics.median(record.waited_s[name])) for name in ("1", "2"))
    report.figures += [
        ("a step's wait for its batch, one worker and two", waits),
        (f"all-reduce of the gradients ({two['gradient_bytes'] / 1e6:.2f} MB), two workers", ms(two["gradients_s"])),
        ("all-reduce of 128 bytes", ms(two["small_s"])),
        (f"all-reduce of {two['large_bytes'] / 1e6:.0f} MB", ms(two["large_s"])),
        ("asking whether a node goes away, one worker and two", f"{ms(one['notice_s'])} and {ms(two['notice_s'])}"),
        ("  for each step, when asked every ten", ms(two["notice_s"] / 10)),
        ("a report with a checkpoint, one worker and two", f"{ms(one['report_s'])} and {ms(two['report_s'])}"),
        ("a reader's time for an image: decoded, kept", f"{ms(record.loader_decoded_s)}, {ms(record.loader_kept_s)}"),
        *((f"a coordinator's time for a block, {n} worker(s)", ms(taken)) for n, taken in record.block_s.items()),
    ]
    return report


def checked(record: object) -> list[list[str]]:
    """The model beside the two points that were measured."""
    from benchmarks.scaling.measure import Record

    assert isinstance(record, Record)
    costs, rows = record.costs(), []
    for workers, cpus in ((1, 2.0), (2, 1.0)):
        found = statistics.median(record.pipeline_s[str(workers)])
        said = step(replace(costs, report_s=0.0, report_worker_s=0.0), workers, cpus)
        error = said.seconds / found - 1
        rows.append([str(workers), ms(found), ms(said.seconds), f"{100 * error:+.0f} %", said.limit])
    return rows


def table(costs: Costs, alone_cpus: float | None) -> list[list[str]]:
    one, rows = step(costs, 1, alone_cpus).seconds, []
    for workers in WORKERS:
        made = step(costs, workers, alone_cpus if workers == 1 else None)
        slowest = made.worker_s - costs.overhead_s - all_reduce_seconds(costs, workers)
        shown = [slowest, all_reduce_seconds(costs, workers), made.readers_s, made.coordinator_s]
        rows.append([str(workers), f"{one / made.seconds:.2f}", ms(made.seconds), *map(ms, shown), made.limit])
    return rows


HEAD = ("workers", "efficiency", "step", "slowest", "all-reduce", "readers", "coordinator", "waits for")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def around_marks(document: Path) -> tuple[str, str]:
    """What stands before and after the document's two marks. QskdError where it has none."""
    text = document.read_text() if document.is_file() else ""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise QskdError(
            str(document), f"no {BEGIN} ... {END}", "a Markdown file with these marks", "write them into it"
        )
    return before, after


def write_into(document: Path, record: object) -> None:
    """Between the document's two marks: the measured ratios and figures, the model's check and its table."""
    from benchmarks.scaling.measure import Record

    assert isinstance(record, Record)
    report = report_of(record)
    found = [
        [r.name, r.figures, f"{r.value:.2f}", f"{min(r.rounds):.2f} to {max(r.rounds):.2f}"] for r in report.ratios
    ]
    parts = [
        markdown(("measured", "medians", "ratio", "rounds"), found),
        markdown(("measured", ""), [list(row) for row in report.figures]),
        "The model beside what was measured:",
        markdown(("workers", "measured", "model", "error", "waits for"), checked(record)),
        "The model for as many workers, two to a machine like this one, a reader for each, and this machine's loopback as "
        "the network between all of them:",
        markdown(HEAD, table(record.costs(), 2.0)),
    ]
    before, after = around_marks(document)
    document.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")


def what_if(costs: Costs, given: argparse.Namespace) -> Costs:
    """The costs with those that the command line names put in their place."""
    if given.step_ms:
        costs = replace(with_step(costs, given.step_ms / 1000), overhead_s=0.0)
    named = {
        "gradient_bytes": given.gradient_mb and given.gradient_mb * 1e6,
        "bytes_per_s": given.bandwidth_gbit and given.bandwidth_gbit * 1e9 / 8,
        "latency_s": given.latency_us and given.latency_us / 1e6,
        "images": given.images,
        "loader_image_s": given.loader_ms and given.loader_ms / 1000,
        "readers": given.readers,
        "run_steps": given.run_steps,
        "block_s": given.block_ms and given.block_ms / 1000,
        "cpus": given.cpus,
        "report_steps": given.report_steps,
    }
    return replace(costs, **{name: value for name, value in named.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> Report | None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240, help="of each run; a multiple of 40, more than 80")
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--record", type=Path, help="keep what was measured in this JSON file")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: take this record")
    parser.add_argument("--write", type=Path, help="put the tables between this Markdown file's marks")
    mine = parser.add_argument_group("what if (each replaces what was measured here)")
    mine.add_argument("--step-ms", type=float, help="an accelerator's step on data that is there")
    mine.add_argument("--images", type=int, help="of one worker's batch")
    mine.add_argument("--gradient-mb", type=float, help="bytes that a step reduces: 4 for each trained parameter")
    mine.add_argument("--bandwidth-gbit", type=float, help="of the network between two workers, Gbit/s")
    mine.add_argument("--latency-us", type=float, help="of a message between two workers")
    mine.add_argument("--loader-ms", type=float, help="a reader's time for an image")
    mine.add_argument("--readers", type=float, help="reader processes for each worker")
    mine.add_argument("--run-steps", type=int, help="steps in a block")
    mine.add_argument("--block-ms", type=float, help="a coordinator's time for a block of Ray Data")
    mine.add_argument("--cpus", type=float, help="for each worker; inf: enough beside the accelerators")
    mine.add_argument("--report-steps", type=float, help="steps between two reports")
    given = parser.parse_args(arguments)

    from benchmarks.scaling.measure import Record, as_tree, measure

    check_record(given.record, Record)
    if given.write:
        around_marks(given.write)  # before the measuring, not after it
    if given.source:
        record = Record(**json.loads(given.source.read_text()))
    else:
        rounds, steps = (1, 120) if given.quick else (given.rounds, given.steps)
        record = measure(rounds, steps, 2.0 if given.quick else 8.0, 40 if given.quick else 160)
    if given.record:
        given.record.write_text(json.dumps(as_tree(record)))
    report, costs = report_of(record), record.costs()
    report.print()
    print("\nThe model beside what was measured")
    print_table(("workers", "measured", "model", "error", "waits for"), checked(record))
    changed = what_if(costs, given)
    print(
        "\nThe model" + (", with the numbers given" if changed != costs else ", two workers to a machine like this one")
    )
    print_table(HEAD, table(changed, 2.0 if changed.cpus == costs.cpus else None))
    if given.write:
        write_into(given.write, record)
    return report


if __name__ == "__main__":
    main()
    sys.exit(0)
