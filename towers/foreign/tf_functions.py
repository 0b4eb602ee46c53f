"""tf_functions: the graph of a function that an op calls.

TensorFlow has no public words for it: a graph knows its functions by
`_get_function`. `tf_functions_test.py` fails when that changes.
"""

from typing import Any

import tensorflow as tf


def body(op: tf.Operation, attribute: str) -> Any:
    """The `FuncGraph` of the function in an op's attribute; None if unknown.

    Its inputs are the op's arguments, its outputs the op's results.
    """
    function = op.graph._get_function(op.get_attr(attribute).name)
    return getattr(function, "graph", None)
