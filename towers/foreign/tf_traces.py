"""tf_traces: a trace of graphs that somebody else has begun, and is to go on.

`tf.summary` has one for the whole process, which a TensorBoard callback begins, and
no public word for whether it is on: `_current_trace_context`. `tf_traces_test.py`
fails when that changes.
"""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.ops import summary_ops_v2


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """While open, there is none, so that another can be made; then it goes on."""
    before = summary_ops_v2._current_trace_context
    summary_ops_v2._current_trace_context = None
    try:
        yield
    finally:
        if before is not None:
            tf.summary.trace_on(graph=before.graph)
            summary_ops_v2._current_trace_context = before
