"""dependence: what a tensor is made of, by the ops of the graph."""

import hashlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_ancestry import COPIES, ancestors, identities, parents


def depends(
    value: tf.Tensor,
    sources: Sequence[tf.Tensor],
    stops: Sequence[tf.Tensor] = (),
    ends: Container[str] = (),
) -> bool:
    """Whether a value is made of one of the sources.

    A loop, a `tf.cond` or a function's call is made of all that it is given,
    whichever of its results is asked for: so a value may be said to depend that
    does not, never the other way round.

    Args:
      value: a tensor in a graph.
      sources: tensors of the same graph.
      stops: tensors that are no sources, whatever they are made of.
      ends: types of ops whose results are no sources, likewise.
    """
    names = {x.name for source in sources for x in identities(source)}
    return any(x.name in names for x in _made_of(value, stops, ends))


def constant_difference(new: tf.Tensor, old: tf.Tensor) -> Any:
    """The constant that one tensor is more than another; None if none is known.

    Args:
      new: of a graph.
      old: of the same graph.
    """
    total: Any = 0
    while new.name != old.name:
        op = new.op
        if op.type in (*COPIES, "StopGradient"):
            new = op.inputs[new.value_index]
            continue
        values = [tf.get_static_value(x) for x in op.inputs]
        if op.type != "AddV2" or [x is None for x in values].count(True) != 1:
            return None
        constant = 0 if values[1] is None else 1
        total = total + values[constant]
        new = op.inputs[1 - constant]
    return total


def segments(
    splits: Sequence[tf.Tensor],
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """The places and numbers of rows that ops on segments take, of splits alone.

    Args:
      splits: where each row of a ragged tensor begins, of one graph.
    """
    if not splits:
        return []
    return [
        (op.inputs[1], op.inputs[2])
        for op in splits[0].graph.get_operations()
        if op.type.startswith("UnsortedSegment")
        and all(_is_of(x, splits) for x in op.inputs[1:])
        and _is_of_shape(op.inputs[2])
    ]


def _is_of_shape(count: tf.Tensor) -> bool:
    """Whether this is a size of a shape less one: the last split's number."""
    while count.op.type in ("Cast", "Identity"):
        count = count.op.inputs[0]
    if count.op.type != "Sub" or tf.get_static_value(count.op.inputs[1]) != 1:
        return False
    size = count.op.inputs[0].op
    return size.type == "StridedSlice" and size.inputs[0].op.type == "Shape"


def _is_of(value: tf.Tensor, sources: Sequence[tf.Tensor]) -> bool:
    """Whether a value is made of sources, and of constants."""
    others = (
        x
        for x in _made_of(value, sources)
        if not x.op.inputs and x.op.type != "Const"
    )
    return next(others, None) is None and depends(value, sources)


def constants(value: tf.Tensor, stops: Sequence[tf.Tensor] = ()) -> str:
    """What tells the constants that a value is made of from others.

    Args:
      value: a tensor in a graph.
      stops: tensors that are not looked behind.
    """
    digest = hashlib.sha256()
    for tensor in _made_of(value, stops):
        if tensor.op.type == "Const":
            constant = tensor.op.node_def.attr["value"]
            digest.update(constant.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _made_of(
    value: tf.Tensor,
    stops: Sequence[tf.Tensor],
    ends: Container[str] = (),
) -> Iterator[tf.Tensor]:
    """A tensor and all that it is made of, back to where it stops."""

    def behind(tensor: tf.Tensor) -> list[tf.Tensor]:
        if tensor.op.type in ends:
            return []
        return parents(tensor) or _awaited(tensor.op)

    return ancestors(value, behind, stops)


def _awaited(op: tf.Operation) -> list[tf.Tensor]:
    """What an op without arguments waits for.

    A constant in a branch of the control flow of TensorFlow 1 waits for its
    predicate.
    """
    waits, inputs = list(op.control_inputs), []
    while waits:
        op = waits.pop()
        inputs += op.inputs
        if not op.inputs:
            waits += op.control_inputs
    return inputs
