"""How figures look; each experiment draws its own beside its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")
GRAY = "#8a8a8a"
READING = "Lines, large dots: means; bands: lowest to highest run; bars: one s.d.; gray dots: runs"


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure without pyplot, and its axes as an array."""
    with sns.axes_style("whitegrid", {"grid.color": "#e6e6e6", "axes.edgecolor": "#b0b0b0"}):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def colors(names: Sequence[str]) -> dict[str, Any]:
    """A color for each name; the same names in the same order have the same colors."""
    return {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(names)}


def curves(runs: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row for each point of the curves that the cells of x and y hold."""
    return runs.explode([x, y]).astype({x: float, y: float}).reset_index(drop=True)


def lines(axes: Axes, data: pd.DataFrame, x: str, y: str, hue: str, names: Sequence[str]) -> None:
    """A line through each name's means, in a band from the lowest to the highest seed."""
    options: dict[str, Any] = {"hue": hue, "hue_order": names, "palette": colors(names)}
    options |= {"style": hue, "style_order": names}  # so that lines on top of each other are seen
    options |= {"errorbar": ("pi", 100), "err_kws": {"alpha": 0.15}}
    sns.lineplot(data=data, x=x, y=y, ax=axes, **options)
    axes.legend(title=None, fontsize="small")


def dots(axes: Axes, data: pd.DataFrame, x: str, y: str, names: Sequence[str], **more: Any) -> None:
    """Each run as a dot, each name's mean and standard deviation beside them."""
    options = {"order": names, "ax": axes, **more}
    # Without jitter, which is by chance: the same numbers give the same picture, byte by byte.
    sns.stripplot(data=data, x=x, y=y, color=GRAY, size=5, alpha=0.6, jitter=False, **options)
    sns.pointplot(
        data=data,
        x=x,
        y=y,
        errorbar="sd",
        linestyle="none",
        capsize=0.15,
        color="#1f6fb4",
        **options,
    )


def heat(axes: Axes, table: pd.DataFrame, label: str, fmt: str = ".1f", **more: Any) -> None:
    """A table as colors with its numbers written in."""
    options = {"annot": True, "cmap": "viridis_r", "linewidths": 0.5} | more
    sns.heatmap(table, ax=axes, fmt=fmt, cbar_kws={"label": label}, **options)
    axes.tick_params(rotation=0)
