"""tf_gradients: as `tf.custom_gradient`, in graphs that can be freed.

`tf.custom_gradient` registers the gradient of each call for good, with all that
it holds: a process that traces again and again (several models, several batch
sizes, eager calls) keeps every graph. And it makes the call's arguments results
too, so that a tape makes zeros for each of them, an op per parameter and tower.

Here the graph owns the gradient, and a tape hears of the results only. TensorFlow
has no public words for either: this file takes entries back from
`gradient_registry._registry`, and speaks to tapes by `record`. Of a variable that is
not read, but differentiated, they hear by `variable_accessed`.
`tf_gradients_test.py` fails when one of them changes.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework import ops  # for `gradient_registry`
from tensorflow.python.ops import resource_variable_ops

# No string: those are written to the MetaGraph, where this has no place.
_KEY = ("towers", "gradients")
_FRESH = itertools.count()
_NOTHING: Mapping[int, str] = {}


def own_gradient(
    function: Callable[..., Any], elsewhere: Mapping[int, str] = _NOTHING
) -> Callable[..., Any]:
    """Gives what `function` computes the gradient that it says, in graphs.

    Args:
      function: from tensors to (a tensor or a list of tensors, backward), where
        `backward(*upstream)` returns one gradient, or None, per argument. If the
        function reads trainable variables, backward gets `variables=` too.
      elsewhere: by the place of an argument its device, if that is not to be
        taken to the one which is open.
    """

    @functools.wraps(function)
    def call(*args: tf.Tensor) -> Any:
        with record.VariableWatcher() as watcher:
            results, backward = function(*args)
        # A tower's copies of its weights are watched as well, as arguments.
        watched = [
            v
            for v in watcher.watched_variables()
            if not isinstance(v, tf.Tensor)
        ]
        if watched:
            backward = functools.partial(backward, variables=watched)
        flat = tf.nest.flatten(results)
        if not flat:
            return results

        def gradients(*upstream: Any) -> list[Any]:
            grads = backward(*upstream)
            return list(grads) if isinstance(grads, (list, tuple)) else [grads]

        # A tape hears that the results come from the arguments; what goes by
        # the graph needs one op that has both for inputs, if they differ.
        graph = tf.compat.v1.get_default_graph()
        same = [id(x) for x in flat] == [id(x) for x in args]
        aside = [None] * (0 if same else len(flat))
        name = _registered(
            graph,
            lambda *upstream: aside + gradients(*upstream[: len(flat)]),
        )
        with record.stop_recording():
            inputs = [
                _left_there(x, elsewhere[i]) if i in elsewhere else x
                for i, x in enumerate(args)
            ]
            both = flat if same else [*flat, *inputs]
            with graph.gradient_override_map({"IdentityN": name}):
                passed = tf.identity_n(both)[: len(flat)]
        record.record_operation(name, passed, list(args), gradients)
        return tf.nest.pack_sequence_as(results, passed)

    return call


def own_gradient_of_each(
    function: Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]],
    backward: Callable[[int, Any], Any],
    arguments: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """What `function` makes of tensors, each with a gradient of its own.

    A tape hears of each result by itself, and so do those below of its gradient.

    Args:
      function: from the arguments to as many tensors, each of the one at its place.
      backward: `backward(k, upstream)` returns the gradient of the k-th argument.
      arguments: tensors.
    """
    with unrecorded():
        results = function(arguments)

    def passed(k: int, argument: tf.Tensor, result: tf.Tensor) -> tf.Tensor:
        pair = result, functools.partial(backward, k)
        return own_gradient(lambda _: pair)(argument)

    return [passed(k, *pair) for k, pair in enumerate(zip(arguments, results))]


def kept_apart(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor itself, behind an op that TensorFlow's optimizer leaves there.

    Forward accumulators are told what it does: they know no op that has a shape
    for an attribute.
    """
    with unrecorded():
        same = tf.ensure_shape(tensor, tensor.shape)
    record.record_operation(
        "EnsureShape", [same], [tensor], lambda upstream: [upstream]
    )
    return same


def _left_there(tensor: tf.Tensor, device: str) -> tf.Tensor:
    """An empty tensor with the gradient of one that stays on its device.

    What nobody uses crosses all the same in a graph that is not optimized.
    """

    def empty(tensor: tf.Tensor) -> Any:
        nothing = tf.zeros([0], tensor.dtype)
        # Its gradient has the tensor's shape.
        nothing = tf.compat.v1.placeholder_with_default(nothing, None)
        return nothing, lambda upstream: upstream

    with tf.device(device):
        return own_gradient(empty)(tensor)


def _registered(graph: tf.Graph, gradient: Callable[..., Any]) -> str:
    """A name by which TensorFlow finds a gradient while its graph lives."""
    name = f"OwnGradient-{next(_FRESH)}"
    graph.get_collection_ref(_KEY).append(gradient)
    reference = weakref.ref(gradient)

    def looked_up(op: tf.Operation, *upstream: Any) -> Any:
        gradient = reference()
        if gradient is None:
            raise RuntimeError(
                f"The graph in which {op.name!r} was built is gone, and the "
                "gradient of its towers with it. Keep the tf.function or the "
                "tf.Graph that built it until its gradient is taken."
            )
        return gradient(*upstream)

    tf.RegisterGradient(name)(looked_up)
    weakref.finalize(graph, ops.gradient_registry._registry.pop, name, None)
    return name


def accessed(variable: tf.Variable) -> None:
    """Tells tapes, and the function that is being made, as if it were read."""
    resource_variable_ops.variable_accessed(variable)


def unrecorded() -> AbstractContextManager[None]:
    """While open, no tape hears of what is made."""
    return record.stop_recording()


def recorded() -> bool:
    """Whether a tape, or a forward accumulator, listens to what is made."""
    return bool(record.could_possibly_record())


def followed(tensors: Sequence[tf.Tensor]) -> bool:
    """Whether a tape follows one of these, to take gradients for it."""
    return bool(record.should_record_backprop(list(tensors)))
