"""unoptimized: calls of functions that TensorFlow runs as they were built.

Before a function's first step TensorFlow's graph optimizer, grappler, rewrites it:
of many towers that takes longer than building them. What a call goes by is said
in the context when it is made.
"""

from contextlib import AbstractContextManager

from towers.foreign.patches import optimizing


def unoptimized() -> AbstractContextManager[None]:
    """While open, functions that are called are not rewritten first."""
    return optimizing(disable_meta_optimizer=True)
