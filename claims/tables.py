"""Tables of means and spreads, and their Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd


def number(x: float) -> str:
    """A number with 3 significant digits; a dash if it is none."""
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if math.isnan(x):
        return "–"
    if x == 0 or 0.01 <= abs(x) < 10_000:
        digits = 2 if x == 0 else max(0, 2 - math.floor(math.log10(abs(x))))
        return f"{x:.{min(digits, 3)}f}"
    return f"{x:.2g}"


def mean_and_spread(values: pd.Series) -> str:
    """Mean ± standard deviation over the runs."""
    values = values.astype(float).dropna()
    return f"{number(values.mean())} ± {number(values.std())}" if len(values) else "–"


def summary(runs: pd.DataFrame, by: Sequence[str], shown: Mapping[str, str]) -> pd.DataFrame:
    """A row for each setting in `by`: the number of runs, and mean ± spread of the columns."""
    rows = []
    for setting, group in runs.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, setting, strict=True)) | {"n": len(group)}
        rows.append(row | {head: mean_and_spread(group[column]) for column, head in shown.items()})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""

    def cell(x: object) -> str:
        return (number(x) if isinstance(x, float) else str(x)).replace("|", "\\|")

    cells = [[cell(x) for x in row] for row in table.to_numpy(object)]
    lines = [[cell(head) for head in table.columns], ["---"] * len(table.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
