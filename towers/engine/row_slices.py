"""row_slices: what ops that take parts, or join them, make of rows.

Another part of the table of `row_ops`.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from towers.engine.row_kinds import (
    COUNT,
    SAME,
    OfRows,
    RowKind,
    RowKinds,
    Total,
    Vector,
    agreed,
    rearranged,
    together,
    vector,
)
from towers.engine.row_ops import axis_at, rank_of, rules_by_op, static


def _sliced(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a StridedSlice, which takes an axis whole or in part."""
    op, kind = tensor.op, kinds[0]
    if any(other != SAME for other in kinds[1:]):
        return None
    if isinstance(kind, Total):
        return kind
    begin, end, stride = map(static, op.inputs[1:])
    if begin is None or end is None or stride is None:
        size = op.inputs[1].shape[0]
        if isinstance(kind, Vector) or size is None:
            return None
        begin = end = stride = [1] * size  # some part, where no mask says all
    masks = [op.get_attr(name) for name in _MASKS]
    items = [_item(k, begin, end, stride, masks) for k in range(len(begin))]
    if isinstance(kind, Vector):
        taken = list(kind.of)[items[0]] if items[0] is not Ellipsis else kind.of
        if isinstance(taken, Total):
            return taken
        return vector(taken)
    rank = rank_of(op.inputs[0])
    return _at(kind, items, rank) if rank and isinstance(kind, OfRows) else None


_MASKS = (
    "begin_mask",
    "end_mask",
    "ellipsis_mask",
    "new_axis_mask",
    "shrink_axis_mask",
)


def _item(k: int, begin: Any, end: Any, stride: Any, masks: list[int]) -> Any:
    """The k-th index of a slice, as it stands in Python's brackets."""
    from_start, to_end, dots, new, one = [bool(m >> k & 1) for m in masks]
    if dots:
        return Ellipsis
    if new:
        return None
    if one:
        return int(begin[k])
    first = begin[k] == 0 and stride[k] > 0
    return slice(
        None if from_start or first else int(begin[k]),
        None if to_end else int(end[k]),
        int(stride[k]),
    )


def _at(kind: OfRows, items: list[Any], rank: int) -> RowKind:
    """The rows after a slice by `items`; None if some are cut off."""
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items = [*items, Ellipsis]
    axis, after = 0, 0
    for item in items:
        if item is None:
            after += 1
            continue
        many = rank - taken if item is Ellipsis else 1
        if axis <= kind.axis < axis + many:
            whole = item is Ellipsis or (
                isinstance(item, slice) and item == slice(None, None, 1)
            )
            return kind.at(after + kind.axis - axis) if whole else None
        axis += many
        after += 0 if isinstance(item, int) else many
    return None


