"""mixed_rows: what a layer makes of all rows, of which a tower has its own.

A mean over the batch, or a product that sums over it, is one of the tower's rows
there; so are the number of rows, and the first of them. No shape shows it and
nothing fails: the numbers are others than the plain model's.
"""

from collections.abc import Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.row_kinds import SAME, OfRows, Total
from towers.engine.row_ops import static
from towers.engine.row_sums import Judge
from towers.foreign.keras_layers import is_keras_own
from towers.foreign.tf_ancestry import ancestors
from towers.keras_model import pins, widths

# What reduces the axes that its second input names.
_REDUCES = frozenset({"Max", "Mean", "Min", "Prod", "Sum"})
# What runs along an axis: its last input, or the last one.
_ALONG = frozenset({"Cumprod", "Cumsum", "ReverseV2", "Roll"})
_ALONG_LAST = frozenset({"LogSoftmax", "Softmax", "TopKV2"})
_PRODUCTS = frozenset({"BatchMatMulV2", "Einsum", "MatMul"})
_PARTS = frozenset({"Slice", "StridedSlice"})
# What asks a tensor for its shape only.
_SHAPES = frozenset({"OnesLike", "Shape", "ShapeN", "Size", "ZerosLike"})
MIXES = (
    _REDUCES | _ALONG | _ALONG_LAST | _PRODUCTS | _PARTS | {"Cast", "GatherV2"}
)


def warn_of(
    graph: Any,
    judge: Judge,
    outputs: Sequence[tf.Tensor],
    stops: Collection[tf.Tensor],
) -> None:
    """Warns once of each layer whose outputs a tower makes of its rows together.

    Of Keras's own layers none does but batch norms, whose moments are among `stops`.

    Args:
      graph: the `LayerGraph` of the model.
      judge: of the tower.
      outputs: those of the tower that are joined by rows.
      stops: what is not to be looked behind.
    """
    layers = dict(pins.layer_paths(graph.models))
    names: set[str] = set()
    for output in outputs:
        each = {x.op.name: x.op for x in ancestors(output, stops=stops)}
        for op in each.values():
            if op.type not in MIXES or op.name in names:
                continue
            names.add(op.name)
            path = widths.layer_at(layers, op)
            if not _may_mix(layers.get(path)) or not _mixes(op, judge, each):
                continue
            if op.type != "Cast" or not _is_by_row(judge.kind(output)):
                _warn(graph, path, op)


def _may_mix(layer: Any) -> bool:
    """Of what is in no layer, and of what calls a user's function, too."""
    around = (keras.Model, keras.layers.Lambda)
    return not is_keras_own(layer) or isinstance(layer, around)


def _mixes(op: tf.Operation, judge: Judge, among: Collection[str]) -> bool:
    """Whether what an op makes of a row is known to depend on others.

    Of floats: what is counted in whole numbers are lengths and places, until it
    becomes a float.

    Args:
      op: of one of the types above.
      judge: of the tower.
      among: names of the ops that outputs are made by.
    """
    result = op.outputs[0]
    if not result.dtype.is_floating:
        return False
    if op.type == "Cast":
        return _counts(op, judge, among)
    if op.type in _PRODUCTS:
        return (
            _is_total(judge.kind(result))
            or op.type == "MatMul"
            and all(isinstance(judge.kind(x), OfRows) for x in op.inputs)
        )
    kind, rank = judge.kind(op.inputs[0]), op.inputs[0].shape.rank
    if not isinstance(kind, OfRows) or kind.uniform or rank is None:
        return False
    if op.type in _PARTS:
        cuts = kind.counted and _cuts(op, judge)
        return cuts and not _is_spared(op, kind.axis, among)
    if op.type == "GatherV2" and not _are_places(op, judge):
        return False
    return kind.axis % rank in _axes(op, rank)


def _is_by_row(kind: Any) -> bool:
    """Whether it is known that no number of rows is left in it."""
    return isinstance(kind, OfRows) and kind.power == 0


def _is_total(kind: Any) -> bool:
    return isinstance(kind, Total) and kind.summed


def _counts(op: tf.Operation, judge: Judge, among: Collection[str]) -> bool:
    """Whether an op has a number of rows, which something else is made of.

    That is not the case where it is divided by another one.
    """
    numbers = [x for x in op.outputs if _is_number(judge.kind(x))]
    return any(
        not isinstance(judge.kind(user.outputs[0]), Total)
        or _counts(user, judge, among)
        for x in numbers
        if x.dtype.is_floating
        for user in x.consumers()
        if user.name in among
    )


def _is_number(kind: Any) -> bool:
    """Whether it is of how many rows there are, or what they add up to."""
    return isinstance(kind, Total) and (kind.summed or kind.power != 0)


def _cuts(op: tf.Operation, judge: Judge) -> bool:
    """Whether an op takes some of the rows, by numbers that are all towers' alike.

    Those of one of a batch's views are told by how many rows there are. Of
    `tf.slice` less is known where the numbers are no constants.
    """
    if judge.kind(op.outputs[0]) is not None:
        return False
    if op.type == "Slice":
        return None not in map(static, op.inputs[1:])
    return all(judge.kind(x) == SAME for x in op.inputs[1:])


def _is_spared(op: tf.Operation, axis: int, among: Collection[str]) -> bool:
    """Whether a part of an axis meets the others again, or only has a shape."""
    ahead, seen = [op], {op.name}
    users = [x for x in op.outputs[0].consumers() if x.name in among]
    if users and all(x.type in _SHAPES for x in users):
        return True
    while ahead:
        one = ahead.pop()
        rank = one.outputs[0].shape.rank
        if one.type == "ConcatV2" and rank and axis in _axes(one, rank):
            return True
        users = [x for y in one.outputs for x in y.consumers()]
        ahead += [x for x in users if x.name in among and x.name not in seen]
        seen.update(x.name for x in users)
    return False


def _are_places(op: tf.Operation, judge: Judge) -> bool:
    """Whether the indices of a gather are places, and no row's own."""
    index = op.inputs[1]
    if op.get_attr("batch_dims"):
        return False
    # A number alone may be that of each row in turn, in `tf.vectorized_map`.
    several = index.shape.rank and index.shape.is_fully_defined()
    return bool(several) or judge.kind(index) == SAME


def _axes(op: tf.Operation, rank: int) -> list[int]:
    """Those that an op reduces, or runs along; none if that is not known."""
    if op.type in _ALONG_LAST:
        return [rank - 1]
    axes = static(op.inputs[-1])
    return [] if axes is None else [axis % rank for axis in axes.ravel()]


def _warn(graph: Any, path: str, op: tf.Operation) -> None:
    widths.warn_once(
        graph,
        path,
        f"{widths.path_or_model(graph, path)!r} makes its outputs of all rows that it is "
        f"given, by {op.type} {op.name!r}. In a tower those are the tower's, so that "
        "the numbers are others than the plain model's. Ask all towers, as in "
        "towers.all_towers(f, x) in a layer with `needs_all_towers = True`; or, if "
        "a tower's rows are what you mean, leave it.",
    )
