"""What bench/ and `make gpu` do with a GPU, as far as that goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sanitize
import torch
from rich.console import Console
from support import needs_native

from bench import chart, deepspeed, distributed, limit, machine, report, runner, targets
from bench.clock import Clock
from bench.contenders import ADAM, Contender, contenders, next_lr
from bench.results import Absence, Results, Row
from bench.runner import OUT_OF_MEMORY, Case, Record, cases_of, measure, row_of
from bench.workloads import FULL, ONE_THREAD, SHARDED, Workload, llama_layers, on_gpu, sharded

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
SMALL = Workload("gpt2", "GPT-2 124M", ((40, 30), (7,)), seconds=0, rounds=3)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class TwoClocks(Clock):
    """A GPU's, where the host does the work."""

    def __init__(self) -> None:
        self.leads: list[float] = []

    def kernel(self, step: Any, lead: float) -> float:
        self.leads.append(lead)
        return self.wall(step)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit.Copy, "BYTES", 1 << 12)


# ---- what is measured ----------------------------------------------------------------------------


def test_llama_in_full_has_as_many_parameters_as_published() -> None:
    llama = on_gpu(1 << 50)[-1]
    assert llama.title == "Llama-3-8B"
    assert llama.numel == 8_030_261_248


@pytest.mark.parametrize(("gib", "layers"), [(24, None), (80, 2), (126, 7), (1000, 32)])
def test_as_many_layers_as_fit(gib: int, layers: int | None) -> None:
    llama = [w for w in on_gpu(gib * GIB) if w.name == "llama3-8b"]
    if layers is None:
        assert llama_layers(gib * GIB) < 1
        assert not llama
    else:
        assert llama_layers(gib * GIB) == layers
        part = f", {layers} of 32 layers" if layers < 32 else ""
        assert [w.title for w in llama] == [f"Llama-3-8B{part}"]


def test_contenders_on_a_gpu() -> None:
    everyone = {each.name: each for each in contenders(CUDA)}
    for method in ("AdamW", "AdamSWD", "AdamSPD fires", "AdamSPD rests"):
        backends = [
            everyone[f"{maker} {method}"].build.keywords["backend"]
            for maker in ("wdkernels", "wdkernels triton")
        ]
        assert backends == ["native", "triton"]
    # Bytes of the copy do not depend on the workload; all others' do.
    assert Case(SMALL, everyone["memory limit"], 1).bytes == limit.Copy.BYTES
    assert Case(SMALL, everyone["wdkernels AdamW"], 1).bytes == 28 * SMALL.numel


def test_bytes_per_element_of_the_whole_step() -> None:
    by_method = {c.method: c.bytes for c in contenders(CUDA) if c.maker == "wdkernels"}
    # Weights, gradient, m and v read, all but the gradient written; and whatever else is kept.
    w, g, m, v = 2, 2, 4, 4
    bf16 = 2 * w + g + 2 * m + 2 * v
    assert by_method["AdamW bf16"] == by_method["AdamW bf16 nearest"] == bf16
    assert by_method["AdamW bf16 kahan"] == bf16 + 2 * 2
    assert by_method["AdamW bf16 master_weights"] == bf16 - w + 2 * 4
    assert by_method["AdamW bf16 moments"] == 2 * w + g + 2 * 2 + 2 * 2
    assert by_method["AdamW telemetry"] == by_method["AdamW"] == 28
    assert by_method["AdamW clip"] == 28 + 4
    assert by_method["AdamW EMA"] == 28 + 2 * 4
    assert by_method["AdamW all"] == by_method["AdamW all, measured"] == 28 + 4 + 2 * 4
    assert {c.bytes for c in contenders(CUDA) if c.name == "torch fused AdamW bf16"} == {14}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_workload_has_what_its_ratios_and_targets_are_taken_of(device: torch.device) -> None:
    on_cpu = device == CPU
    asked: dict[str, set[str]] = {}
    for target in targets.ON_CPU if on_cpu else targets.ON_GPU:
        names = {target.time} if isinstance(target.time, str) else {*target.time}
        names |= {target.over} if target.over else set()
        for workload in target.workloads:
            asked[workload] = asked.get(workload, set()) | names
    for workload in FULL if on_cpu else on_gpu(1 << 50):
        cases = cases_of(workload, device)
        names = {str(case).partition(": ")[2] for case in cases}
        compared = {"wdkernels AdamW", "torch fused AdamW"}
        if SHARDED not in workload.parts:  # there the limit would be that of two processes
            compared.add("memory limit")
        assert compared <= names
        missing = asked.pop(workload.name, set()) - names
        assert all(name.startswith("DeepSpeed") for name in missing), missing
    assert not asked


