"""Fused Adam-family optimizers for PyTorch, with every kind of weight decay."""

from wdkernels import schedules
from wdkernels.grouping import param_groups
from wdkernels.optim import Adam, AdamSPD, AdamSWD, AdamW

__all__ = ["Adam", "AdamSPD", "AdamSWD", "AdamW", "param_groups", "schedules"]
__version__ = "0.1.0"
