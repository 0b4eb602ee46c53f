"""row_shapes: what ops that move axes, and change shapes, make of rows.

Another part of the table of `row_ops`.
"""

import dataclasses

import tensorflow as tf

from towers.engine.row_kinds import (
    COUNT,
    SAME,
    OfRows,
    RowKind,
    RowKinds,
    Total,
    Vector,
    rearranged,
)
from towers.engine.row_ops import axis_at, rank_of, rules_by_op, static


def _reshaped(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, shape = kinds
    if not isinstance(kind, OfRows):
        if isinstance(shape, Vector):
            return None
        return (
            kind
            if isinstance(kind, Vector) and rank_of(tensor) == 1
            else (rearranged(kind))
        )
    before, after = tensor.op.inputs[0].shape, _reshaped_to(tensor)
    if before.rank is None or not after.rank:
        return None
    if before[: kind.axis] != after[: kind.axis] or not (
        before[: kind.axis].is_fully_defined()
    ):
        return None
    first, axis = kind.axis, kind.axis
    while after.rank > axis + 1 and after[axis] == 1:
        axis += 1  # one more in front
    kind = kind.at(axis)
    if isinstance(shape, Vector):
        if set(shape.of[axis + 1 :]) - {SAME} or kind.order:
            return None
        if shape.of[axis] in (COUNT, Total(power=1)):
            per = 1 if shape.of[axis].exact else None
            return dataclasses.replace(kind, per=per)
    sizes = static(tensor.op.inputs[1])
    if sizes is not None:
        after = tf.TensorShape([n if n >= 0 else None for n in sizes])
    return _regrouped(kind, before[first + 1 :], after[axis + 1 :])


def _reshaped_to(tensor: tf.Tensor) -> tf.TensorShape:
    """The shape of a reshape's result, with each size that is known by itself."""
    shape, target = tensor.shape, tensor.op.inputs[1].op
    if target.type != "Pack" or shape.rank != len(target.inputs):
        return shape
    sizes = [static(x) for x in target.inputs]
    return shape.merge_with([None if n in (None, -1) else n for n in sizes])


def _regrouped(
    kind: OfRows, before: tf.TensorShape, after: tf.TensorShape
) -> RowKind:
    """Rows with other axes after theirs: of one row, each entry, or None."""
    if before.as_list() == after.as_list() and before.is_fully_defined():
        return kind
    if after.rank == 0:
        return dataclasses.replace(kind, per=None)
    size, target = before.num_elements(), after.num_elements()
    if size is None or target is None or kind.per is None or kind.order:
        return None
    if not target or kind.per * size % target:
        return None
    return dataclasses.replace(kind, per=kind.per * size // target)


def _expanded(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, axis = kinds[0], axis_at(static(tensor.op.inputs[1]), rank_of(tensor))
    if not isinstance(kind, OfRows):
        return rearranged(kind)
    return None if axis is None else kind.at(kind.axis + (axis <= kind.axis))


def _squeezed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, shape = kinds[0], tensor.op.inputs[0].shape
    if not isinstance(kind, OfRows):
        return rearranged(kind)
    axes = [
        axis % (shape.rank or 1) for axis in tensor.op.get_attr("squeeze_dims")
    ]
    if shape.rank is None:
        return None
    if not axes:
        axes = [i for i, size in enumerate(shape) if size == 1]
        if any(size is None and i != kind.axis for i, size in enumerate(shape)):
            return None
    if kind.axis in axes:
        return None
    return kind.at(kind.axis - sum(axis < kind.axis for axis in axes))


def _transposed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, order = kinds[0], static(tensor.op.inputs[1])
    if not isinstance(kind, OfRows):
        return rearranged(kind)
    return None if order is None else kind.at(order.tolist().index(kind.axis))


def _tiled(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, times = kinds
    data = tensor.op.inputs[0]
    if kind == SAME and isinstance(times, Vector):
        return _spread(data, times, rank_of(tensor))
    if not isinstance(kind, OfRows):
        return rearranged(kind) if times == SAME else None
    many = tf.get_static_value(tensor.op.inputs[1], partial=True)
    if times != SAME or many is None or many[kind.axis] is None:
        return None
    if many[kind.axis] == 1:
        return kind
    return dataclasses.replace(
        kind, per=None, order=f"{kind.order}{many[kind.axis]},"
    )


def _broadcast(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, shape = kinds
    data, rank = tensor.op.inputs[0], rank_of(tensor)
    if isinstance(kind, OfRows):
        if rank is None or rank_of(data) is None:
            return None
        return kind.at(kind.axis + rank - data.shape.rank)
    if kind == SAME and isinstance(shape, Vector):
        return _spread(data, shape, rank)
    return rearranged(kind) if shape == SAME else None


def _spread(data: tf.Tensor, shape: Vector, rank: int | None) -> RowKind:
    """Of a broadcast to a shape with the number of rows: equal rows."""
    axes = [i for i, kind in enumerate(shape.of) if kind != SAME]
    before = rank_of(data)
    if rank is None or before is None or len(axes) != 1:
        return None
    count, place = shape.of[axes[0]], axes[0] - rank
    if (count.summed, count.power) != (False, 1):
        return None
    if before >= -place and data.shape[place] != 1:
        return None
    return OfRows(axes[0], 1 if count.exact else None, uniform=True)


RULES = rules_by_op(
    (_reshaped, "Reshape"),
    (_expanded, "ExpandDims"),
    (_squeezed, "Squeeze"),
    (_transposed, "Transpose"),
    (_tiled, "Tile"),
    (_broadcast, "BroadcastTo"),
)
