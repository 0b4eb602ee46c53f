"""row_ops: what ops make of rows, and of sums over rows: a table by type.

Each rule takes (result, kinds of what the op takes) to the kind of the result.
"""

import dataclasses
from collections.abc import Callable
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
    either,
    is_count,
    product,
    quotient,
    vector,
)

RowRule = Callable[[tf.Tensor, RowKinds], RowKind]
# What hands its first input on.
PASS = (
    *("CheckNumerics", "EnsureShape", "Identity", "PreventGradient"),
    *("Snapshot", "StopGradient"),
)


_CONSTANTS: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "AddV2": np.add,
    "ConcatV2": lambda *parts: np.concatenate(parts[:-1], parts[-1]),
    "Mul": np.multiply,
    "Pack": lambda *parts: np.stack(parts),
    "Prod": lambda x, axes: np.prod(x, tuple(np.ravel(axes)), dtype=x.dtype),
    "Range": np.arange,
    "Reshape": np.reshape,
    "Sub": np.subtract,
}


def rank_of(tensor: tf.Tensor) -> int | None:
    """How many axes a tensor has, where that is known."""
    return tensor.shape.rank


def axis_at(value: Any, rank: int | None) -> int | None:
    """An axis counted from the first, where that and the rank are known."""
    return None if value is None or not rank else int(value) % rank


def static(tensor: tf.Tensor) -> Any:
    """The value of a constant, or of what is computed of some; else None."""
    value, op = tf.get_static_value(tensor), tensor.op
    if value is None and tensor.shape.num_elements() == 0:
        return np.zeros(tensor.shape, tensor.dtype.as_numpy_dtype)
    if value is None and op.type == "Slice":
        return _part_of_shape(op)
    if value is None and op.type in _CONSTANTS and len(op.inputs) < 9:
        each = [static(x) for x in op.inputs]
        if all(x is not None for x in each):
            return _CONSTANTS[op.type](*each)
    return value


def _part_of_shape(op: tf.Operation) -> Any:
    """Sizes that a slice of a shape takes, if they are known."""
    shape, begin, size = op.inputs
    if shape.op.type != "Shape" or static(begin) is None:
        return None
    dims, start = shape.op.inputs[0].shape, static(begin)[0]
    if dims.rank is None or static(size) is None:
        return None
    sizes = dims.as_list()[start : start + static(size)[0]]
    return None if None in sizes else np.array(sizes)


def is_zero(tensor: tf.Tensor) -> bool:
    value = tf.get_static_value(tensor)
    return value is not None and not np.any(value)


# ------------------------------------------------------------- element by element
def _passed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    return kinds[0]


