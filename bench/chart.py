"""The results as a picture: a panel for each question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.results import Results, Row
from bench.targets import PLAIN_DECAYS
from bench.workloads import WHOLE

OURS, OTHERS, INK, FAINT = "#c8385a", "#a9b6c3", "#22303c", "#e3e8ec"
BEFORE_LINES = {"facecolor": "white", "edgecolor": "none", "pad": 1}
LIGHT = {OURS: "#ecb9c5", OTHERS: "#dce2e8"}
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
MAKERS = (
    *("wdkernels", "wdkernels triton", "DeepSpeed", "apex"),
    *("torch fused", "torch foreach", "torch single"),
)
FUSED = MAKERS[:-2]
SUMS = tuple(f"wdkernels {method}" for method in ("AdamSWD", "AdamSPD rests", "AdamSPD fires"))
STORED = ("kahan", "nearest", "master_weights", "moments")
WHOLE_STEPS = ("clip", "EMA", "clip + EMA", "telemetry", "all", "all, measured")


class Bar(NamedTuple):
    label: str
    value: float
    text: str
    color: str
    heading: str = ""  # written above the first bar that has it
    beyond: float = 0  # how far a lighter bar goes on: the wall's time after the kernels'


def draw(results: Results, path: Path) -> None:
    m = results.machine
    threads = "" if results.on_gpu else f"{m['threads']} threads, "
    caption = (
        f"wdkernels {m['wdkernels']} and others on {m['device']}, {threads}torch {m['torch']}, "
        f"{results.date}. Contenders take turns; medians over the rounds."
    )
    if results.on_gpu:
        caption += "\nKernel times, where nothing else is said."
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 20))
        figure.subplots_adjust(
            left=0.14, right=0.95, bottom=0.03, top=0.91, wspace=0.5, hspace=0.34
        )
        figure.text(0.015, 0.972, "How fast is a step?", size=22, weight="bold")
        figure.text(0.015, 0.966, caption, size=12, va="top")
        for axes, panel in zip(figure.subplots(4, 2).flat, _panels(results), strict=True):
            panel(axes, results)
            if not axes.has_data():
                axes.text(0.5, 0.5, "not part of this run", ha="center", transform=axes.transAxes)
                axes.set_axis_off()
        figure.savefig(path, dpi=90)


def _memory(axes: Axes, results: Results, workload: str) -> None:
    rows = _adamw(results, workload, MAKERS)
    subject = f"AdamW on {rows[0].title}, share of the measured limit" if rows else ""
    _title(axes, "As fast as memory?", subject)
    shares = [(row, share) for row in rows if (share := results.of_limit(row))]
    _bars(axes, (Bar(r.maker, share, f"{share:.0%}", _color(r)) for r, share in shares), line=1)


def _models(axes: Axes, results: Results) -> None:
    _title(axes, "Faster on whole models?", "AdamW, milliseconds a step")
    rows = [row for name in ("gpt2", "resnet50") for row in _adamw(results, name, FUSED)]
    _bars(axes, (Bar(r.maker, r.ms(), f"{r.ms():.3g} ms", _color(r), r.title) for r in rows))


def _models_on_gpu(axes: Axes, results: Results) -> None:
    _title(axes, "Faster on whole models?", "AdamW's steps per second over torch fused's")
    bars = []
    for name in ("gpt2", "resnet50", "llama3-8b"):
        for row in _adamw(results, name, FUSED):
            if speed := results.of_fused(row):
                text = f"{speed:.2f}×, {_number(row.ms())} ms"
                bars.append(Bar(row.maker, speed, text, _color(row), row.title))
    _bars(axes, bars, line=1, room=1.5)


def _clocks(axes: Axes, results: Results) -> None:
    subject = "AdamW, 10,000 × 64: ms of kernels, of the wall (pale)"
    _title(axes, "Does the host keep up?", subject)
    bars = []
    for row in _adamw(results, "10000x64", (*FUSED, "torch foreach")):
        kernel, wall = row.ms(), row.ms(wall=True)
        text = f"{_number(kernel)}, {_number(wall)} ms"
        bars.append(Bar(row.maker, kernel, text, _color(row), beyond=max(wall - kernel, 0)))
    _bars(axes, bars, room=1.4)


def _decays(axes: Axes, results: Results, workload: str) -> None:
    bars = ((name, name.removeprefix("wdkernels "), "") for name in (*PLAIN_DECAYS, *SUMS))
    _over_adamw(axes, results, workload, "What does another decay cost?", "AdamW's", bars)


def _storage(axes: Axes, results: Results, workload: str) -> None:
    ours = (("", "stochastic"), *((f" {how}", how.replace("_", " ")) for how in STORED))
    bars = [(f"wdkernels AdamW bf16{method}", label, "wdkernels") for method, label in ours]
    bars += [(f"{maker} AdamW bf16", maker, "others") for maker in ("DeepSpeed", "torch fused")]
    _over_adamw(axes, results, workload, "What does bfloat16 save?", "AdamW's in float32", bars)


def _whole(axes: Axes, results: Results, workload: str) -> None:
    bars = [
        (
            f"{maker} AdamW {method}",
            method,
            "wdkernels" if maker == "wdkernels" else "separate passes",
        )
        for maker in ("wdkernels", "separate")
        for method in WHOLE_STEPS
    ]
    _over_adamw(axes, results, workload, "And the whole step?", "AdamW's alone", bars)


def _over_adamw(
    axes: Axes,
    results: Results,
    workload: str,
    question: str,
    adamws: str,
    bars: Iterable[tuple[str, str, str]],
) -> None:
    """Times over AdamW's of what is named; a label and a heading for each."""
    adamw = results.find(workload, "wdkernels AdamW")
    title = adamw.title.removesuffix(f", {WHOLE}") if adamw else ""
    _title(axes, question, f"{title}, time of a step over {adamws}" if adamw else "")
    if adamw is None:
        return
    drawn = []
    for name, label, heading in bars:
        if row := results.find(workload, name):
            time, bytes_ = row.time_over(adamw), row.bytes / adamw.bytes
            text = f"{time:.2f}×"
            if bytes_ != 1 and row.maker != "separate":  # whose passes move more than they must
                text += f", {bytes_:.2f}× the bytes"
            drawn.append(Bar(label, time, text, _color(row), heading))
    _bars(axes, drawn, line=1, room=1.7)


