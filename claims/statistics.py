"""Predictions, fixed before the runs, and what the runs make of them.

A prediction turns the runs of each seed into one number and says where the mean of these numbers
lies: above a threshold, below it, or within plus and minus it. One test serves all: Student's t of
the numbers against the threshold, one-sided; for "within" once against each side (TOST), the worse
of which counts. Numbers that are 1 or 0 are counted instead, by the exact binomial test against a
chance of one half. Within an experiment the p are Holm's, so that many predictions do not buy one
success. A prediction holds if its p is below ALPHA; the verdict follows from how many do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Literal

import pandas as pd
from scipy import stats

ALPHA = 0.05
Direction = Literal["above", "below", "within"]


@dataclass(frozen=True)
class Prediction:
    """What is expected, written before the runs."""

    says: str  # the sentence that the numbers are to support
    measure: str  # what the number of a seed is, and its unit
    numbers: Callable[[pd.DataFrame], pd.Series]  # by seed, or by pair of runs
    direction: Direction
    threshold: float
    runs: int  # how many numbers there are to be
    baseline: str  # what is compared with, and whether that was tuned
    test: Literal["t", "binomial"] = "t"


@dataclass(frozen=True)
class Finding:
    """What the runs say of a prediction; `p` is Holm's, `raw` is before that."""

    prediction: Prediction
    numbers: tuple[float, ...]
    mean: float
    spread: float  # standard deviation over the numbers
    statistic: float
    raw: float
    p: float
    holds: bool


def _one_sided(numbers: Sequence[float], threshold: float, above: bool) -> tuple[float, float]:
    """Student's t and its p; numbers without any spread are certain, or certainly not."""
    n, mean = len(numbers), sum(numbers) / len(numbers)
    spread = pd.Series(numbers).std()
    gap = mean - threshold if above else threshold - mean
    if spread == 0:
        return (inf, 0.0) if gap > 0 else (-inf, 1.0)
    t = gap / (spread / sqrt(n))
    return t, float(stats.t.sf(t, n - 1))


def _test(prediction: Prediction, numbers: Sequence[float]) -> tuple[float, float]:
    """The statistic and its p."""
    if len(numbers) != prediction.runs or not all(map(isfinite, numbers)):
        return nan, 1.0  # a run is missing, or ended in what is no number: nothing is shown by it
    threshold = prediction.threshold
    if prediction.test == "binomial":
        wins = round(sum(numbers))
        return float(wins), float(stats.binomtest(wins, len(numbers), 0.5, "greater").pvalue)
    if prediction.direction == "within":
        sides = _one_sided(numbers, -threshold, True), _one_sided(numbers, threshold, False)
        return min(sides)[0], max(p for _, p in sides)
    return _one_sided(numbers, threshold, prediction.direction == "above")


def findings(predictions: Sequence[Prediction], runs: pd.DataFrame) -> list[Finding]:
    """Each prediction beside what the runs gave, p corrected for how many there are (Holm 1979)."""
    all_numbers = [[float(x) for x in p.numbers(runs)] for p in predictions]
    tests = [_test(p, x) for p, x in zip(predictions, all_numbers, strict=True)]
    order = sorted(range(len(tests)), key=lambda k: tests[k][1])
    corrected, worst = [1.0] * len(tests), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, tests[k][1] * (len(tests) - rank)))
        corrected[k] = worst
    found = []
    for prediction, numbers, (statistic, raw), p in zip(
        predictions, all_numbers, tests, corrected, strict=True
    ):
        series = pd.Series(numbers, dtype=float).where(lambda x: x.abs() < inf)
        spread = float(series.std())
        found.append(
            Finding(
                prediction=prediction,
                numbers=tuple(numbers),
                mean=float(series.mean()),
                spread=spread,
                statistic=statistic,
                raw=raw,
                p=p,
                holds=p < ALPHA,
            )
        )
    return found


def verdict(found: Sequence[Finding]) -> str:
    """Reproduced if every prediction holds, partly if some do."""
    holding = sum(finding.holds for finding in found)
    if holding == len(found):
        return "reproduced"
    return "partly" if holding else "not at this scale"


def interval(finding: Finding) -> tuple[float, float]:
    """The mean's 95% confidence interval, by Student's t."""
    n = len(finding.numbers)
    if n < 2:
        return nan, nan
    half = float(stats.t.ppf(0.975, n - 1)) * finding.spread / sqrt(n)
    return finding.mean - half, finding.mean + half


def seeds_needed(finding: Finding) -> int | None:
    """How many numbers of this mean and spread would pass alone; None if no number would."""
    prediction, threshold = finding.prediction, finding.prediction.threshold
    if prediction.direction == "within":
        gap = threshold - abs(finding.mean)
    else:
        gap = (finding.mean - threshold) * (1 if prediction.direction == "above" else -1)
    spread = finding.spread
    if prediction.test == "binomial" or not (gap > 0 and isfinite(spread)):
        return None
    if spread == 0:
        return 2
    counts = range(2, 1001)
    return next((n for n in counts if stats.t.sf(gap * sqrt(n), n - 1, 0, spread) < ALPHA), None)


def by_seed(runs: pd.DataFrame, value: str, column: str) -> pd.DataFrame:
    """The mean of a value for each seed (rows) and each name in the column (columns)."""
    named = runs[runs[column].notna()]  # other parts of an experiment have no such column
    return named.pivot_table(index="seed", columns=column, values=value, dropna=False)


def best(runs: pd.DataFrame, family: str, choice: Sequence[str], score: str) -> pd.DataFrame:
    """Of each family only the runs at its best setting: the lowest mean score over the seeds."""
    scores = runs.assign(**{score: runs[score].fillna(float("inf"))})
    means = scores.groupby([family, *choice], dropna=False)[score].mean().reset_index()
    chosen = means.loc[means.groupby(family)[score].idxmin(), [family, *choice]]
    return runs.merge(chosen, on=[family, *choice])


def at_an_edge(runs: pd.DataFrame, tuned: pd.DataFrame, family: str, setting: str) -> list[str]:
    """The families whose best setting is the lowest or the highest of their grid.

    What lies beyond was not tried: they may be less than well tuned.
    """
    found = []
    for name, group in runs.groupby(family, sort=False):
        grid = sorted(group[setting].unique())
        value = tuned[tuned[family] == name][setting].iloc[0]
        if len(grid) > 1 and value in (grid[0], grid[-1]):
            found.append(f"{name} ({setting} {value:g})")
    return found
