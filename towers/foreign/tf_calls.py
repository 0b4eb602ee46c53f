"""tf_calls: which functions a program calls, and with what.

TensorFlow hands out the graphs that functions were cut into, but nothing public
tells which function they belong to, nor what it was called with. So this file
uses `add_op_callback`, which hears of every op run eagerly, calls of functions
among them, and the context's `has_function`, `get_function_def`, `device_name` and
`op_callbacks`. `function_def_to_graph_def` knows which output of an op a name in a
function means.
`recording_test.py` fails when one of them changes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tensorflow.python.eager import context
from tensorflow.python.framework import function_def_to_graph, op_callbacks


def definition(name: str) -> Any:
    """The `FunctionDef` of a function that can be called, or None."""
    running = context.context()
    if not running.has_function(name):
        return None
    return running.get_function_def(name)


def graph_def_of(function: Any) -> Any:
    """A function's ops as a `GraphDef`, with the functions that those call.

    The first ones are its arguments, as placeholders.
    """
    graph, _ = function_def_to_graph.function_def_to_graph_def(
        function, include_library_functions=True
    )
    return graph


def device() -> str:
    """The device under which the program calls; "" if there is none."""
    return str(context.context().device_name or "")


def is_heard() -> bool:
    """Whether somebody hears of the ops of this thread, and of no other's."""
    return bool(context.context().op_callbacks)


@contextlib.contextmanager
def heard(
    hear: Callable[[str, list[Any], list[Any]], None],
) -> Iterator[None]:
    """While open, calls `hear(type, inputs, outputs)` for each op that runs."""

    def callback(
        op_type: Any, inputs: Any, attrs: Any, outputs: Any, *_: Any, **__: Any
    ) -> None:
        if all(hasattr(x, "numpy") for x in (*inputs, *outputs)):  # else traced
            name = op_type.decode() if isinstance(op_type, bytes) else op_type
            hear(name, list(inputs), list(outputs))

    op_callbacks.add_op_callback(callback)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(callback)
