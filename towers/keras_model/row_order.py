"""row_order: outputs whose rows a model puts one batch after the other.

Two views of a batch, joined along its rows, come as a a' b b' of two towers
where the model has a b a' b', and time steps before rows likewise. Nothing shows
it in the shapes: rows that are reshaped, as [rows, 2, 3] to [2 * rows, 3], are as
many, and in order.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import specs
from towers.foreign.tf_ancestry import ancestors, parents
from towers.keras_model.sources import Sources

# What takes or chooses rows, and a loop: nothing is known of what is before.
_ENDS = {
    "GatherV2",
    "Slice",
    "Split",
    "SplitV",
    "StatelessWhile",
    "StridedSlice",
    "While",
}
# What can put one batch after the other, beside a reshaped transposition.
_JOINS = {"ConcatV2", "Tile"}
# Without one of these no tower puts its rows in another order.
MOVES = frozenset({*_JOINS, "Reshape", "Transpose"})
MANY = 1009  # rows that no other axis has: a prime
SOME = 13  # of another axis whose size is not known


def specs_of(nest: Any, divided: Sequence[bool], rows: int | None) -> Any:
    """Specs of a nest, of so many rows, or any number, where it is divided.

    Of a whole leaf, axes of unknown size are 1: that size shows in an output,
    but not where rows are broadcast against it.
    """

    def spec_of(value: Any, mine: bool) -> Any:
        spec = specs.of(value, rows) if mine else specs.of(value)
        if spec is None or spec.shape.rank is None:
            return spec
        if not mine:
            ragged = isinstance(spec, tf.RaggedTensorSpec)
            return spec if ragged else specs.filled(spec, 1)
        is_open = rows is None or not isinstance(spec, tf.TensorSpec)
        return spec if is_open else specs.filled(spec, SOME)

    flat = map(spec_of, tf.nest.flatten(nest), divided)
    return tf.nest.pack_sequence_as(nest, [*flat])


def unordered(outputs: Any, sources: Sources) -> list[int]:
    """Which of a tower's flat outputs may have rows in another order.

    Args:
      outputs: the tower's.
      sources: what it is given.
    """
    batch = sources.rows
    return [
        i
        for i, output in enumerate(tf.nest.flatten(outputs))
        if output is not None and _may_be_joined(output, batch, sources.copies)
    ]


def _may_be_joined(
    output: Any, batch: Sequence[Any], others: Sequence[Any]
) -> bool:
    """Whether a tower joins what it returns along the rows, by its looks.

    Quickly, for `joined_by` to be asked only then.

    Args:
      output: of a tower, in its graph.
      batch: what the tower was given of the batch's rows.
      others: what else it was given.
    """
    rows = {None, *(x.shape[0] for x in batch if x.shape.rank)}
    for tensor in _back(output, [*batch, *others], _may_pass):
        op = tensor.op
        if op.type in _JOINS and _first(op):
            return True
        if op.type in ("Reshape", "Transpose") and op.inputs[0].shape.rank:
            before = op.inputs[0].shape
            same = before[0] == tensor.shape[0]
            if op.type == "Transpose":
                if before[0] is None and same and _order(op)[:1] != [0]:
                    return True
            elif before[0] is not None and not same and rows & {*before[1:]}:
                return True
    return False


def joined_by(output: Any, many: int = MANY) -> str | None:
    """The op by which many rows are joined with others along their axis.

    Args:
      output: of a model that was given `many` rows, in its graph; of several
        rows for each of the batch's, or None is returned.
      many: a prime.
    """
    if not _batches(output, many) > 1:
        return None
    for tensor in _back(output, (), functools.partial(_passes, many)):
        op = tensor.op
        before = [x for x in op.inputs if x.shape.rank]
        if op.type in _JOINS and _first(op):
            if any(_batches(x, many) for x in before):
                return op.name
        if op.type == "Reshape" and before[0].shape[0] != tensor.shape[0]:
            later = [n for n in before[0].shape[1:] if n and n % many == 0]
            if later and not _batches(before[0], many):
                return op.name
    return None


def is_for_joined(drawn: tf.Tensor, many: int) -> bool:
    """Whether what is drawn for many rows meets some that are joined.

    Args:
      drawn: of several numbers for each row, in the first axis.
      many: so many rows there are, a prime.
    """
    times = _batches(drawn, many)
    todo, names = [drawn], {drawn.name}
    while todo:
        tensor = todo.pop()
        for op in tensor.consumers():
            if _divides(op, tensor, many):
                return True
            others = [x for x in op.inputs if x.name not in names]
            if any(joined_by(x, many) is not None for x in others):
                return True
            same = [y for y in op.outputs if _batches(y, many) == times]
            todo += [y for y in same if y.name not in names]
            names.update(y.name for y in same)
    return False


def _divides(op: tf.Operation, tensor: tf.Tensor, many: int) -> bool:
    """Whether an op takes some of what is in the first axis apart from the rest."""
    if op.type == "Reshape":
        return op.inputs[0] is tensor and not _batches(op.outputs[0], many)
    return op.type in _ENDS and any(
        not y.shape.rank or y.shape[0] != tensor.shape[0] for y in op.outputs
    )


def _batches(tensor: Any, many: int) -> int:
    """How often the batch's rows are in the first axis; 0 of another axis."""
    first = tensor.shape[0] if tensor.shape.rank else None
    return 0 if not first or first % many else first // many


def _first(op: tf.Operation) -> bool:
    """Whether an op of `_JOINS` joins along the first axis."""
    if op.type == "Tile":
        times = tf.get_static_value(op.inputs[1], partial=True)
        return times is None or times[0] is None or times[0] > 1
    axis = tf.get_static_value(op.inputs[-1])
    rank = op.outputs[0].shape.rank
    return len(op.inputs) > 2 and axis is not None and axis in (0, -(rank or 0))


def _order(op: tf.Operation) -> list[int | None]:
    """Of the axes that a transposition makes of those before."""
    order = tf.get_static_value(op.inputs[1])
    return [None] if order is None else order.tolist()


def _back(
    output: Any, inputs: Sequence[Any], passes: Any
) -> Iterator[tf.Tensor]:
    """A tensor, and those before it whose first axis `passes` on to it."""
    if not output.shape.rank:
        return iter(())

    def behind(tensor: tf.Tensor) -> list[tf.Tensor]:
        op = tensor.op
        if op.type in _ENDS or "Call" in op.type:
            return []
        before = parents(tensor)
        if op.type in ("BroadcastTo", "Reshape", "Tile"):
            before = before[:1]
        elif op.type == "Transpose":
            before = before[:1] if _order(op)[:1] == [0] else []
        return [x for x in before if passes(x, tensor)]

    stops = [x for x in inputs if isinstance(x, tf.Tensor)]
    return ancestors(output, behind, stops)


def _may_pass(before: Any, after: Any) -> bool:
    if after.op.type == "Reshape":
        return bool(before.shape.rank)
    sizes = {x.shape[0] for x in (before, after) if x.shape.rank}
    return bool(before.shape.rank) and len(sizes - {None}) < 2


def _passes(many: int, before: Any, after: Any) -> bool:
    if after.op.type == "Reshape":  # as a dense layer does, there and back
        return bool(_batches(before, many))
    return bool(before.shape.rank) and before.shape[0] == after.shape[0]
