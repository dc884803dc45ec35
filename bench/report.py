"""The results as a table on the screen, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import chart, distributed, machine
from bench.results import Results, Row
from bench.targets import targets

ON_CPU = """\
Contenders take turns, one timed step each per round, on the same weights, gradients and state;
gradients are fresh in each step, as training makes them, and with many small tensors an untimed
step precedes the timed one. **ms** is the median time of `optimizer.step()`; a ratio is the median
of the ratios within rounds."""
ON_GPU = """\
Contenders take turns on the same weights, gradients and state; gradients are fresh in each step, as
training makes them. A turn is two steps. The first is queued while the device is kept waiting:
**kernel ms** is the time between device events before and after it, what the step costs where the
host runs ahead, as in training. (Where a step makes the host wait or queues thousands of kernels,
the host's time is in it.) The second starts with nothing under way: **wall ms** is the host's clock
from there until all is done. Times are medians over the rounds, a ratio is the median of the ratios
within rounds; those in a column that does not say wall are of kernel times."""
NOTES = """
**GB/s** counts the bytes that a step of the method must move, however it is programmed: 28 per
float32 element for AdamW (weights, gradient and two moments read, all but the gradient written), 4
more for an anchor, 8 more for amsgrad, 4 more for AdamSWD and for clipping, which need the sum over
all gradients before they write, 8 more for an average of the weights, none for telemetry. With
weights and gradients in bfloat16 it is 22, where moments are float32, and 14, where they are
bfloat16; 4 more for what *kahan* keeps, 6 more for *master_weights*.
**Of limit** is the share of the GB/s of {limit}
(bench/limit.py).
**Over fused** is the speed over that of torch.optim.AdamW(fused=True), whatever the method{groups}.

*wdkernels* is this project, *paper* the papers' formulas in the style of research code
(bench/papers.py), *DeepSpeed multi* one call for all tensors of a group (bench/deepspeed.py).
*Scheduled* is a learning rate that changes in each step, *schedule* a decay that does. Workloads on
one thread have a process of their own, with OMP_NUM_THREADS=1. AdamSPD *fires* where each step's
decay fires for every tensor, and *rests* where for none; *zero* is an anchor at zero instead of the
initial weights.

*bf16* is wdkernels' default there, float32 moments and stochastic rounding; DeepSpeed has float32
moments too and torch has bfloat16 ones, both round to the nearest. *Clip* is clipping of the
global norm, *EMA* an average of the weights, *telemetry* each step measured; *all* is the three of
them with every tenth step measured, so that a median is that of a step which is not, and *all,
measured* with each. *Separate* does the same with torch's own functions, one after the other:
clip_grad_norm_, fused AdamW, _foreach_lerp_, and of telemetry no more than the norms of weights and
gradients (bench/separate.py).

*Sharded* workloads are FSDP2's (fully_shard) over {ranks} processes (bench/distributed.py), which
begin a step together; it takes what it takes in the slowest of them, and GB/s are those of all.
*Plain* has the same shards as tensors of their own. **Collectives** are those of a step in a
process."""
LOOP = "a loop that moves the streams of AdamW with one addition each"
COPY = "a copy of two gigabytes within its memory, bytes read plus written"
GROUPS = """, and
**10 groups** the time with the tensors dealt out to so many param groups over the time with one"""


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
    for line in _absences(results):
        console.print(line)


def write(results: Results, folder: Path) -> Path:
    """JSON, Markdown and a chart, whose common name is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / machine.slug(results.machine)
    base.with_suffix(".json").write_text(to_json(results))
    base.with_suffix(".md").write_text(to_markdown(results, f"{base.name}.png"))
    chart.draw(results, base.with_suffix(".png"))
    return base


def to_json(results: Results) -> str:
    """Machine, date, commit, and a line for each row."""
    head = {
        "machine": results.machine,
        "date": results.date,
        "commit": results.commit,
        "absent": [absence._asdict() for absence in results.absent],
    }
    lines = ",\n".join(f"  {json.dumps(_entry(row, results))}" for row in results.rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def to_markdown(results: Results, picture: str) -> str:
    return "\n".join(_markdown(results, picture)) + "\n"


def _entry(row: Row, results: Results) -> dict[str, Any]:
    times: dict[str, Any] = {}
    for name, wall in _clocks(results).items():
        times[f"{name}ms"] = _short(row.ms(wall))
        times[f"{name}quartiles_ms"] = [_short(ms) for ms in row.quartiles_ms(wall)]
        times[f"{name}over_torch_fused"] = _short(results.of_fused(row, wall))
    return {
        "workload": row.workload,
        "maker": row.maker,
        "method": row.method,
        "groups": row.groups,
        "bytes": row.bytes,
        **times,
        **_if_sharded(row),
        "GB/s": _short(row.gbs),
        "of_limit": _short(results.of_limit(row)),
        "rounds": len(row.seconds),
    }


def _if_sharded(row: Row) -> dict[str, Any]:
    if row.collectives is None:
        return {}
    return {"us_each": _short(row.us_each), "collectives": row.collectives}


def _clocks(results: Results) -> dict[str, bool]:
    """A prefix for each clock, and whether it is the wall's."""
    return {"kernel_": False, "wall_": True} if results.on_gpu else {"": False}


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def _single_group(results: Results, workload: str) -> list[Row]:
    return [row for row in results.rows if row.workload == workload and row.groups == 1]


def _headings(results: Results, workload: str) -> tuple[str, ...]:
    counts = dict.fromkeys(row.groups for row in results.rows if row.workload == workload)
    groups = (f"{count} groups" for count in counts if count > 1)
    times = ("kernel ms", "wall ms") if results.on_gpu else ("ms",)
    fused = ("over fused", "wall over fused") if results.on_gpu else ("over fused",)
    sharded = any(map(_if_sharded, _single_group(results, workload)))
    more = ("µs a parameter", "collectives") if sharded else ()
    return ("contender", *times, "GB/s", "of limit", *fused, *groups, *more)


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    clocks = _clocks(results).values()
    limit = results.of_limit(row)
    fused = (results.of_fused(row, wall) for wall in clocks)
    grouped = (
        other
        for other in results.rows
        if (other.workload, other.maker, other.method) == (row.workload, row.maker, row.method)
        and other.groups > 1
    )
    return (
        row.name,
        *(f"{row.ms(wall):#.3g}".rstrip(".") for wall in clocks),
        f"{row.gbs:#.3g}".rstrip("."),
        "unmeasured" if limit is None else f"{limit:.0%}",
        *("" if speed is None else f"{speed:.3g}×" for speed in fused),
        *(f"{other.time_over(row):.2f}×" for other in grouped),
        *(f"{x:.3g}" for x in _if_sharded(row).values()),
    )


def _markdown(results: Results, picture: str) -> Iterator[str]:
    m = results.machine
    on_gpu = results.on_gpu
    grouped = any(row.groups > 1 for row in results.rows)
    yield f"# Speed on {machine.title(m)}\n"
    yield f"![chart]({picture})\n"
    command = "make gpu" if on_gpu else "make bench"
    yield f"Measured on {results.date} at commit {results.commit} by `{command}`.\n"
    yield from _table(("", ""), m.items())
    yield "\n" + (ON_GPU if on_gpu else ON_CPU)
    yield NOTES.format(
        limit=COPY if on_gpu else LOOP, groups=GROUPS if grouped else "", ranks=distributed.RANKS
    )
    yield "\n## Targets\n"
    yield from _table(("", "target", "measured", ""), _answers(results))
    for workload in results.workloads():
        rows = _single_group(results, workload)
        yield f"\n## {rows[0].title}\n"
        yield from _table(_headings(results, workload), (_cells(row, results) for row in rows))
    if results.absent:
        yield "\n## Not measured\n"
        yield from (f"- {line}" for line in _absences(results))


def _absences(results: Results) -> Iterator[str]:
    for workload, name, reason in results.absent:
        yield f"{workload}: {name} ({reason})"


def _answers(results: Results) -> Iterator[tuple[str, ...]]:
    for target in targets(results):
        found = {
            workload: figure
            for workload in target.workloads
            if (figure := target.measured(results, workload)) is not None
        }
        missed = [workload for workload, figure in found.items() if not target.met(figure)]
        verdict = "met" if found else "not measured"
        if target.bound is None:
            verdict = ""
        if missed:
            verdict = f"**missed** on {', '.join(missed)}"
        figures = (f"{figure:.3g}{target.unit} ({name})" for name, figure in found.items())
        goal = "" if target.bound is None else f"{target.sign} {target.bound:g}{target.unit}"
        yield (target.question, goal, ", ".join(figures), verdict)


def _table(headings: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