def test_nobody_is_compared_with_our_own_formulas() -> None:
    for device in (CPU, CUDA):
        for each in contenders(device):
            options = getattr(each.build, "keywords", {})
            assert options.get("backend") != "eager", each.name


def test_a_scheduled_learning_rate_changes_before_each_step() -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])

    each = Contender("", "", lambda params: Watched(params, lr=1.0), prepare=next_lr)
    measure([Case(replace(SMALL, untimed=1), each, 2)], CPU, Console(quiet=True), Clock())
    for of_group in zip(*rates, strict=True):
        assert of_group == pytest.approx([0.999**t for t in range(1, 9)], rel=1e-12)


# ---- how -----------------------------------------------------------------------------------------


def named(*names: str) -> list[Case]:
    return [Case(SMALL, c, 1) for c in contenders(CUDA) if c.name in names]


def measured(cases: list[Case], clock: Clock | None = None) -> dict[str, Any]:
    records = measure(cases, CPU, Console(quiet=True), clock or TwoClocks())
    return {case.contender.name: record for case, record in records.items()}


def test_a_turn_is_timed_by_both_clocks() -> None:
    clock = TwoClocks()
    records = measured(named("memory limit", "torch fused AdamW"), clock)
    for record in records.values():
        assert not record.problem
        assert list(record.seconds) == list(record.kernel_seconds) == [0, 1, 2]
    assert len(clock.leads) == 6
    assert all(0 < lead <= 0.05 for lead in clock.leads)


def test_weights_of_each_type_are_shared() -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def watched(each: Contender) -> Contender:
        def build(groups: Any) -> Any:
            optimizer = each.build(groups)
            seen[each.name] = [p for group in optimizer.param_groups for p in group["params"]]
            return optimizer

        return replace(each, build=build)

    kinds = ("torch fused AdamW", "separate AdamW all")
    kinds += ("wdkernels AdamW bf16", "wdkernels AdamW bf16 kahan", "torch fused AdamW bf16")
    made = {c.name: c for c in contenders(CPU)}
    records = measured([Case(SMALL, watched(made[name]), 1) for name in kinds])
    for name, record in records.items():
        assert not record.trace, record.trace
        assert list(record.seconds) == [0, 1, 2], name
    single, *_, half = (seen[name] for name in kinds)
    assert {p.dtype for p in single} == {torch.float32}
    assert {p.dtype for p in half} == {torch.bfloat16}
    for name in kinds:
        others = half if name.endswith(("bf16", "kahan")) else single
        assert all(p is other for p, other in zip(seen[name], others, strict=True))
    # Gradients of one type at a time, as memory is counted.
    assert {p.grad is None for p in single} ^ {p.grad is None for p in half} == {True, False}


def test_one_clock_where_there_is_no_gpu() -> None:
    (record,) = measured(named("torch fused AdamW"), Clock()).values()
    assert list(record.seconds) == [0, 1, 2]
    assert not record.kernel_seconds


