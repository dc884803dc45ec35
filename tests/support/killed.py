"""A run that may be killed at any moment: tests/test_checkpoints.py does so.

    python killed.py PATH BACKEND

It says what it does, and waits a moment where somebody might want to kill it.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from support.checkpoints import RUNS, Net, train

STEPS = 16


class SlowFile:
    """Says that it is being written, in the middle of it."""

    def __init__(self, file: Any, what: str) -> None:
        self._file, self._what = file, what
        self._written = 0

    def write(self, data: Any) -> int:
        self._written += 1
        if self._written == 5:
            self._file.flush()
            say(self._what)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()


def say(what: str) -> None:
    print(what, flush=True)
    if what in ("step 7", "saving 12"):
        time.sleep(0 if "FAST" in os.environ else 0.5)


def main(path: str, backend: str) -> None:
    run = RUNS["AdamSWD, averaged"]
    net = Net(run.dtype, seed=3)
    optimizer = run.build(net, backend=backend)
    begin = 0
    if os.path.exists(path):
        found = torch.load(path, weights_only=True)
        net.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        begin = found["step"]
    else:
        net.load_state_dict(Net(run.dtype).state_dict())
    for t in range(begin, STEPS):
        train(net, optimizer, range(t, t + 1))
        say(f"step {t + 1}")
        if (t + 1) % 4 == 0:
            # Under another name first: the last checkpoint is whole until the new one is.
            found = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": t + 1}
            with open(path + ".new", "wb") as file:
                torch.save(found, SlowFile(file, f"saving {t + 1}"))
            os.replace(path + ".new", path)


if __name__ == "__main__":
    main(*sys.argv[1:])
