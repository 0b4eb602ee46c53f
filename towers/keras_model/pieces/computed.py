"""computed: a layer computed in pieces, each by Keras's own `call`, on its device.

A piece is a copy of the layer that has fewer units, filters or heads, and tensors in the
place of its weights.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_cut
from towers.foreign.keras_cut import BIAS
from towers.keras_model.brought import brought
from towers.keras_model.notes import Notes
from towers.keras_model.pieces import assembled, dropout
from towers.keras_model.pieces.activations import is_by_element, is_known
from towers.keras_model.pieces.heads import by_heads
from towers.keras_model.pieces.lookup import looked_up
from towers.keras_model.pieces.piece_scopes import on_piece
from towers.keras_model.pieces.rules import (
    CONVOLUTIONS,
    TRANSPOSED,
    Rule,
    refusal,
    rule_of,
)
from towers.placement.pieces import COLUMN_WISE, Pieces


def call_in_pieces(
    graph: Any, layer: Any, original: Callable[..., Any]
) -> Callable[..., Any]:
    """A layer's call, in pieces if it is cut, or if what it is given is in parts.

    Args:
      graph: a `LayerGraph`.
      layer: one of its, or an operation.
      original: its call.
    """

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        notes = Notes.of(graph)
        if notes is None:
            return original(*args, **kwargs)
        pin = graph.cuts.of(layer, notes.tower)
        if pin is not None:
            return _cut(layer, pin, notes, args, kwargs)
        parts = assembled.known_parts(args[0]) if args else None
        if parts is None:
            return original(*args, **kwargs)
        if dropout.drops(layer, kwargs.get("training", notes.training)):
            left = dropout.of_pieces(layer, parts.sizes)
        elif is_by_element(layer):

            def left(part: tf.Tensor, *_: Any) -> tf.Tensor:
                return original(part, *args[1:], **kwargs)
        else:
            return original(*args, **kwargs)
        results = []
        for j, part in enumerate(parts.tensors):
            with tf.device(part.device), tf.name_scope(f"piece_{j}"):
                results.append(left(part, parts.axis, j))
        return assembled.side_by_side(results, parts.axis, parts.sizes)

    return call


def _cut(
    layer: Any,
    pin: Pieces,
    notes: Notes,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What a layer that is cut returns."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return by_heads(layer, pin, notes, args, kwargs)
    rest = {**kwargs}
    x, *args = args or [rest.pop("inputs")]
    if not isinstance(x, tf.Tensor):
        kind = type(x).__name__
        raise refusal(notes.path, pin, f"is given a {kind}, which is not dense")
    if isinstance(layer, keras.layers.Embedding):
        return looked_up(layer, pin, notes, x)
    rule = rule_of(layer, pin.by)
    if rule is None:  # whose equation is another now
        raise refusal(notes.path, pin, "has no axis that is cut so")
    by = _columns if pin.by == COLUMN_WISE else _rows
    return by(layer, rule, pin, notes, x, (args, rest))


def _columns(
    layer: Any, rule: Rule, pin: Pieces, notes: Notes, x: Any, rest: Any
) -> tf.Tensor:
    kernel, bias = vars(layer)[rule.kernel], getattr(layer, BIAS, None)
    is_cut = bias is not None and rule.bias_axis is not None
    activation = getattr(layer, "activation", None)
    changes = {} if is_known(activation) else {"activation": None}
    results = []
    for j, size in enumerate(kernel.sizes):
        with on_piece(pin, j, notes):
            weights = {rule.kernel: kernel.pieces[j].value}
            if bias is not None:
                weights[BIAS] = (bias.pieces[j] if is_cut else bias).value
            count = {} if rule.count is None else {rule.count: size}
            piece = keras_cut.changed(layer, {**changes, **count, **weights})
            results.append(computed(piece, x, rest))
    outputs = assembled.side_by_side(results, rule.axis, kernel.sizes)
    return outputs if is_known(activation) else activation(outputs)


def _rows(
    layer: Any, rule: Rule, pin: Pieces, notes: Notes, x: Any, rest: Any
) -> tf.Tensor:
    kernel, bias = vars(layer)[rule.kernel], getattr(layer, BIAS, None)
    activation = getattr(layer, "activation", None)
    bare = {"activation": None, BIAS: None, "use_bias": False}
    bare = {name: value for name, value in bare.items() if name in vars(layer)}
    each = assembled.pieces_of(x, rule.axis, kernel.sizes)
    results = []
    for j, part in enumerate(each):
        with on_piece(pin, j, notes):
            weights = {rule.kernel: kernel.pieces[j].value}
            piece = keras_cut.changed(layer, {**bare, **weights})
            results.append(computed(piece, part, rest))
    outputs = tf.add_n(results)
    if bias is not None:
        outputs += _bias_of(layer, bias.value)
    return outputs if activation is None else activation(outputs)


def computed(piece: Any, x: tf.Tensor, rest: Any) -> Any:
    """What Keras's own `call` makes of what is brought to the piece."""
    args, kwargs = rest
    return type(piece).call(piece, brought(x), *args, **kwargs)


def _bias_of(layer: Any, bias: tf.Tensor) -> tf.Tensor:
    """A bias, as it is added to all outputs of a layer."""
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return bias
    ones = (1,) * layer.rank
    if layer.data_format == "channels_last":
        return tf.reshape(bias, (1, *ones, layer.filters))
    return tf.reshape(bias, (1, layer.filters, *ones))
