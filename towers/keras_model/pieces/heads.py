"""heads: attention in pieces, each with some of the heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import keras_cut, keras_layers
from towers.foreign.keras_cut import BIAS, changed
from towers.foreign.keras_masks import forget_masks
from towers.keras_model.brought import brought
from towers.keras_model.notes import Notes
from towers.keras_model.pieces import dropout
from towers.keras_model.pieces.piece_scopes import on_piece
from towers.placement.pieces import Pieces


def by_heads(
    layer: Any,
    pin: Pieces,
    notes: Notes,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What `MultiHeadAttention.call` returns; outputs of all heads are added.

    Args:
      layer: it, whose weights are in pieces.
      pin: where they are for this tower.
      notes: of the tower.
      args, kwargs: of the call.
    """
    arguments, results = [*args], []
    first = vars(layer)[keras_cut.projections(layer)[0]]
    sizes = _kernel(first).sizes
    axis = -2 * len(layer.attention_axes) - 1  # of heads, among scores
    drops = vars(layer)[keras_cut.SCORES_DROPOUT]
    left = None
    if dropout.drops(drops, kwargs.get("training", notes.training)):
        left = dropout.of_pieces(drops, sizes)
    for j, heads in enumerate(sizes):
        with on_piece(pin, j, notes):
            piece = changed(layer, _of_piece(layer, j, heads))
            if left is not None:
                vars(piece)[keras_cut.SCORES_DROPOUT] = (
                    lambda scores, training, j=j: left(scores, axis, j)
                )
            here = brought((arguments, dict(kwargs)))
            results.append(type(layer).call(piece, *here[0], **here[1]))
    forget_masks((arguments, dict(kwargs)), here)
    if not isinstance(results[0], tuple):
        return _added(results)
    outputs, scores = zip(*results)
    return _added(outputs), tf.concat(scores, axis)


def _of_piece(layer: Any, j: int, heads: int) -> dict[str, Any]:
    """What a piece has in the place of a layer's attributes."""
    attributes: dict[str, Any] = {keras_cut.HEADS: heads}
    for name in keras_cut.projections(layer):
        inner = vars(layer)[name]
        bias = inner.bias
        weights = {
            keras_cut.kernel_of(inner): _kernel(inner).pieces[j].value,
            BIAS: None if bias is None else bias.pieces[j].value,
        }
        attributes[name] = changed(inner, weights)
    outer = vars(layer)[keras_cut.OUTPUT]
    is_first = j == 0 and outer.bias is not None  # which is added once
    attributes[keras_cut.OUTPUT] = changed(
        outer,
        {
            keras_cut.kernel_of(outer): _kernel(outer).pieces[j].value,
            BIAS: outer.bias.value if is_first else None,
        },
    )
    return attributes


def _kernel(layer: Any) -> Any:
    return vars(layer)[keras_cut.kernel_of(layer)]


def _added(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    total = tf.add_n(parts)
    keras_layers.set_mask(total, keras_layers.get_mask(parts[0]))
    return total
