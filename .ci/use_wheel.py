"""A few steps of every optimizer, compiled and eager, from an installed wheel."""

import platform

import torch

import wdkernels as wd
from wdkernels import _C

STEPS = 5

print(
    f"wdkernels {wd.__version__} from {wd.__path__[0]}\n"
    f"Python {platform.python_version()}, torch {torch.__version__}, "
    f"instruction set {_C.instruction_set()} of {', '.join(_C.instruction_sets())}"
)


def train(optimizer: type[torch.optim.Optimizer], backend: str) -> torch.Tensor:
    """The weights of a small regression after a few steps with a loud decay."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    opt = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, backend=backend)
    for _ in range(STEPS):
        opt.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        opt.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


for optimizer in (wd.Adam, wd.AdamW, wd.AdamSWD, wd.AdamSPD):
    native, eager = (train(optimizer, backend) for backend in ("native", "eager"))
    torch.testing.assert_close(native, eager, rtol=1e-4, atol=1e-6)
    print(f"{optimizer.__name__:8} {STEPS} steps on the native backend, as on the eager one")
