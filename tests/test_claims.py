"""claims/: every experiment at one tiny setting, and the statistics its verdicts rest on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium")  # which the library does not need, nor these:
pytest.importorskip("seaborn")
pytest.importorskip("sklearn")

import pandas as pd
from rich.console import Console
from scipy import stats

from claims import harness, page
from claims.__main__ import NAMES, experiments
from claims.statistics import Prediction, best, findings, interval, seeds_needed, verdict
from claims.tables import markdown, number

EXPERIMENTS = {experiment.name: experiment for experiment in experiments()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of docs/claims/ and claims/out/."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "docs")
    monkeypatch.setattr(harness, "SCRATCH", tmp_path / "out")
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs" / "README.md")
    return tmp_path


# numpy and pandas warn that so few and so short runs have no correlation.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_experiment_at_a_tiny_setting(name: str, elsewhere: Path) -> None:
    """It runs, is stored, judged, drawn and written, all from what was stored."""
    whole = EXPERIMENTS[name]
    experiment = replace(whole, settings=whole.tiny)
    plan = experiment.plan(experiment.settings)
    assert len(plan) < len(whole.plan(whole.settings))
    records = [harness.perform(f"claims.{name}", experiment.settings, cell) for cell in plan]
    harness._store(experiment, records)

    assert harness.stored(whole) is None, "other settings are another experiment"
    found, runs = page.load(experiment) or pytest.fail("what was stored is not found")
    assert found["runs"] == records
    facts = findings(experiment.predictions, runs)
    assert [fact.prediction for fact in facts] == list(experiment.predictions)
    assert all(1 <= len(fact.numbers) <= 2 for fact in facts), "not one number a seed"
    page.draw(experiment)
    assert experiment.picture.stat().st_size > 10_000
    page.write([experiment])
    text = page.PAGE.read_text()
    assert verdict(facts) in text
    assert all(fact.prediction.says in text for fact in facts)


@pytest.mark.filterwarnings("ignore")
def test_what_has_run_is_not_run_again(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EXPERIMENTS["bfloat16"]
    experiment = replace(whole, settings=replace(whole.tiny, seeds=1, steps=4, still_steps=4))
    monkeypatch.setattr(harness, "WORKERS", 1)
    console = Console(quiet=True)
    plan = experiment.plan(experiment.settings)
    first = harness.perform("claims.bfloat16", experiment.settings, plan[0])
    harness.SCRATCH.mkdir()
    harness._scratch(experiment).write_text(json.dumps(first | {"seconds": 123.0}) + "\n")

    assert list(harness.run_all([experiment], False, console)) == [experiment]
    stored = harness.stored(experiment)
    assert stored is not None
    assert [record["cell"] for record in stored["runs"]] == plan
    assert stored["runs"][0]["seconds"] == 123.0, "a finished run was run again"

    monkeypatch.setattr(harness, "perform", lambda *_: pytest.fail("it was run again"))
    assert list(harness.run_all([experiment], False, console)) == [experiment]


def prediction(
    direction: str, threshold: float, numbers: list[float], **more: object
) -> Prediction:
    return Prediction(
        says="so it is",
        measure="number",
        numbers=lambda _: pd.Series(numbers, dtype=float),
        direction=direction,
        threshold=threshold,
        runs=len(numbers),
        baseline="none",
        **more,
    )


NONE = pd.DataFrame()


def test_tests_are_those_of_scipy() -> None:
    numbers = [1.0, 1.4, 0.7, 1.2, 1.9]
    for direction, alternative in (("above", "greater"), ("below", "less")):
        (found,) = findings([prediction(direction, 1.1, numbers)], NONE)
        assert found.raw == pytest.approx(
            stats.ttest_1samp(numbers, 1.1, alternative=alternative)[1]
        )
    (found,) = findings([prediction("within", 2.0, numbers)], NONE)
    sides = (-2.0, "greater"), (2.0, "less")
    assert found.raw == pytest.approx(
        max(stats.ttest_1samp(numbers, x, alternative=side)[1] for x, side in sides)
    )
    assert interval(found) == pytest.approx(
        tuple(stats.ttest_1samp(numbers, 0).confidence_interval())
    )
    (found,) = findings([prediction("above", 0.5, [1, 1, 1, 1, 0], test="binomial")], NONE)
    assert found.raw == pytest.approx(6 / 32)


def test_many_predictions_do_not_buy_one() -> None:
    """Holm: the smallest p times their number, the next times one less, never falling."""
    loud, faint = [1.0, 1.1, 0.9, 1.05, 1.0], [1.0, 0.2, 1.3, 0.1, 0.4]
    (alone,) = findings([prediction("above", 0.0, faint)], NONE)
    assert alone.holds
    among = findings([prediction("above", 0.0, x) for x in (faint, loud, faint)], NONE)
    assert [fact.p for fact in among] == pytest.approx(
        [2 * alone.raw, 3 * among[1].raw, 2 * alone.raw]
    )
    assert [fact.holds for fact in among] == [False, True, False]
    assert verdict(among) == "partly"
    assert verdict(among[1:2]) == "reproduced"
    assert verdict(among[:1]) == "not at this scale"


@pytest.mark.parametrize("numbers", [[1.0, float("nan"), 1.0], [1.0, float("inf"), 1.1]])
def test_a_run_without_a_number_shows_nothing(numbers: list[float]) -> None:
    (found,) = findings([prediction("above", 0.0, numbers)], NONE)
    assert not found.holds


def test_a_missing_run_shows_nothing() -> None:
    expected = replace(prediction("above", 0.0, [1.0, 1.1, 1.2]), runs=4)
    assert not findings([expected], NONE)[0].holds


def test_seeds_that_would_be_needed() -> None:
    numbers = [1.0, -0.5, 0.4, 0.1]
    (found,) = findings([prediction("above", 0.0, numbers)], NONE)
    needed = seeds_needed(found)
    assert needed is not None
    assert needed > 4
    (wrong,) = findings([prediction("below", 0.0, numbers)], NONE)
    assert seeds_needed(wrong) is None


def test_the_best_setting_of_a_family() -> None:
    runs = pd.DataFrame(
        [("a", 1, s, 2.0 + s) for s in (0, 1)]
        + [("a", 2, s, x) for s, x in ((0, 0.0), (1, None))]  # diverged once: not the best
        + [("b", 1, s, 3.0) for s in (0, 1)],
        columns=["method", "decay", "seed", "score"],
    )
    chosen = best(runs, "method", ["decay"], "score")
    assert list(chosen.groupby("method")["decay"].first()) == [1, 1]
    assert len(chosen) == 4


def test_numbers_as_they_are_written() -> None:
    assert [number(x) for x in (0.0, 0.01234, 1.234, 123.4, 1e-5, float("nan"))] == [
        "0.00", "0.012", "1.23", "123", "1e-05", "–",
    ]  # fmt: skip
    written = markdown(pd.DataFrame({"a": ["|w|"], "b": [0.5]}))
    assert written.splitlines()[-1] == r"| \|w\| | 0.500 |"
