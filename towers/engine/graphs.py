"""graphs: towers are graphs, also where functions are told to run eagerly."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf


@contextlib.contextmanager
def as_graphs() -> Iterator[None]:
    """While open, `tf.config.run_functions_eagerly(True)` is not heard.

    Then steps run op by op, as a user asks; the towers that they call are made and
    run at once, as a graph, as everywhere in eager code.
    """
    if not tf.config.functions_run_eagerly():
        yield
        return
    tf.config.run_functions_eagerly(False)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(True)
