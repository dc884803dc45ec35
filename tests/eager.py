"""Until every test imports from `support`."""

from support import LOUD, Eager  # noqa: F401
