"""row_reductions: what sums, means, layers of networks and draws make of rows.

Another part of the table of `row_ops`.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from towers.engine.row_kinds import (
    COUNT,
    SAME,
    SEGMENTS,
    OfRows,
    RowKind,
    RowKinds,
    Total,
    Vector,
    agreed,
    together,
    vector,
)
from towers.engine.row_ops import rules_by_op, static


def _axes(tensor: tf.Tensor) -> set[int] | None:
    """The axes that an op reduces, or looks along."""
    axes = static(tensor.op.inputs[1])
    rank = tensor.op.inputs[0].shape.rank
    if axes is None or rank is None:
        return None
    return {int(axis) % max(rank, 1) for axis in np.ravel(axes)}


def _without(kind: OfRows, axes: set[int], keeps: bool) -> OfRows:
    before = 0 if keeps else sum(axis < kind.axis for axis in axes)
    return kind.at(kind.axis - before)


def _keeps(tensor: tf.Tensor) -> bool:
    try:
        return bool(tensor.op.get_attr("keep_dims"))
    except ValueError:
        return False


def _summed(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, axes = kinds[0], _axes(tensor)
    if not isinstance(kind, OfRows):
        return agreed([kind])
    if axes is None:
        return None
    if kind.axis not in axes:
        return _without(kind, axes, _keeps(tensor))
    if kind.uniform and kind.counted:
        return Total(False, kind.power + 1)
    return Total(True, kind.power)


def _averaged(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """As a sum, which over rows is divided by how many there are."""
    kind, total = kinds[0], _summed(tensor, kinds)
    if not isinstance(kind, OfRows) or not isinstance(total, Total):
        return total
    if not kind.counted:
        return None
    return dataclasses.replace(total, power=total.power - 1)


def _reduced(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a reduction that is no sum, as a maximum: within each row only."""
    kind, axes = kinds[0], _axes(tensor)
    if not isinstance(kind, OfRows) or axes is None or kind.power:
        return None
    return None if kind.axis in axes else _without(kind, axes, _keeps(tensor))


