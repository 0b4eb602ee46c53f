"""tower_losses: what a tower computes of its losses, for all towers' to merge."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine import boundary
from towers.foreign.tf_gradients import own_gradient
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.merge_rules import (
    AVERAGED,
    FINITE,
    SUMMED,
    UNKNOWN,
    declared,
)
from towers.keras_model.replay import Replay
from towers.keras_model.sources import Sources

_SCALAR = (SUMMED, AVERAGED, UNKNOWN, FINITE, "max", "min", "last")

# A loss, by its rule and by the place of the layer that added it.
TowerLoss = dict[tuple[str, int], tf.Tensor]


def of_tower(
    graph: LayerGraph,
    replay: Replay,
    rules: Sequence[str],
    sources: Sources,
) -> list[TowerLoss]:
    """A tower's losses, each with the rule by which those of all towers merge.

    Args:
      graph: names the layers.
      replay: what the tower computed.
      rules: what its graph says of each.
      sources: what the tower is given.
    """
    losses = []
    for loss, i, rule in zip(replay.losses, replay.adders, rules):
        rule = _declared(graph.layers[i], rule)
        if not loss.dtype.is_floating:
            loss = tf.cast(loss, keras.config.floatx())  # as Keras does
        if rule in _SCALAR:
            loss = tf.reduce_sum(loss)  # likewise
        if rule in (UNKNOWN, FINITE):
            tensors = boundary.tensors_of([sources.copies, sources.shard])
            loss = _guarded(loss, tensors)
        losses.append({(rule, i): loss})
    return losses


def _declared(layer: Any, rule: str) -> str:
    """The rule that a layer has declared, where that is not beside the point."""
    own = declared(layer)
    if own is None or rule in ("same", "none"):
        return rule
    return {"sum": SUMMED, "mean": FINITE}.get(own, own)


def _guarded(loss: tf.Tensor, leaves: Sequence[tf.Tensor]) -> tf.Tensor:
    """A loss whose gradient says nothing where it is no number.

    It is taken by itself: among other gradients, NaN could not be taken out.
    """
    tensors = list({x.name: x for x in leaves if x.dtype.is_floating}.values())

    @own_gradient
    def run(*_: tf.Tensor) -> Any:
        def backward(upstream: tf.Tensor) -> list[Any]:
            gradients = boundary.differentiated([loss], tensors, [upstream])
            return [None if x is None else _finite(x) for x in gradients]

        return tf.identity(loss), backward

    return run(*tensors)


def _finite(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            _finite(gradient.values), gradient.indices, gradient.dense_shape
        )
    zeros = tf.zeros_like(gradient)
    return tf.where(tf.math.is_finite(gradient), gradient, zeros)
