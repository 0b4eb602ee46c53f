"""row_products: what products of matrices, and lists in loops, make of rows.

The last part of the table of `row_ops`.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine.row_kinds import (
    SAME,
    OfRows,
    RowKind,
    RowKinds,
    Total,
    agreed,
    either,
    is_count,
    product,
)
from towers.engine.row_ops import rules_by_op


def _matrices(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    op = tensor.op
    names = ("transpose_a", "transpose_b")
    if op.type != "MatMul":
        names = ("adj_x", "adj_y")
    ranks = [x.shape.rank for x in [*op.inputs, tensor]]
    if None in ranks:
        return None
    labels = [
        _labels(rank or 0, op.get_attr(n)) for rank, n in zip(ranks, names)
    ]
    right = [_RIGHT.get(label, label) for label in labels[1]]
    result = [*range(-(ranks[2] or 0), -2), "m", "n"]
    return _contracted(op.inputs, kinds, [labels[0], right], result)


_RIGHT = {"m": "k", "k": "n"}


def _labels(rank: int, transposed: bool) -> list[Any]:
    last = ["k", "m"] if transposed else ["m", "k"]
    return [*range(-rank, -2), *last]


def _einsum(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    equation = tensor.op.get_attr("equation").decode()
    if "." in equation:
        return None
    terms, result = equation.split("->")
    labels = [list(term) for term in terms.split(",")]
    return _contracted(tensor.op.inputs, kinds, labels, list(result))


def _contracted(
    inputs: Sequence[tf.Tensor],
    kinds: RowKinds,
    labels: Sequence[list[Any]],
    result: list[Any],
) -> RowKind:
    """Of products of entries, summed over axes that the result has not."""
    rows = [kind for kind in kinds if isinstance(kind, OfRows)]
    totals = [kind for kind in kinds if not isinstance(kind, OfRows)]
    if not rows:
        flat = [agreed([kind]) for kind in totals]
        if len(flat) == 1 or None in flat:
            return flat[0] if len(flat) == 1 else None
        return product(*flat) if len(flat) == 2 else None  # type: ignore[arg-type]
    mine = {
        names[kind.axis]
        for kind, names in zip(kinds, labels)
        if isinstance(kind, OfRows)
    }
    if len(mine) > 1 or not all(is_count(kind) for kind in totals):
        return None
    if len({kind.order for kind in rows}) > 1:
        return None
    (label,) = mine
    for x, kind, names in zip(inputs, kinds, labels):
        if isinstance(kind, OfRows):
            if names.count(label) > 1:
                return None
        elif label in names and x.shape[names.index(label)] != 1:
            return None
    power = sum(kind.power for kind in kinds)  # type: ignore[union-attr]
    if label in result:
        per = next((kind.per for kind in rows if kind.per is not None), None)
        counted = all(kind.counted for kind in rows)
        axis = result.index(label)
        return OfRows(axis, per, power, counted, order=rows[0].order)
    return Total(True, power)


# -------------------------------------------------------------- lists in loops
def _listed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a TensorList of the first axis: the kind of each element."""
    kind = kinds[0]
    if not isinstance(kind, OfRows):
        return None
    return kind.at(kind.axis - 1) if kind.axis else None


def _reserved(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of an empty TensorList, reserved for elements of a shape."""
    return SAME if kinds[1] == SAME else None


def _read(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    return kinds[0] if kinds[1] == SAME else None


def _written(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    before, place, item = kinds
    if place != SAME:
        return None
    if before == SAME:
        return item
    return either([before, item])


def _stacked(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[0]
    return kind.at(kind.axis + 1) if isinstance(kind, OfRows) else kind


RULES = rules_by_op(
    (_matrices, "MatMul BatchMatMulV2 BatchMatMulV3"),
    (_einsum, "Einsum"),
    (_listed, "TensorListFromTensor"),
    (_reserved, "TensorListReserve EmptyTensorList"),
    (_read, "TensorListGetItem"),
    (_written, "TensorListSetItem"),
    (_stacked, "TensorListStack"),
)
