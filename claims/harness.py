"""What all experiments share: their form, their runs side by side, and the cache of what ran.

An experiment is a list of cells, each a plain dict (which optimizer, which seed), and a function
that runs one of them and returns numbers. Finished cells are kept in claims/out/ at once, a
finished experiment in docs/claims/; both under a key made from all that was set, so that nothing
runs twice and nothing stale is shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from claims.statistics import Prediction

HERE = Path(__file__).parent
SCRATCH = HERE / "out"
RESULTS = HERE.parent / "docs" / "claims"
WORKERS = 2

Cell = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One claim: what is run, what was predicted before, and how it is shown."""

    number: str  # on the page
    name: str  # of its file
    title: str
    source: str  # the paper
    method: str  # the docstring of its file: the claim, and what is done
    settings: Any  # a dataclass of plain values: whatever the runs depend on
    tiny: Any  # the same, for the smoke test
    seconds: float  # processor time of a usual cell, for the first estimate of the time left
    plan: Callable[[Any], list[Cell]]
    run: Callable[[Any, Cell], Record]
    predictions: tuple[Prediction, ...]
    table: Callable[[pd.DataFrame], pd.DataFrame]  # what each setting gave, for the page
    figure: Callable[[pd.DataFrame], Figure]
    notes: Callable[[pd.DataFrame], list[str]]  # what the numbers say beyond the predictions
    weight: Callable[[Cell], float] = lambda cell: 1.0  # a cell's cost beside a usual one
    version: int = 1  # raised when the code of `run` changes what it returns

    @property
    def picture(self) -> Path:
        return RESULTS / f"{self.name}.png"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


def key(experiment: Experiment, settings: Any) -> str:
    """A hash of everything that was set: other settings are another experiment."""
    everything = [experiment.name, experiment.version, asdict(settings), experiment.plan(settings)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def rounded(x: Any) -> Any:
    """The same with 6 significant digits, and None for what is no number: JSON has no NaN."""
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, Sequence) and not isinstance(x, str) else x


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each cell: what was set, and what came out."""
    return pd.DataFrame([{**r["cell"], **r["result"]} for r in records])


def seeds(count: int, first: int = 200) -> range:
    """The seeds of the runs. Settings were chosen with others, so that no run was seen before.

    An experiment that was changed after it had begun takes others: `first` says from where.
    """
    return range(first, first + count)


# ---- running -------------------------------------------------------------------------------------


def quiet() -> None:
    """What a worker does first: networks this small gain nothing from more threads."""
    torch.set_num_threads(1)


def perform(module: str, settings: Any, cell: Cell) -> Record:
    """Run one cell, in a worker. Processor time is what it cost: pauses do not count."""
    experiment = import_module(module).EXPERIMENT
    start = time.process_time()
    result = rounded(experiment.run(settings, cell))
    return {"cell": cell, "result": result, "seconds": round(time.process_time() - start, 2)}


def _scratch(experiment: Experiment) -> Path:
    return SCRATCH / f"{experiment.name}-{key(experiment, experiment.settings)}.jsonl"


def stored(experiment: Experiment) -> dict[str, Any] | None:
    """What docs/claims/ holds of this experiment at these very settings, or None."""
    if not experiment.file.exists():
        return None
    found: dict[str, Any] = json.loads(experiment.file.read_text())
    return found if found["key"] == key(experiment, experiment.settings) else None


def _left(experiment: Experiment) -> tuple[list[Record], list[Cell]]:
    """The records of finished cells, and the cells that are to be run."""
    path = _scratch(experiment)
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    done = [record["cell"] for record in records]
    return records, [cell for cell in experiment.plan(experiment.settings) if cell not in done]


def _store(experiment: Experiment, records: Sequence[Record]) -> None:
    """Write a finished experiment to docs/claims/, its cells in the order of the plan."""
    plan = experiment.plan(experiment.settings)
    ordered = sorted(records, key=lambda record: plan.index(record["cell"]))
    head = {
        "experiment": experiment.name,
        "key": key(experiment, experiment.settings),
        "settings": asdict(experiment.settings),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor_seconds": round(sum(record["seconds"] for record in records), 1),
    }
    rows = ",\n".join(json.dumps(record) for record in ordered)
    experiment.file.parent.mkdir(parents=True, exist_ok=True)
    experiment.file.write_text(json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{rows}\n]}}\n')


def run_all(
    experiments: Sequence[Experiment], anew: bool, console: Console
) -> Iterator[Experiment]:
    """Run whatever has not run, WORKERS cells at a time; yields each experiment when it is done."""
    records: dict[str, list[Record]] = {}
    waiting: dict[str, list[Cell]] = {}
    for experiment in experiments:
        if anew:
            _scratch(experiment).unlink(missing_ok=True)
            experiment.file.unlink(missing_ok=True)
        if stored(experiment):
            console.print(f"{experiment.name}: all runs are in docs/claims/")
            yield experiment
            continue
        records[experiment.name], waiting[experiment.name] = _left(experiment)

    cost = {
        e.name: [e.seconds * e.weight(cell) for cell in waiting.get(e.name, ())]
        for e in experiments
    }
    ahead = sum(map(sum, cost.values()))
    spent = foreseen = 0.0
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    with (
        Progress(TextColumn("{task.description}"), *columns, console=console) as progress,
        ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), quiet) as pool,
    ):
        count = sum(map(len, waiting.values()))
        left = f"about {ahead / WORKERS / 60:.0f} min left"
        bar = progress.add_task("claims", total=count, left=left)
        SCRATCH.mkdir(exist_ok=True)
        futures: dict[Future[Record], tuple[Experiment, float]] = {}
        for experiment in experiments:
            for cell, estimate in zip(
                waiting.get(experiment.name, ()), cost[experiment.name], strict=True
            ):
                module = f"claims.{experiment.name}"
                future = pool.submit(perform, module, experiment.settings, cell)
                futures[future] = experiment, estimate
        for experiment in experiments:  # all of it was there, but was not written
            if experiment.name in records and not waiting[experiment.name]:
                _store(experiment, records[experiment.name])
                yield experiment
        try:
            for future in as_completed(futures):
                experiment, estimate = futures[future]
                record = future.result()
                records[experiment.name].append(record)
                with _scratch(experiment).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                # Estimates are corrected by what the runs so far have cost.
                spent, foreseen = spent + record["seconds"], foreseen + estimate
                remaining = (ahead - foreseen) * spent / foreseen / WORKERS / 60
                left = f"about {remaining:.0f} min left"
                progress.update(bar, advance=1, description=experiment.name, left=left)
                if len(records[experiment.name]) == len(experiment.plan(experiment.settings)):
                    _store(experiment, records[experiment.name])
                    yield experiment
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
