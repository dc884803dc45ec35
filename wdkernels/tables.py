"""Tables in plain text, for whoever prints something."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Columns as wide as they must be; those with the numbers `right` end at their right edge."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    put = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    lines = ([f(cell, n) for f, cell, n in zip(put, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