@pytest.mark.skipif(not distributed.is_possible(CPU), reason="this torch has no processes")
def test_processes_share_a_workload(capfd: pytest.CaptureFixture[str]) -> None:
    """Two of them, each with its own shards; no timings."""
    workload = sharded("small", "small", ((40, 30), (7,), (1,)), rounds=2)
    found = runner.run([workload], CPU, Console(quiet=True))
    assert not found.absent, capfd.readouterr().err
    rows = {row.name: row for row in found.rows}
    assert all([*row.seconds] == [0, 1] or row.maker == "torch foreach" for row in rows.values())
    assert not any(row.kernel_seconds for row in rows.values())
    assert all(row.parameters == 3 for row in rows.values())
    counted = {name.partition(" ")[2]: row.collectives for name, row in rows.items()}
    assert counted == {
        "AdamW": 0,
        "AdamW plain": 0,
        "AdamSWD": 1,
        "AdamW clip": 1,
        "AdamSPD fires": 1,
        "AdamSPD rests": 1,
        "AdamW all, measured": 2,
        "fused AdamW": 0,
        "foreach AdamW": 0,
    }
    page = report.to_markdown(found, "x.png")
    assert "| µs a parameter | collectives |" in page
    (line,) = (x for x in page.splitlines() if x.startswith("| wdkernels AdamSWD |"))
    assert line.endswith("| 1 |")
    (entry,) = (x for x in json.loads(report.to_json(found))["rows"] if x["method"] == "AdamSWD")
    assert entry["collectives"] == 1
    assert entry["us_each"] == pytest.approx(1e3 * entry["ms"] / 3, rel=1e-3)


def test_a_step_of_processes_takes_what_the_slowest_takes() -> None:
    first, second = Record({0: 1.0, 1: 4.0}, collectives=1), Record({0: 3.0, 1: 2.0}, collectives=1)
    slowest = runner._slowest([first, second])
    assert slowest.seconds == {0: 3.0, 1: 4.0}
    assert slowest.collectives == 1
    second.fail(ValueError("broken"))
    assert runner._slowest([first, second]).problem == "ValueError: broken"


def test_targets_of_sharded_steps() -> None:
    name = "300x256-sharded"
    ours = replace(row("wdkernels AdamW", 2, 2, name), parameters=4, collectives=0)
    plain = replace(row("wdkernels AdamW plain", 1, 1, name), parameters=4, collectives=0)
    plain = replace(plain, maker="wdkernels", method="AdamW plain")
    each = next(t for t in targets.SHARDED if t.per_parameter)
    count = next(t for t in targets.SHARDED if t.collectives)
    run = results(ours, plain)
    assert each.measured(run, name) == pytest.approx(1e6 * (2 - 1) / 4)
    assert count.measured(run, name) == 0
    assert count.met(0)
    assert not count.met(1)
    assert (each.unit, count.unit) == (" µs", "")