def _multiplied_up(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    if not isinstance(kinds[0], Vector):
        return _reduced(tensor, kinds)
    powers = [kind.power for kind in kinds[0].of]
    if any(kind.summed for kind in kinds[0].of):
        return None
    return Total(False, sum(powers))


def _along(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of each row by itself, along other axes."""
    kind, axes = kinds[0], _axes(tensor)
    if not isinstance(kind, OfRows):
        linear = tensor.op.type in ("Cumsum", "ReverseV2")
        return agreed([kind]) if linear else None
    if axes is None or kind.axis in axes:
        return None
    return kind if kind.power == 0 and set(kinds[1:]) <= {SAME} else None


def _along_last(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of each row by itself, along the last axis."""
    kind, rank = kinds[0], tensor.op.inputs[0].shape.rank
    if not isinstance(kind, OfRows) or not rank or kind.axis == rank - 1:
        return None
    return kind if kind.power == 0 and set(kinds[1:]) <= {SAME} else None


def _biased(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    if isinstance(kinds[0], OfRows):
        return _along_last(tensor, kinds)
    return agreed(kinds)


def _first_axis(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of an op that takes each entry of the first axis alone, as Conv2D."""
    rows = [kind for kind in kinds if isinstance(kind, OfRows)]
    others = [kind for kind in kinds if not isinstance(kind, OfRows)]
    one = together(rows)
    # A shape among the others tells that of the result.
    if one is None or not all(_is_shape(kind) for kind in others):
        return None
    fits = one.axis == 0 and one.power == 0 and one.counted
    return dataclasses.replace(one, uniform=False) if fits else None


def _blocked(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of SpaceToBatchND and back, as Keras dilates: blocks of a row as rows."""
    kind = kinds[0]
    if not isinstance(kind, OfRows) or kind.axis or set(kinds[1:]) != {SAME}:
        return None
    if tensor.op.type == "SpaceToBatchND":
        if kind.order:
            return None
        order = f"in blocks of {kind.per}"
        return dataclasses.replace(kind, per=None, uniform=False, order=order)
    if not kind.order.startswith("in blocks of "):
        return None
    per = kind.order.split()[-1]
    return dataclasses.replace(
        kind, per=int(per) if per != "None" else None, order=""
    )


def _is_shape(kind: RowKind) -> bool:
    return kind == SAME or (isinstance(kind, Vector) and kind.of[0] == COUNT)


def _normalized(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    trains = tensor.op.get_attr("is_training")
    return None if trains else _first_axis(tensor, kinds)


def _half_squared(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[0]
    rows = isinstance(kind, OfRows) and kind.power == 0
    return Total(True, 0) if rows else None


def _scattered(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a scatter of rows, each added at an index of its own: a sum."""
    if SEGMENTS in kinds:
        return _by_segments(tensor, kinds)
    data = [kind for kind in kinds if isinstance(kind, OfRows)]
    others = [kind for kind in kinds if not isinstance(kind, OfRows)]
    places = {(kind.axis, kind.power, kind.order) for kind in data}
    if len(places) != 1 or set(others) - {SAME}:
        return None
    axis, power, _ = places.pop()
    # Of what says where, each entry is one, or each row of a matrix.
    index = tensor.op.inputs[0 if tensor.op.type == "ScatterNd" else 1]
    inside = (index.shape.rank or 0) - (tensor.op.type == "ScatterNd")
    return Total(True, 0) if power == 0 and axis < inside else None


def _by_segments(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a sum over segments: a ragged row's values become one of a row."""
    kind, places, rows = kinds
    if (
        places != SEGMENTS
        or rows != COUNT
        or tensor.op.inputs[1].shape.rank != 1
    ):
        return None
    if not isinstance(kind, OfRows) or kind.power:
        return None
    values = (kind.axis, kind.per, kind.counted, kind.order)
    return OfRows(0) if values == (0, None, False, "") else None


def _binned(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind, rank = kinds[0], tensor.op.inputs[0].shape.rank
    binary = tensor.op.type == "DenseBincount" and tensor.op.get_attr(
        "binary_output"
    )
    if not isinstance(kind, OfRows) or rank is None or kind.axis:
        return None
    if rank == 2:
        return OfRows(0, kind.per)
    weighs = kinds[2] == SAME or isinstance(kinds[2], OfRows)
    return Total(True, 0) if weighs and not binary else None


def _drawn(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = _filled(tensor, kinds)
    if not isinstance(kind, OfRows):
        return None
    return dataclasses.replace(kind, uniform=False)


def _filled(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    """Of a fill of a shape: the axis of rows is where their number stands."""
    if not isinstance(kinds[0], Vector) or set(kinds[1:]) - {SAME}:
        return None
    return _axis_of(kinds[0])


def _axis_of(shape: Vector) -> RowKind:
    axes = [i for i, kind in enumerate(shape.of) if kind != SAME]
    if len(axes) != 1 or shape.of[axes[0]] != Total(
        power=1, exact=shape.of[axes[0]].exact
    ):
        return None
    per = 1 if shape.of[axes[0]].exact else None
    return OfRows(axes[0], per, uniform=True)


def _like(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[0]
    if isinstance(kind, OfRows):
        return dataclasses.replace(kind, power=0, uniform=True)
    return SAME


def _shape(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[tensor.value_index]
    rank = tensor.op.inputs[tensor.value_index].shape.rank
    if not isinstance(kind, OfRows):
        return SAME
    if rank is None or not kind.counted:
        return None
    count = COUNT if kind.per == 1 else Total(power=1)
    return vector(count if i == kind.axis else SAME for i in range(rank))


def _size(tensor: tf.Tensor, kinds: RowKinds) -> RowKind:
    kind = kinds[0]
    if not isinstance(kind, OfRows):
        return SAME
    one = kind.per == 1 and tensor.op.inputs[0].shape.rank == 1
    return Total(power=1, exact=one) if kind.counted else None


RULES = rules_by_op(
    (_summed, "Sum"),
    (_averaged, "Mean"),
    (_reduced, "All Any ArgMax ArgMin EuclideanNorm Max Min"),
    (_multiplied_up, "Prod"),
    (_along, "Cumprod Cumsum CumulativeLogsumexp ReverseV2"),
    (_along_last, "LogSoftmax Softmax TopKV2"),
    (_biased, "BiasAdd"),
    (
        _first_axis,
        "AvgPool AvgPool3D Conv Conv2D Conv2DBackpropInput Conv3D",
        "Conv3DBackpropInputV2 DepthToSpace DepthwiseConv2dNative Dilation2D",
        "ExtractImagePatches ImageProjectiveTransformV2",
        "ImageProjectiveTransformV3 LRN MaxPool MaxPool3D ResizeBicubic ResizeBilinear",
        "ResizeNearestNeighbor SoftmaxCrossEntropyWithLogits SpaceToDepth",
        "SparseSoftmaxCrossEntropyWithLogits MatrixInverse Cholesky",
        "InTopKV2 MatrixDeterminant MatrixTriangularSolve AdjustContrastv2 RGBToHSV",
    ),
    (_blocked, "BatchToSpaceND SpaceToBatchND"),
    (_normalized, "FusedBatchNormV3"),
    (_half_squared, "L2Loss"),
    (_scattered, "ScatterNd UnsortedSegmentSum"),
    (_by_segments, "UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentProd"),
    (_binned, "Bincount DenseBincount"),
    (
        _drawn,
        "RandomStandardNormal RandomUniform RandomUniformInt StatelessRandomNormal",
        "StatelessRandomNormalV2 StatelessRandomUniform StatelessRandomUniformV2",
        "StatelessRandomUniformFullInt StatelessRandomUniformFullIntV2",
        "StatelessRandomUniformInt StatelessRandomUniformIntV2",
        "StatelessTruncatedNormal StatelessTruncatedNormalV2 TruncatedNormal",
    ),
    (_filled, "Fill"),
    (_like, "OnesLike ZerosLike"),
    (_shape, "Shape ShapeN"),
    (_size, "Size"),
    (lambda *_: SAME, "Rank"),
)
