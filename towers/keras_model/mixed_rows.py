"""mixed_rows: what a layer makes of all rows, of which a tower has its own.

A mean over the batch, a product that sums over it, or its number of rows, is one of
the tower's rows there. No shape shows it and nothing fails: the numbers are others than the plain
model's.
"""

from collections.abc import Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.row_kinds import OfRows, Total
from towers.engine.row_ops import static
from towers.engine.row_sums import Judge
from towers.foreign.keras_layers import is_keras_own
from towers.foreign.tf_ancestry import ancestors
from towers.keras_model import pins, widths

# What reduces the axes that its second input names.
_REDUCES = frozenset({"Max", "Mean", "Min", "Prod", "Sum"})
# What runs along an axis: its second input, or the last one.
_ALONG = frozenset({"Cumprod", "Cumsum", "LogSoftmax", "Softmax"})
_PRODUCTS = frozenset({"BatchMatMulV2", "Einsum", "MatMul"})
# What may multiply or divide by the number of rows.
_SCALES = frozenset({"Div", "DivNoNan", "Mul", "MulNoNan", "RealDiv"})
MIXES = _REDUCES | _ALONG | _PRODUCTS | _SCALES


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
        for tensor in ancestors(output, stops=stops):
            op = tensor.op
            if op.type not in MIXES or op.name in names:
                continue
            names.add(op.name)
            path = widths.layer_at(layers, op)
            if not _may_mix(layers.get(path)) or not _mixes(op, judge):
                continue
            if op.type not in _SCALES or not _is_by_row(judge.kind(output)):
                _warn(graph, path, op)


def _may_mix(layer: Any) -> bool:
    """Of what is in no layer, and of what calls a user's function, too."""
    around = (keras.Model, keras.layers.Lambda)
    return not is_keras_own(layer) or isinstance(layer, around)


def _mixes(op: tf.Operation, judge: Judge) -> bool:
    """Whether what an op makes of a row is known to depend on others.

    Of floats: what is counted in whole numbers are lengths and places.
    """
    result = op.outputs[0]
    if not result.dtype.is_floating:
        return False
    if op.type in _SCALES:
        return _power(judge.kind(result)) != 0 and not any(
            _power(judge.kind(x)) for x in op.inputs
        )
    if op.type in _PRODUCTS:
        return (
            _is_total(judge.kind(result))
            or op.type == "MatMul"
            and all(isinstance(judge.kind(x), OfRows) for x in op.inputs)
        )
    kind, rank = judge.kind(op.inputs[0]), op.inputs[0].shape.rank
    if not isinstance(kind, OfRows) or kind.uniform or rank is None:
        return False
    return kind.axis % rank in _axes(op, rank)


def _power(kind: Any) -> int:
    """That of the number of rows by which rows are multiplied, if it is known."""
    return kind.power if isinstance(kind, OfRows) else 0


def _is_by_row(kind: Any) -> bool:
    return isinstance(kind, OfRows) and kind.power == 0


def _is_total(kind: Any) -> bool:
    return isinstance(kind, Total) and kind.summed


def _axes(op: tf.Operation, rank: int) -> list[int]:
    """Those that an op reduces, or runs along; none if that is not known."""
    if len(op.inputs) == 1:
        return [rank - 1]
    axes = static(op.inputs[1])
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
