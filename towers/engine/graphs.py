"""graphs: functions of a graph of their own, and towers as such, in eager code too."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

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


def as_function(call: Callable[..., Any], name: str) -> Any:
    """A `tf.function` that is traced once, and not counted with others like it.

    TensorFlow counts traces by code, and warns of many.
    """
    own = functools.partial(call)
    own.__name__ = name  # type: ignore[attr-defined]
    return tf.function(own, autograph=False)
