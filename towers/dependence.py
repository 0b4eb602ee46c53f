"""dependence: whether a tensor is made of others, by the ops of the graph."""

from collections.abc import Iterator, Sequence

import tensorflow as tf


def depends(
    value: tf.Tensor,
    sources: Sequence[tf.Tensor],
    known: Sequence[tf.Tensor] = (),
) -> bool:
    """Whether a value is made of one of the sources.

    A loop, a `tf.cond` or a function's call is made of all that it is given,
    whichever of its results is asked for: so a value may be said to depend that
    does not, never the other way round.

    Args:
      value: a tensor in a graph.
      sources: tensors of the same graph.
      known: tensors that are no sources, whatever they are made of.
    """
    found = {x.name for source in sources for x in _passed_on(source)}
    seen = {x.name for x in known}
    todo = [value]
    while todo:
        tensor = todo.pop()
        if tensor.name in seen:
            continue
        if tensor.name in found:
            return True
        seen.add(tensor.name)
        todo += _made_of(tensor)
    return False


def _passed_on(tensor: tf.Tensor) -> Iterator[tf.Tensor]:
    """A tensor, and those that it is just passed on from.

    A layer that is pinned to a device takes what it is given from there.
    """
    yield tensor
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
        yield tensor


def _made_of(tensor: tf.Tensor) -> list[tf.Tensor]:
    op = tensor.op
    if op.type == "IdentityN":
        # Custom gradients send results and arguments through one of these.
        return [op.inputs[tensor.value_index]]
    if op.inputs:
        return list(op.inputs)
    # A constant in a branch of the control flow of TensorFlow 1 waits for its
    # predicate.
    waits, inputs = list(op.control_inputs), []
    while waits:
        op = waits.pop()
        inputs += op.inputs
        if not op.inputs:
            waits += op.control_inputs
    return inputs
