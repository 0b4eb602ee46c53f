"""homes: where the variables of a model live for a graph, and what is read there."""

import dataclasses
from typing import Any

import tensorflow as tf

from towers.foreign.keras_layers import device_of, raw, scope_here
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.scope_values import ScopeValues


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a model's variable lives for a graph.

    Attributes:
      variable: what the graph reads.
      device: what works on it.
      owner: what is assigned to; the Keras variable if the graph shares it.
      stand_in: what a `keras.StatelessScope` has in the variable's place.
    """

    variable: tf.Variable
    device: str
    owner: Any
    stand_in: tf.Tensor | None = None

    def read(self) -> tf.Tensor:
        """The variable's value, in this graph, on the device that is open."""
        if self.stand_in is None:
            return self.variable.read_value()
        return tf.identity(tf.cast(self.stand_in, self.variable.dtype))


def homes_of(
    graph: LayerGraph,
) -> tuple[list[Home], list[tf.Tensor]]:
    """Where each variable lives, which is where it is, and weight regularisers."""
    homes = [Home(raw(v), device_of(v), v) for v in graph.variables]
    return homes_in_scope(graph, homes)


def homes_in_scope(
    graph: LayerGraph, homes: list[Home]
) -> tuple[list[Home], list[tf.Tensor]]:
    """Homes, with what a `keras.StatelessScope` of the caller's has for variables.

    It hears of what would be assigned, too.

    Args:
      graph: names the variables.
      homes: where they live.

    Returns:
      The homes, and the weight regularisers of what is read there.
    """
    if scope_here() is not None:
        scope = ScopeValues()
        homes = [
            dataclasses.replace(home, owner=v, stand_in=scope.of(v))
            for v, home in zip(graph.variables, homes)
        ]
    terms = [graph.regularization_loss(i, homes[i]) for i in graph.trainable]
    return homes, [term for term in terms if term is not None]
