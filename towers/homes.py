"""homes: where each variable of a model lives for the graph that is built.

Where it is; or in a graph of tf.compat.v1 its twin there; or what a
`keras.StatelessScope` of the caller's has in its place.
"""

import dataclasses

import tensorflow as tf

from towers import v1_graph
from towers.foreign import keras_layers
from towers.keras_model import checks, layer_graph
from towers.keras_model.given import Given
from towers.keras_model.parameters import Home
from towers.placement.placement import Placement


def homes_of(
    graph: layer_graph.LayerGraph, placement: Placement
) -> tuple[list[Home], list[tf.Tensor]]:
    """Where each variable lives, and the weight regularisers.

    Args:
      graph: names the variables.
      placement: says where twins live.
    """
    is_given = keras_layers.scope_here() is not None
    if checks.in_v1_graph():
        homes, penalties = v1_graph.enter(graph, placement)
        if not is_given:
            return homes, penalties
    else:
        homes = [
            Home(keras_layers.raw(v), keras_layers.device_of(v), v)
            for v in graph.variables
        ]
    if is_given:  # which hears of what would be assigned, too
        given = Given()
        homes = [
            dataclasses.replace(home, owner=v, given=given.of(v))
            for v, home in zip(graph.variables, homes)
        ]
    terms = [graph.regularization_loss(i, homes[i]) for i in graph.trainable]
    return homes, [term for term in terms if term is not None]
