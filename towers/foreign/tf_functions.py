"""tf_functions: graphs of functions that ops call, and those that are being made.

TensorFlow has no public words for either: a graph knows its functions by
`_get_function`, and calls at the end what `add_exit_callback_to_default_func_graph`
was given. Nor does it say that `tf.function` returns identities, made on no device
after its function has ended. What an op takes is changed by `_update_input` only.
`tf_functions_test.py` fails when one changes.
"""

import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops


def body(op: tf.Operation, attribute: str) -> Any:
    """The `FuncGraph` of the function in an op's attribute; None if unknown.

    Its inputs are the op's arguments, its outputs the op's results.
    """
    function = op.graph._get_function(op.get_attr(attribute).name)
    return getattr(function, "graph", None)


def take_instead(op: tf.Operation, k: int, tensor: tf.Tensor) -> None:
    """Has an op of a function that is being made take another k-th input."""
    op._update_input(k, tensor)


def when_made(call: Callable[[], None]) -> None:
    """Calls something when the function is made that is being made now.

    Not if that fails, and not outside of a function, as in a graph of tf.compat.v1.
    """

    def ended() -> None:
        if sys.exc_info()[0] is None:
            call()

    if tf.compat.v1.get_default_graph().building_function:
        ops.add_exit_callback_to_default_func_graph(ended)


def return_where_made() -> None:
    """Has the function that is being made return its results where they are.

    To be called in it: from then on an identity without a device is beside what
    it is of. TensorFlow removes such identities only where it optimizes.
    """

    def beside(op: tf.Operation) -> str:
        alone = op.type == "Identity" and not op.device
        return op.inputs[0].device if alone else op.device

    scope = tf.compat.v1.device(beside)
    scope.__enter__()
    when_made(lambda: scope.__exit__(None, None, None))
