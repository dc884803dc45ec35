"""`python -m wdkernels` describes this machine, and notices what computes something else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

import wdkernels as wd
import wdkernels.__main__ as tool
from wdkernels import native, reference


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def test_it_says_what_is_there_and_that_it_is_right():
    # -W: torch warns where numpy is missing
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wdkernels"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert lines_with(done.stdout, "wdkernels") == [f"wdkernels  {wd.__version__}"]
    assert torch.__version__ in lines_with(done.stdout, "torch")[0]
    best = tool.picked(torch.zeros(1))
    assert "picked by auto" in next(line for line in lines_with(done.stdout, best) if "cpu" in line)
    for optimizer in tool.OPTIMIZERS:
        (agrees, *gpus) = lines_with(done.stdout, f"{optimizer.__name__} ")
        assert agrees.startswith("cpu ")
        assert agrees.endswith(" agree")
        assert len(gpus) == len(tool.devices()) - 1


def test_every_backend_that_is_not_picked_says_why(monkeypatch):
    monkeypatch.setattr(native, "_missing", "it was lost")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, *rows = tool.backends()
    assert [row[1:] for row in rows[:3]] == [
        ("native", "it was lost"),
        ("triton", "it has no kernels for cpu tensors"),
        ("eager", "picked by auto"),
    ]


def test_without_the_compiled_module_it_says_so(monkeypatch):
    monkeypatch.setattr(tool, "_C", None)
    monkeypatch.setattr(native, "_missing", "it was lost")
    assert ("compiled", "no: it was lost") in [*tool.environment()]


def test_versions_of_the_package_and_its_metadata_agree():
    assert importlib.metadata.version("wdkernels").split("+")[0] == wd.__version__.split("+")[0]


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_disagreement_is_named_and_ends_with_status_1(monkeypatch, capsys, error):
    right = reference.step

    def wrong(groups, request):
        right(groups, request)
        for group in groups:
            for p in group.params:
                p.data.add_(error)  # of the eager formulas; of both it would cancel out

    def swd_only(optimizer, device):
        with pytest.MonkeyPatch.context() as patch:
            if optimizer is wd.AdamSWD:
                patch.setattr(reference, "step", wrong)
            return checked(optimizer, device)

    checked = tool.self_check
    monkeypatch.setattr(tool, "self_check", swd_only)
    monkeypatch.setattr(tool, "devices", lambda: [torch.device("cpu")])
    if native.refuses([torch.zeros(1)]):
        pytest.skip("eager alone is compared with itself")
    assert tool.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED: off by" in lines_with(printed, "AdamSWD ")[0]
    assert len(lines_with(printed, "FAILED")) == 2
    assert "do not train" in printed.splitlines()[-1]


def test_an_exception_is_a_failure(monkeypatch, capsys):
    def breaks(*_):
        raise RuntimeError("out of\norder")

    monkeypatch.setattr(wd.AdamSPD, "step", breaks)
    assert tool.main() == 1
    printed = capsys.readouterr().out
    assert lines_with(printed, "AdamSPD ")[0].endswith("FAILED: RuntimeError: out of order")
