"""tf_iterators: an iterator begun anew, and what datasets call.

A function keeps the iterator that it was traced with, and TensorFlow's public way
to begin anew is to make another one. The op that it is begun with can be run
again; but the iterator's resource has no public name, `_iterator_resource`.

What a dataset calls is known by its `_inputs` and `_functions`. The public op that
writes a dataset as a graph would write its arrays, too.
"""

import itertools
from typing import Any

import tensorflow as tf

from towers.foreign.tf_nodes import all_nodes

_PYTHON = ("EagerPyFunc", "PyFunc", "PyFuncStateless")


def restart(iterator: Any, dataset: tf.data.Dataset) -> Any:
    """Begins anew, on the device of both; the op that does, in a graph."""
    return tf.raw_ops.MakeIterator(
        dataset=tf.data.experimental.to_variant(dataset),
        iterator=iterator._iterator_resource,
    )


def captured(dataset: tf.data.Dataset) -> list[tf.Tensor]:
    """What the functions of a dataset hold, as the handles of variables."""
    own = [
        x
        for function in dataset._functions()
        for x in function.function.captured_inputs
    ]
    return own + [x for d in dataset._inputs() for x in captured(d)]


def calls_python(dataset: tf.data.Dataset) -> bool:
    """Whether it calls Python, which TensorFlow does where that was made."""
    graphs = [
        function.function.graph.as_graph_def()
        for function in dataset._functions()
    ]
    nodes = itertools.chain(*map(all_nodes, graphs))
    return any(node.op in _PYTHON for node in nodes) or any(
        calls_python(other) for other in dataset._inputs()
    )
