"""What the tests share.

numbers.py     weights, gradients, a run of steps, and comparisons of what is left of it
variants.py    the table that the tests expand: every optimizer, every option, every backend
edges.py       gradients and weights that leave the usual numbers
internals.py   whatever of wdkernels is looked at from within; all else goes by its front door
"""

# A test imports all of these from here, so the names unused below (F401, F403) are this file's use.
from support import internals  # noqa: F401
from support.edges import *  # noqa: F403
from support.internals import Eager  # noqa: F401
from support.numbers import *  # noqa: F403
from support.variants import *  # noqa: F403