def _cut(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of `tf.slice`."""
    kind = kinds[0]
    begin, size = static(tensor.op.inputs[1]), kinds[2]
    if isinstance(kind, Vector) and begin is not None and size == SAME:
        many = tensor.shape[0]
        return vector(kind.of[begin[0] :][:many]) if many is not None else None
    if not isinstance(kind, OfRows):
        return rearranged(kind) if set(kinds[1:]) == {SAME} else None
    if begin is None or begin[kind.axis]:
        return None
    if isinstance(size, Vector):
        exact = size.of[kind.axis] == COUNT and kind.per == 1
        return kind if exact else None
    sizes = static(tensor.op.inputs[2])
    return kind if sizes is not None and sizes[kind.axis] == -1 else None


def _padded(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, sides = kinds[0], static(tensor.op.inputs[1])
    if not isinstance(kind, OfRows):
        return None
    if sides is None or any(sides[kind.axis]) or set(kinds[1:]) != {SAME}:
        return None
    return dataclasses.replace(kind, uniform=False)


def _split(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a split, along another axis than that of rows."""
    op = tensor.op
    place, axis = (0, 1) if op.type == "SplitV" else (1, 0)
    kind, data = kinds[place], op.inputs[place]
    if not isinstance(kind, OfRows):
        return rearranged(kind)
    along = axis_at(static(op.inputs[-1 if axis else 0]), rank_of(data))
    return None if along in (None, kind.axis) else kind


def _unpacked(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, op = kinds[0], tensor.op
    if isinstance(kind, Vector):
        return kind.of[tensor.value_index]
    if not isinstance(kind, OfRows):
        return kind
    axis = axis_at(op.get_attr("axis"), rank_of(op.inputs[0]))
    if axis is None or axis == kind.axis:
        return None
    return kind.at(kind.axis - (axis < kind.axis))


def _packed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    rows = [kind for kind in kinds if isinstance(kind, OfRows)]
    if not rows:
        return vector(kinds) if rank_of(tensor) == 1 else agreed(kinds)
    axis = axis_at(tensor.op.get_attr("axis"), rank_of(tensor))
    one = together(kinds)
    if one is None or axis is None:
        return None
    return one.at(one.axis + (axis <= one.axis))


def _joined(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a concatenation."""
    kinds, rank = kinds[:-1], rank_of(tensor)
    axis = axis_at(static(tensor.op.inputs[-1]), rank)
    if not any(isinstance(kind, OfRows) for kind in kinds):
        if rank != 1 or not any(isinstance(kind, Vector) for kind in kinds):
            return agreed(kinds)
        return _chained(tensor, kinds)
    one = together(kinds)
    if one is None or axis is None:
        return None
    if axis != one.axis:
        return one
    return dataclasses.replace(one, per=None, order=f"{one.order}{len(kinds)},")


def _chained(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    each: list[RowKind] = []
    for x, kind in zip(tensor.op.inputs, kinds):
        size = x.shape[0]
        if size is None:
            return None
        each += kind.of if isinstance(kind, Vector) else [kind] * size
    return vector(each)


def _one_hot(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[0]
    axis: Any = tensor.op.get_attr("axis")
    if not isinstance(kind, OfRows) or set(kinds[1:]) != {SAME} or kind.power:
        return None
    return kind.at(kind.axis + (0 <= int(axis) <= kind.axis))


def _gathered(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    op = tensor.op
    data, index = kinds[:2]
    rank, count = rank_of(op.inputs[0]), rank_of(op.inputs[1])
    axis = axis_at(static(op.inputs[2]), rank)
    if rank is None or count is None or axis is None or kinds[2] != SAME:
        return None
    batch = op.get_attr("batch_dims")
    if batch:
        both = together(kinds[:2])
        return both if both and both.axis < batch and not both.power else None
    if isinstance(index, OfRows):
        if data == SAME:
            return index.at(axis + index.axis)
        return _picked(data, index, axis)
    if isinstance(data, Vector):
        places = static(op.inputs[1]) if index == SAME else None
        if places is None:
            return None
        one = [data.of[place] for place in np.ravel(places)]
        return vector(one) if count else one[0]
    if index != SAME:
        return None
    if not isinstance(data, OfRows):
        return rearranged(data)
    if axis == data.axis:
        return None
    return data.at(data.axis + (count - 1 if axis < data.axis else 0))


_PICKED = "picked by "


def _picked(data: RowKind, index: OfRows, axis: int) -> RowKind:
    """Of a gather of the rows whose numbers are a result of `_where`."""
    if not isinstance(data, OfRows) or (data.axis, data.order) != (axis, ""):
        return None
    if not index.order.startswith(_PICKED) or index.axis:
        return None
    return dataclasses.replace(index, axis=axis, power=data.power)


def _where(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of `tf.where`: the numbers of the rows for which a condition holds."""
    kind = kinds[0]
    if not isinstance(kind, OfRows) or rank_of(tensor.op.inputs[0]) != 1:
        return None
    if kind.power or kind.order or not kind.counted:
        return None
    order = f"{_PICKED}{tensor.op.name}"
    return OfRows(0, None, counted=False, order=order)


def _gathered_by_path(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    data, index = kinds
    rank = rank_of(tensor.op.inputs[1])
    if data != SAME or not isinstance(index, OfRows) or rank is None:
        return None
    return index if index.axis < rank - 1 and not index.power else None


RULES = rules_by_op(
    (_sliced, "StridedSlice"),
    (_cut, "Slice"),
    (_padded, "MirrorPad Pad PadV2"),
    (_split, "Split SplitV"),
    (_unpacked, "Unpack"),
    (_packed, "Pack"),
    (_joined, "ConcatV2"),
    (_one_hot, "OneHot"),
    (_gathered, "GatherV2"),
    (_gathered_by_path, "GatherNd"),
    (_where, "Where"),
)