class Failing(torch.optim.SGD):
    """At its n-th step."""

    def __init__(self, params: Any, n: int, error: Exception) -> None:
        super().__init__(params, lr=0.0)
        self._left, self._error = n, error

    def step(self, closure: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error


@pytest.mark.parametrize("n", [1, 2, 6])
def test_what_does_not_fit_is_absent_and_the_others_go_on(n: int) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    large = Contender("large", "AdamW", lambda params: Failing(params, n, error))
    records = measured([Case(SMALL, large, 1), *named("torch fused AdamW")])
    assert records["large AdamW"].problem == OUT_OF_MEMORY
    assert not records["large AdamW"].seconds
    assert len(records["torch fused AdamW"].seconds) == 3


def test_another_error_is_told_with_its_trace() -> None:
    broken = Contender("broken", "AdamW", lambda params: Failing(params, 1, ValueError("a\nb")))
    records = measured([Case(SMALL, broken, 1), *named("torch fused AdamW")])
    assert records["broken AdamW"].problem == "ValueError: a b"
    assert "in step" in records["broken AdamW"].trace
    assert not records["torch fused AdamW"].problem


def test_a_workload_that_does_not_fit_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def randn(*shape: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", randn)
    (record,) = measured(named("torch fused AdamW")).values()
    assert record.problem == OUT_OF_MEMORY


# ---- what is told --------------------------------------------------------------------------------

MACHINE = {"device": "NVIDIA H200", "driver": "580.1", "cores": 16, "wdkernels": "1", "torch": "2"}


def row(name: str, kernel: float, wall: float, workload: str = "gpt2", bytes_: int = 28) -> Row:
    maker, _, method = name.rpartition(" ")
    return Row(workload, workload, maker, method, 1, bytes_, {0: wall}, {0: kernel})


def results(*rows: Row) -> Results:
    return Results(MACHINE, "2026-01-02", "abc", rows)


def test_ratios_are_of_kernel_times_unless_the_wall_is_asked_for() -> None:
    ours, fused = row("wdkernels AdamW", 2, 6), row("torch fused AdamW", 4, 18)
    assert (ours.ms(), ours.ms(wall=True)) == (2e3, 6e3)
    assert (fused.time_over(ours), fused.time_over(ours, wall=True)) == (2, 3)
    on_cpu = replace(ours, kernel_seconds={})
    assert on_cpu.ms() == on_cpu.ms(wall=True) == 6e3


def test_targets_of_a_gpu() -> None:
    found = results(
        row("memory limit", 1, 1, "1G", 100),
        row("wdkernels AdamW", 0.5, 1, "1G", 45),
        row("wdkernels AdamW", 1, 2, "10000x64"),
        row("torch fused AdamW", 3, 30, "10000x64"),
    )
    figures = {
        target.question: target.measured(found, target.workloads[0])
        for target in targets.targets(found)
    }
    assert targets.targets(found) is targets.ON_GPU
    assert figures["AdamW: bytes per second over a copy's"] == pytest.approx(0.9)
    assert figures["AdamW: speed over torch fused, wall"] == 15
    copy, *_ = targets.ON_GPU
    assert [copy.met(0.919), copy.met(0.92)] == [False, True]


def test_a_target_without_a_bound_is_told_and_not_judged() -> None:
    found = results(row("wdkernels AdamW", 1, 1), row("wdkernels AdamSPD fires", 1.5, 2))
    assert "| AdamSPD, fires: time over AdamW |  | 1.5× (gpt2) |  |" in report.to_markdown(
        found, "x.png"
    )


def test_both_times_are_reported_and_what_is_absent() -> None:
    found = replace(
        results(row("wdkernels AdamW", 0.002, 0.006), row("torch fused AdamW", 0.004, 0.018)),
        absent=(Absence("GPT-2 124M", "torch single AdamW", OUT_OF_MEMORY),),
    )
    entry = json.loads(report.to_json(found))["rows"][0]
    assert (entry["kernel_ms"], entry["wall_ms"]) == (2, 6)
    assert (entry["kernel_over_torch_fused"], entry["wall_over_torch_fused"]) == (2, 3)
    assert json.loads(report.to_json(found))["absent"][0]["reason"] == OUT_OF_MEMORY

    markdown = report.to_markdown(found, "x.png")
    assert markdown.startswith("# Speed on NVIDIA H200\n")
    assert "| contender | kernel ms | wall ms | GB/s |" in markdown
    assert "| wdkernels AdamW | 2.00 | 6.00 |" in markdown
    assert "- GPT-2 124M: torch single AdamW (out of memory)" in markdown


def test_names_of_files() -> None:
    assert machine.slug(MACHINE) == "nvidia-h200"
    on_cpu: dict[str, str | int] = {"device": "AMD EPYC", "cores": 2}
    assert machine.slug(on_cpu) == "amd-epyc-2-cores"


class OneByOne(torch.optim.Optimizer):
    """What `multi` builds on of DeepSpeedCPUAdam, whose first step makes the state."""

    opt_id = 7

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {**options, "bias_correction": True})
        self.ds_opt_adam, self.calls = self, []

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": 1, "exp_avg": p + 1, "exp_avg_sq": p + 2}

    def adam_update_multi(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def test_one_call_of_deepspeed_for_many_tensors(tmp_path: Path) -> None:
    params = [torch.ones(3), torch.ones(5)]
    optimizer = deepspeed.multi(OneByOne)(params, **ADAM)
    for p in params:
        p.grad = 3 * p
    for _ in range(3):
        optimizer.step()
    numbers = (1e-3, 0.9, 0.999, 1e-8, 1e-2, True)
    for t, call in enumerate(optimizer.calls, 2):
        assert call[:8] == (7, t, *numbers)
        streams = [[x.sum().item() for x in stream] for stream in call[8:]]
        assert streams == [[3, 5], [9, 15], [6, 10], [9, 15], []]  # w, g, m, v, no copies
    assert len(optimizer.calls) == 2

    assert not deepspeed.has_multi([str(tmp_path)])
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "cpu_adam.cpp").write_text('m.def("adam_update_multi"')
    assert deepspeed.has_multi([str(tmp_path)])


@needs_native
def test_a_run_of_all_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part of it in a process of its own; the files that it leaves."""
    quick = {"seconds": 0.0, "rounds": 1}
    alone = replace(SMALL, name="32M-1-thread", parts=(ONE_THREAD,), **quick)
    broken = Contender("broken", "AdamW", lambda params: Failing(params, 1, ValueError("a b")))
    everyone = [c for c in contenders(CPU) if c.maker in ("memory", "wdkernels", "torch fused")]
    monkeypatch.setattr(runner, "contenders", lambda _: [*everyone, broken])
    found = runner.run([replace(SMALL, **quick)], CPU, Console(quiet=True))
    assert [absence.name for absence in found.absent] == ["broken AdamW"]
    monkeypatch.undo()

    apart = runner.run([alone], CPU, Console(quiet=True))
    assert not apart.absent
    assert {row.name for row in apart.rows} >= {"wdkernels AdamW", "torch fused AdamW"}
    found = replace(found, rows=(*found.rows, *apart.rows))
    base = report.write(found, tmp_path)
    assert (tmp_path / f"{base.name}.png").stat().st_size > 10_000
    text = (tmp_path / f"{base.name}.md").read_text()
    assert "| AdamW: speed over torch fused | ≥ 1× |" in text
    assert "(32M-1-thread)" in text


@needs_native
def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    names = ("memory limit", "wdkernels AdamW", "wdkernels triton AdamW", "torch fused AdamW")
    names += ("wdkernels AdamSWD", "wdkernels AdamSPD rests", "paper AdamSWD")
    names += ("wdkernels AdamW bf16", "wdkernels AdamW all", "separate AdamW all")
    cases = named(*names)
    records = measure(cases, CPU, Console(quiet=True), TwoClocks())
    assert not any(record.trace for record in records.values())
    workloads = ("1G", "1G-whole", "10000x64", "gpt2")
    rows = [row_of(*each) for each in records.items()]
    found = results(*(replace(row, workload=name) for name in workloads for row in rows))
    assert found.on_gpu
    chart.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    report.to_markdown(found, "x.png")
    report.print_table(found, Console(quiet=True))


# ---- compute-sanitizer ---------------------------------------------------------------------------


def fake_sanitizer(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


STARTED = f"echo '{sanitize.WATCHED}'"


@pytest.mark.parametrize(
    ("body", "verdict", "clean"),
    [
        (
            f"{STARTED}; echo '{sanitize.DONE}'; echo '=== ERROR SUMMARY: 0 errors'",
            "memcheck: passed",
            True,
        ),
        (f"{STARTED}; echo '{sanitize.DONE}'; exit 86", "memcheck: FAILED with status 86", False),
        (f"{STARTED}; exit 1", "memcheck: FAILED with status 1", False),
        (f"{STARTED}; exit 0", "memcheck: FAILED with status 0", False),
        ("echo 'Device not supported'; exit 86", "memcheck: does not work here", True),
    ],
)
def test_verdicts_on_a_sanitizer(
    body: str, verdict: str, clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sanitizer(tmp_path, body, monkeypatch)
    said, found_nothing = sanitize.judged("memcheck")
    assert said.startswith(verdict)
    assert found_nothing is clean


def test_a_sanitizer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    said, found_nothing = sanitize.judged("memcheck")
    assert "absent" in said
    assert found_nothing


def test_a_long_report_is_cut_in_the_middle() -> None:
    lines = sanitize.excerpt("\n".join(map(str, range(1000)))).splitlines()
    assert lines[0] == "0"
    assert lines[-1] == "999"
    assert len(lines) == 2 * sanitize.LINES + 1
    assert sanitize.excerpt("a\nb") == "a\nb"


def test_the_steps_that_are_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "SIZES", (100, 7, 0))
    try:
        sanitize.train("cpu")
    except ValueError as error:
        pytest.skip(str(error))  # there is no compiled module
    assert capsys.readouterr().out.split("\n") == [sanitize.WATCHED, sanitize.DONE, ""]


# ---- where there is no GPU -----------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize(
    "command", [["tools/gpu"], [sys.executable, "-m", "bench", "--device=cuda"]]
)
def test_one_sentence_where_there_is_no_gpu(command: list[str]) -> None:
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "GPU" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert not run.stdout
