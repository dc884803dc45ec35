"""`python -m bench`: measure, print a table, and write bench/results/."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import chart, machine, report
from bench.conftest import OPTIONS
from bench.results import Absence, Results

HERE = Path(__file__).parent


class Reporter:
    """No dots in between the progress bars, and a note of what could not be measured."""

    def __init__(self) -> None:
        self.absent: list[Absence] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            properties = (value for _, value in report.user_properties)
            self.absent += [value for value in properties if isinstance(value, Absence)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed and report.when == "call" else None


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for JSON, Markdown and chart (default: bench/results for a full run, none for "
        "a part of it)",
    )
    parser.add_argument("--commit", help="what was measured, where git cannot say it")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU on this machine")
    reporter = Reporter()
    part = options.quick or options.workload

    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "benchmark.json")
        arguments = [
            f"{HERE / 'test_bench.py'}::test_step",
            f"--rootdir={HERE.parent}",
            f"--device={options.device}",
            *(["--quick"] if options.quick else []),
            *(f"--workload={name}" for name in options.workload),
            f"--benchmark-json={measured}",
            "--benchmark-quiet",
            "--quiet",
            "--no-header",
        ]
        status = pytest.main(arguments, plugins=[reporter])
        if not measured.exists():
            return int(status)
        results = Results.of(json.loads(measured.read_text()), reporter.absent)
    if options.commit:
        results = replace(results, commit=options.commit)

    console = Console()
    console.width = max(console.width, 110)  # where there is no terminal, it is 80
    report.print_table(results, console)
    output = options.output or (None if part else HERE / "results")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        base = output / machine.slug(results.machine)
        base.with_suffix(".json").write_text(report.to_json(results))
        base.with_suffix(".md").write_text(report.to_markdown(results, f"{base.name}.png"))
        chart.draw(results, base.with_suffix(".png"))
        console.print(f"Written: {base}.json, .md and .png")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