def _papers(axes: Axes, results: Results) -> None:
    _title(axes, "And the papers' own code?", "GPT-2 124M, time of a step over torch fused AdamW's")
    methods = ("AdamSWD", "AdamSPD rests", "AdamSPD fires")
    names = [f"{maker} {method}" for method in methods for maker in ("wdkernels", "paper")]
    rows = _rows(results, "gpt2", names)
    times = [(row, 1 / speed) for row in rows if (speed := results.of_fused(row))]
    _bars(axes, (Bar(r.maker, t, f"{_number(t)}×", _color(r), r.method) for r, t in times), line=1)


def _small(axes: Axes, results: Results, workloads: Iterable[str]) -> None:
    clock = "milliseconds by the wall's clock" if results.on_gpu else "milliseconds"
    _title(axes, "With many tensors?", f"AdamW here and in torch, {clock}, logarithmic")
    titles: list[str] = []
    for workload in workloads:
        rows = _adamw(results, workload, ("wdkernels", "torch fused"))
        if len(rows) < 2:
            continue
        y, times = len(titles), [row.ms(wall=True) for row in rows]
        axes.plot(times, [y, y], color=FAINT, linewidth=3, zorder=1)
        axes.scatter(times, [y, y], s=120, c=[_color(row) for row in rows], zorder=2)
        sides = ((-11, "right"), (11, "left"))
        for row, ms, (side, align) in zip(
            rows, times, sides if times[0] < times[1] else sides[::-1], strict=True
        ):
            _note(axes, _number(ms), (ms, y), (side, 0), ha=align, va="center")
            if not titles:
                _note(axes, row.maker, (ms, y), (0, 14), ha=align)
        speed = f"{_number(rows[1].time_over(rows[0], wall=True))}×"
        _note(axes, speed, (math.sqrt(times[0] * times[1]), y), (0, 5), ha="center", weight="bold")
        titles.append(rows[0].title)
    axes.set_xscale("log")
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.8)
    axes.margins(x=0.25)


