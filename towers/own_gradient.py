"""own_gradient: `tf.custom_gradient`, with graphs that can be freed.

TensorFlow registers the gradient of each call for good, under a name of its
own, and what it registers holds the graph of that call: a process that traces
again and again (several models, several batch sizes, eager calls) keeps all
that it ever traced. No public word takes an entry back. So this file swaps it,
in `gradient_registry._registry`, for one that looks it up in its graph, and
goes when the graph goes. Nor is there a public word for whether a tape records,
as `record.should_record_backprop` says. `own_gradient_test.py` fails when that
changes.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework import ops  # for `gradient_registry`

# No string: those are written to the MetaGraph, where this has no place.
_KEY = ("towers", "gradients")


def own_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `tf.custom_gradient`, for functions that are called in graphs."""
    decorated = tf.custom_gradient(function)

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> Any:
        results = decorated(*args)
        made = [result.op for result in tf.nest.flatten(results)[:1]]
        _hand_to_graph(made[0] if made else _last())
        return results

    return call


def _last() -> tf.Operation:
    """The op of a call without results, which nothing else leads to."""
    made = tf.compat.v1.get_default_graph().get_operations()
    return next(op for op in reversed(made) if op.type == "IdentityN")


def _hand_to_graph(op: tf.Operation) -> None:
    """Lets the graph of `op` own the gradient that is registered for it."""
    registry = ops.gradient_registry._registry
    name = op.get_attr("_gradient_op_type").decode()
    entry = registry[name]
    gradient = entry["type"]
    op.graph.get_collection_ref(_KEY).append(gradient)
    known = weakref.ref(gradient)

    def looked_up(op: tf.Operation, *upstream: Any) -> Any:
        gradient = known()
        if gradient is None:
            raise RuntimeError(
                f"The graph in which {op.name!r} was built is gone, and the "
                "gradient of its towers with it. Keep the tf.function or the "
                "tf.Graph that built it until its gradient is taken."
            )
        return gradient(op, *upstream)

    entry["type"] = looked_up
    weakref.finalize(op.graph, registry.pop, name, None)


def recorded(tensors: Sequence[tf.Tensor]) -> bool:
    """Whether a tape records what is made of one of these."""
    return bool(record.should_record_backprop(list(tensors)))
