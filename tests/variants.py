"""Until every test imports from `support`."""

from support import *  # noqa: F403