def _groups(axes: Axes, results: Results) -> None:
    _title(axes, "And in many param groups?", "AdamW, 1,000 × 256, milliseconds, logarithmic")
    for maker in ("wdkernels", "torch fused", "torch foreach"):
        groups = ("", " (10 groups)", " (100 groups)")
        rows = _rows(results, "1000x256", (f"{maker} AdamW{suffix}" for suffix in groups))
        if not rows:
            continue
        color = _color(rows[0])
        points = [(row.groups, row.ms()) for row in rows]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=3, marker="o", markersize=10)
        for point in points:
            _note(axes, _number(point[1]), point, (0, 10), ha="center")
        _note(axes, maker, points[-1], (14, 0), va="center")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([1, 10, 100], ["1 group", "10 groups", "100 groups"])
    axes.set_yticks([])
    axes.set_yticks([], minor=True)
    axes.set_xlim(0.6, 1500)
    axes.margins(y=0.15)


def _panels(results: Results) -> tuple[Callable[[Axes, Results], None], ...]:
    if results.on_gpu:
        return (
            partial(_memory, workload="1G"),
            _models_on_gpu,
            partial(_storage, workload="1G-whole"),
            partial(_whole, workload="1G-whole"),
            partial(_decays, workload="1G"),
            _papers,
            partial(_small, workloads=("10000x64", "200x1M", "10x16M", "gpt2")),
            _clocks,
        )
    return (
        partial(_memory, workload="32M"),
        _models,
        partial(_storage, workload="gpt2-whole"),
        partial(_whole, workload="gpt2-whole"),
        partial(_decays, workload="gpt2"),
        _papers,
        partial(_small, workloads=("300x256", "1000x16", "1000x256", "10000x64")),
        _groups,
    )


def _rows(results: Results, workload: str, names: Iterable[str]) -> list[Row]:
    return [row for name in names if (row := results.find(workload, name))]


def _adamw(results: Results, workload: str, makers: Iterable[str]) -> list[Row]:
    return _rows(results, workload, (f"{maker} AdamW" for maker in makers))


def _color(row: Row) -> str:
    return OURS if row.maker.startswith("wdkernels") else OTHERS


def _title(axes: Axes, question: str, subject: str) -> None:
    axes.text(0, 1.11, question, size=15, weight="bold", transform=axes.transAxes)
    axes.text(0, 1.045, subject, transform=axes.transAxes)


def _note(
    axes: Axes, text: str, at: tuple[float, float], by: tuple[float, float], **how: Any
) -> None:
    """Text beside a point, `by` points of the typographic kind away from it."""
    axes.annotate(text, at, by, textcoords="offset points", **how)


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:#.2g}".rstrip(".")


def _bars(axes: Axes, bars: Iterable[Bar], line: float | None = None, room: float = 1.15) -> None:
    """Horizontal bars, the first on top, labelled with their values; `room` for the longest."""
    bars = list(bars)
    if not bars:
        return
    labels: list[str] = []
    for number, bar in enumerate(bars):
        if bar.heading and (number == 0 or bar.heading != bars[number - 1].heading):
            labels.append(bar.heading)
        y = len(labels)
        labels.append(bar.label)
        axes.barh(y, bar.value, color=bar.color, height=0.74)
        axes.barh(y, bar.beyond, left=bar.value, color=LIGHT[bar.color], height=0.74)
        # Where a bar ends just short of the line, its label stands beyond it.
        end = line if line and 0.8 * line < bar.value < line else bar.value + bar.beyond
        _note(axes, bar.text, (end, y), (5, 0), va="center", bbox=BEFORE_LINES)
    axes.set_yticks(range(len(labels)), labels)
    headings = {bar.heading for bar in bars}
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in headings else "normal")
    axes.set_xticks([])
    axes.set_xlim(0, room * max(bar.value + bar.beyond for bar in bars))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    if line is not None:
        axes.axvline(line, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