def _cast(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    before, after = tensor.op.inputs[0].dtype, tensor.dtype
    if isinstance(kinds[0], OfRows):
        linear = kinds[0].power == 0 or after.is_floating
        return kinds[0] if linear else None
    return kinds[0] if after.is_floating or before.is_integer else None


def _recast(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    same = tensor.shape.rank == tensor.op.inputs[0].shape.rank
    return _elementwise(tensor, kinds) if same else None


def _added(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a sum; a term that is zero is of any kind."""
    terms = [
        (x, kind)
        for x, kind in zip(tensor.op.inputs, kinds)
        if not (kind == SAME and is_zero(x))
    ]
    if any(isinstance(kind, OfRows) for kind in kinds):
        # Of what has no rows, only what is the same goes with any of them.
        powers = {
            kind.power
            for _, kind in terms
            if isinstance(kind, OfRows) or kind == SAME
        }
        if len(powers) > 1 or not all(map(_goes_with_rows, kinds)):
            return None
        return _aligned(tensor, kinds, powers.pop())
    if any(isinstance(kind, Vector) for kind in kinds):
        return _by_entry(lambda *entry: agreed(entry), kinds)
    return agreed([kind for _, kind in terms]) if terms else SAME


def _goes_with_rows(kind: RowKind) -> bool:
    return isinstance(kind, OfRows) or kind == SAME


def _multiplied(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    return _scaled(tensor, kinds, product, 1)


def _divided(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    return _scaled(tensor, kinds, quotient, -1)


def _scaled(
    tensor: tf.Tensor,
    kinds: RowKinds,
    function: Callable[[Total, Total], RowKind],
    sign: int,
) -> RowKind:
    one, other = kinds
    if isinstance(one, OfRows) or isinstance(other, OfRows):
        if not all(isinstance(k, OfRows) or is_count(k) for k in kinds):
            return None
        return _aligned(tensor, kinds, one.power + sign * other.power)  # type: ignore[union-attr]
    return _by_entry(function, kinds)


def _by_entry(function: Callable[..., RowKind], kinds: RowKinds) -> RowKind:
    """Of vectors, entry by entry, and of totals."""
    sizes = {len(kind.of) for kind in kinds if isinstance(kind, Vector)}
    if not sizes:
        return function(*kinds)
    if len(sizes) > 1:
        return None
    each = [
        kind.of if isinstance(kind, Vector) else [kind] * max(sizes)
        for kind in kinds
    ]
    return vector(function(*entry) for entry in zip(*each))


def _elementwise(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of any function that is applied to each row by itself."""
    for kind in kinds:
        if kind != SAME and not (isinstance(kind, OfRows) and kind.power == 0):
            return None
    return _aligned(tensor, kinds, 0)


def _selected(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a condition, and of what is there where it holds or does not."""
    if kinds[0] == SAME and not any(isinstance(k, OfRows) for k in kinds):
        return either(kinds[1:])
    if tensor.op.type == "Select" and len(_ranks(tensor)) > 1:
        return None
    return _elementwise(tensor, kinds)


def _ranks(tensor: tf.Tensor) -> set[int | None]:
    return {x.shape.rank for x in tensor.op.inputs}


def _larger(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a maximum: a count of rows, with 1 for 0, is a count of rows."""
    for kind, x in zip(kinds, tensor.op.inputs[::-1]):
        floor = tf.get_static_value(x)
        if kind == COUNT and floor is not None and np.all(floor <= 1):
            return COUNT
    return _elementwise(tensor, kinds)


def _aligned(tensor: tf.Tensor, kinds: RowKinds, power: int) -> RowKind:
    """Of rows, broadcast with their own rows or with what is equal for all."""
    if tensor.shape.rank is None:
        return None
    merged: OfRows | None = None
    for x, kind in zip(tensor.op.inputs, kinds):
        if isinstance(kind, OfRows):
            mine = kind.at(kind.axis - (x.shape.rank or 0))
            merged = mine if merged is None else _merged(merged, mine)
            if merged is None:
                return None
    if merged is None:
        return None
    if any(
        not isinstance(kind, OfRows) and not _is_spread(x, merged.axis)
        for x, kind in zip(tensor.op.inputs, kinds)
    ):
        return None
    return dataclasses.replace(
        merged, axis=merged.axis + tensor.shape.rank, power=power
    )


def _merged(one: OfRows, other: OfRows) -> OfRows | None:
    if (one.axis, one.order) != (other.axis, other.order):
        return None
    return dataclasses.replace(
        one,
        per=other.per if one.per is None else one.per,
        counted=one.counted and other.counted,
        uniform=one.uniform and other.uniform,
    )


def _is_spread(x: tf.Tensor, axis: int) -> bool:
    """Whether a tensor has no axis, counted from the last, or one of size 1."""
    rank = x.shape.rank
    return rank is not None and (rank < -axis or x.shape[axis] == 1)


def rules_by_op(*entries: Any) -> dict[str, RowRule]:
    """Rules by the type of op, of (rule, types in a line, ...)."""
    return {
        name: rule
        for rule, *lines in entries
        for line in lines
        for name in line.split()
    }


RULES = rules_by_op(
    (_passed, *PASS),
    (_cast, "Cast"),
    (_recast, "Bitcast"),
    (_passed, "Neg"),
    (_added, "Add AddN AddV2 Sub"),
    (_multiplied, "Mul MulNoNan"),
    (_divided, "Div DivNoNan RealDiv"),
    (_larger, "Maximum"),
    (_selected, "Select SelectV2"),
    (
        _elementwise,
        "Abs AsString Acos Acosh Asin Asinh Atan Atan2 Atanh BesselI0e BesselI1e Betainc",
        "BitwiseAnd BitwiseOr BitwiseXor Bucketize Ceil ClipByValue Complex",
        "ComplexAbs Conj Cos Cosh Digamma Elu Equal Erf Erfc Erfinv Exp Expm1",
        "FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars Floor FloorDiv FloorMod",
        "Greater GreaterEqual Igamma Igammac Imag Invert IsFinite IsInf IsNan",
        "LeakyRelu LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd",
        "LogicalNot LogicalOr LookupTableFind LookupTableFindV2 Minimum Mod Ndtri",
        "NextAfter NotEqual Pow Real Reciprocal Relu Relu6 RightShift Rint Round",
        "Rsqrt Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square",
        "SquaredDifference StaticRegexReplace RegexReplace StringLower",
        "StringStrip StringToHashBucketFast StringToHashBucketStrong",
        "StringToNumber Tan Tanh TruncateDiv TruncateMod Xdivy Xlog1py Xlogy Zeta",
    ),
)
