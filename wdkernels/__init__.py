"""Fused Adam-family optimizers for PyTorch, with every kind of weight decay."""

from wdkernels import schedules
from wdkernels.optim import Adam, AdamSPD, AdamSWD, AdamW

__all__ = ["Adam", "AdamSPD", "AdamSWD", "AdamW", "schedules"]
__version__ = "0.1.0"
