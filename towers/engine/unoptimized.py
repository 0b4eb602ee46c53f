"""unoptimized: calls of functions that TensorFlow runs as they were built.

Before a function's first step TensorFlow's graph optimizer, grappler, rewrites it:
of many towers that takes longer than building them. What a call goes by is said
in the context when it is made.
"""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

_NAME = "disable_meta_optimizer"


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """While open, functions that are called are not rewritten first."""
    options = tf.config.optimizer
    before = options.get_experimental_options().get(_NAME, False)
    options.set_experimental_options({_NAME: True})
    try:
        yield
    finally:
        options.set_experimental_options({_NAME: before})
