"""The generated page docs/claims/README.md, and the verdicts on a console. All from the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from claims import harness
from claims.harness import Experiment
from claims.statistics import ALPHA, Finding, findings, interval, seeds_needed, verdict
from claims.tables import markdown, number

PAGE = harness.RESULTS / "README.md"
NOT_RUN = "not run"
SIGNS = {"above": ">", "below": "<", "within": "within ±"}


def load(experiment: Experiment) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """What was stored of it and its runs as a table, or None if it has not run as it is set."""
    found = harness.stored(experiment)
    return (found, harness.frame(found["runs"])) if found else None


def draw(experiment: Experiment) -> None:
    """Write its picture, if it has run."""
    if loaded := load(experiment):
        experiment.figure(loaded[1]).savefig(experiment.picture)


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def cells(finding: Finding) -> list[str]:
    """One finding as a row: what was predicted, and what came out."""
    prediction = finding.prediction
    expected = f"{SIGNS[prediction.direction]} {number(prediction.threshold)}".replace("± ", "±")
    return [
        prediction.says,
        prediction.measure,
        prediction.baseline,
        expected,
        f"{len(finding.numbers)} of {prediction.runs}",
        number(finding.mean),
        number(finding.spread),
        f"t = {number(finding.statistic)}",
        p_value(finding.p),
        "yes" if finding.holds else "no",
    ]


HEADS = (
    "prediction",
    "measure (one number a seed)",
    "against",
    "expected",
    "n",
    "mean",
    "s.d.",
    "statistic",
    "p (Holm)",
    "holds",
)


def print_verdicts(experiments: Sequence[Experiment], console: Console) -> None:
    """Every verdict, recomputed from the JSON of docs/claims/."""
    for experiment in experiments:
        loaded = load(experiment)
        if not loaded:
            console.print(f"{experiment.title}: {NOT_RUN} at the present settings")
            continue
        found = findings(experiment.predictions, loaded[1])
        table = Table(title=f"{experiment.title}: {verdict(found)}", title_justify="left")
        shown = [0, 3, 4, 5, 6, 7, 8, 9]
        for k in shown:
            table.add_column(HEADS[k], justify="left" if k == 0 else "right")
        for finding in found:
            row = cells(finding)
            table.add_row(*(row[k] for k in shown))
        console.print(table)


def examined(finding: Finding) -> str:
    """A prediction that does not hold: how far it is off, and whether more seeds would help."""
    prediction = finding.prediction
    low, high = interval(finding)
    said = (
        f"*{prediction.says}*: {prediction.measure} is {number(finding.mean)}, 95% interval "
        f"{number(low)} to {number(high)}, where {SIGNS[prediction.direction]} "
        f"{number(prediction.threshold)} was expected (p before Holm: {p_value(finding.raw)})."
    ).replace("± ", "±")
    needed = seeds_needed(finding)
    lost = sum(not isfinite(x) for x in finding.numbers)
    if lost:
        return (
            f"{said} {lost} of {len(finding.numbers)} ended in no number and are not in the mean."
        )
    if needed is None:
        return f"{said} The mean is on the wrong side of it: more such seeds would not help."
    if needed <= len(finding.numbers):
        return f"{said} Alone it would pass; among this many predictions it does not."
    return f"{said} The mean is on the right side: {needed} such seeds would have shown it alone."


def section(experiment: Experiment) -> str:
    """The part of the page that shows one experiment."""
    script = f"[claims/{experiment.name}.py](../../claims/{experiment.name}.py)"
    claim, _, done = experiment.method.strip().partition("\n\n")
    parts = [
        f"## {experiment.number}. {experiment.title}",
        f"**{claim}** Source: {experiment.source}. Script of the runs and the figure: {script}.",
        done,
    ]
    loaded = load(experiment)
    if not loaded:
        return "\n\n".join([*parts, f"**Verdict: {NOT_RUN}** at the present settings."])
    found, runs = loaded
    facts = findings(experiment.predictions, runs)
    holding = sum(fact.holds for fact in facts)
    parts += [
        f"**Verdict: {verdict(facts)}** — {holding} of {len(facts)} predictions hold.",
        f"![{experiment.title}]({experiment.picture.name})",
        markdown(pd.DataFrame([cells(fact) for fact in facts], columns=HEADS)),
    ]
    if failing := [examined(fact) for fact in facts if not fact.holds]:
        parts.append("What does not hold, examined:\n\n" + "\n".join(f"- {x}" for x in failing))
    if said := experiment.notes(runs):
        parts.append("What else the runs say:\n\n" + "\n".join(f"- {x}" for x in said))
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items())
    parts += [
        f"<details><summary>Every setting: mean ± s.d. over the runs</summary>\n\n"
        f"{markdown(experiment.table(runs))}\n\n</details>",
        f"{len(found['runs'])} runs, {found['processor_seconds'] / 60:.1f} minutes of processor "
        f"time; [{experiment.file.name}]({experiment.file.name}), {found['date']}, torch "
        f"{found['torch']}, Python {found['python']}, {found['machine']}.",
        f"<details><summary>Settings</summary>\n\n{settings}\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part)


INTRODUCTION = """# What the papers claim, tried

<!-- Written by `make claims`; edit claims/, not this page. -->

The reason for having many weight decays is a handful of claims about what decay does. Each is tried
here, small enough for a laptop, with the optimizers of this library and, where a paper used SGD,
with `torch.optim.SGD` beside them. Not everything comes out, and what does not is said.

`make claims` runs what has not run (results are kept in this folder, under a key made from all
that was set; `make claims ANEW=1` runs everything again). `make claims-verdicts` recomputes every
verdict from the JSON in seconds.

**How to read it.** Every prediction, its direction, its threshold and its number of runs stood in
the code before the runs. Settings were chosen in pilot runs with other seeds. A prediction turns
the runs of each seed into one number; the test is a one-sided Student's t of these numbers against
the threshold, twice for "within" (TOST). p is corrected for the number of predictions of an
experiment (Holm); a prediction holds if p < {alpha}. The verdict is computed: *reproduced* if all
hold, *partly* if some do, *not at this scale* if none does. "Tuned" means that the best of a grid
was taken, by data that the test does not use; what is not called tuned is not tuned."""


def write(experiments: Sequence[Experiment]) -> None:
    """Write the page."""
    rows, minutes = [], 0.0
    for experiment in experiments:
        loaded, said, holding = load(experiment), NOT_RUN, "–"
        if loaded:
            facts = findings(experiment.predictions, loaded[1])
            said, holding = verdict(facts), f"{sum(f.holds for f in facts)} of {len(facts)}"
            minutes += loaded[0]["processor_seconds"] / 60
        rows.append([f"{experiment.number}. {experiment.title}", f"**{said}**", holding])
    overview = markdown(pd.DataFrame(rows, columns=["claim", "verdict", "predictions that hold"]))
    cost = f"All runs together took {minutes:.0f} minutes of processor time, two at a time."
    sections = map(section, experiments)
    text = [INTRODUCTION.format(alpha=ALPHA), overview, cost, *sections]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n\n".join(text) + "\n")
