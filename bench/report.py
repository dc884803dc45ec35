"""The results as a table on the screen, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import Results, Row
from bench.targets import TARGETS

NOTES = """\
Contenders take turns, one timed step each per round, on the same weights, gradients and state;
gradients are fresh in each step, as training makes them, and with many small tensors an untimed
step precedes the timed one. **ms** is the median time of `optimizer.step()`; a ratio is the median
of the ratios within rounds. **GB/s** counts the bytes that a step of the method must move, however
it is programmed: 28 per float32 element for AdamW (weights, gradient and two moments read, all but
the gradient written), 4 more for an anchor, 8 more for amsgrad, 4 more for AdamSWD, which needs the
sum over all gradients before it writes. **Of limit** is the share of the
GB/s of a loop that reads and writes the streams of AdamW with one addition each (bench/limit.py).
**Over fused** is the speed over that of torch.optim.AdamW(fused=True), whatever the method, and
**10 groups** the time with the tensors dealt out to so many param groups over the time with one.

*wdkernels* is this project, *eager* its formulas in plain PyTorch, *paper* the papers' formulas in
the style of research code (bench/papers.py). AdamSPD *fires* where each step's decay fires for
every tensor, and *rests* where for none; *zero* is an anchor at zero instead of the initial
weights."""


def print_table(results: Results, console: Console) -> None:
    for workload in results.workloads():
        rows = _single_group(results, workload)
        table = Table(title=rows[0].title, title_justify="left")
        table.add_column("contender", no_wrap=True)
        for heading in _headings(results, workload)[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row, results), style="bold" if row.maker == "wdkernels" else "")
        console.print(table)


def to_json(results: Results) -> str:
    """Machine, date, commit, and a line for each row."""
    head = {"machine": results.machine, "date": results.date, "commit": results.commit}
    lines = ",\n".join(f"  {json.dumps(_entry(row, results))}" for row in results.rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def to_markdown(results: Results, chart: str) -> str:
    return "\n".join(_markdown(results, chart)) + "\n"


def _entry(row: Row, results: Results) -> dict[str, Any]:
    return {
        "workload": row.workload,
        "maker": row.maker,
        "method": row.method,
        "groups": row.groups,
        "bytes": row.bytes,
        "ms": _short(row.ms),
        "quartiles_ms": [_short(ms) for ms in row.quartiles_ms],
        "GB/s": _short(row.gbs),
        "of_limit": _short(results.of_limit(row)),
        "over_torch_fused": _short(results.of_fused(row)),
        "rounds": len(row.seconds),
    }


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def _single_group(results: Results, workload: str) -> list[Row]:
    return [row for row in results.rows if row.workload == workload and row.groups == 1]


def _headings(results: Results, workload: str) -> tuple[str, ...]:
    counts = dict.fromkeys(row.groups for row in results.rows if row.workload == workload)
    groups = (f"{count} groups" for count in counts if count > 1)
    return ("contender", "ms", "GB/s", "of limit", "over fused", *groups)


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    limit, fused = results.of_limit(row), results.of_fused(row)
    grouped = (
        other
        for other in results.rows
        if (other.workload, other.maker, other.method) == (row.workload, row.maker, row.method)
        and other.groups > 1
    )
    return (
        row.name,
        f"{row.ms:#.3g}".rstrip("."),
        f"{row.gbs:#.3g}".rstrip("."),
        "unmeasured" if limit is None else f"{limit:.0%}",
        "" if fused is None else f"{fused:.3g}×",
        *(f"{other.time_over(row):.2f}×" for other in grouped),
    )


def _markdown(results: Results, chart: str) -> Iterator[str]:
    m = results.machine
    yield f"# Speed on {m['device']}, {m['cores']} cores\n"
    yield f"![chart]({chart})\n"
    yield f"Measured on {results.date} at commit {results.commit} by `make bench`.\n"
    yield from _table(("", ""), m.items())
    yield "\n" + NOTES
    yield "\n## Targets\n"
    yield from _table(("", "target", "measured", ""), _answers(results))
    for workload in results.workloads():
        rows = _single_group(results, workload)
        yield f"\n## {rows[0].title}\n"
        yield from _table(_headings(results, workload), (_cells(row, results) for row in rows))


def _answers(results: Results) -> Iterator[tuple[str, ...]]:
    for target in TARGETS:
        found = {
            workload: figure
            for workload in target.workloads
            if (figure := target.measured(results, workload)) is not None
        }
        missed = [workload for workload, figure in found.items() if not target.met(figure)]
        verdict = "met" if found else "not measured"
        if missed:
            verdict = f"**missed** on {', '.join(missed)}"
        figures = (f"{figure:.3g}{target.unit} ({name})" for name, figure in found.items())
        goal = f"{target.sign} {target.bound:g}{target.unit}"
        yield (target.question, goal, ", ".join(figures), verdict)


def _table(headings: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
