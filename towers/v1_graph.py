"""v1_graph: a Keras model's variables in a graph of tf.compat.v1.

A Keras 3 model is eager, and a graph that runs in a Session cannot read its
variables. So the graph gets variables of its own, with the same values, once
however many towers are built in it, and values are copied to and fro.
"""

import dataclasses
import re
from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers
from towers.keras_model import checks, layer_graph
from towers.keras_model.homes import Home, homes_in_scope
from towers.keras_model.parameters import parameter_devices
from towers.placement.placement import Placement

# No string: those are written to the MetaGraph, where this has no place.
_KEY = ("towers", "variables")


@dataclasses.dataclass(frozen=True)
class _Twin:
    """A Keras variable's stand-in in one graph.

    Attributes:
      original: the Keras variable, kept alive so that its id stays its own.
      home: the graph's variable and its device.
      penalty: its regulariser's scalar, or None.
    """

    original: Any
    home: Home
    penalty: tf.Tensor | None


def enter(
    graph: layer_graph.LayerGraph, placement: Placement
) -> tuple[list[Home], list[tf.Tensor]]:
    """The model's variables and weight regularisers in the current v1 graph.

    What does not exist yet is made: resource variables on the parameter
    device, in GLOBAL_VARIABLES and TRAINABLE_VARIABLES, that start at the
    model's values; regularisers in REGULARIZATION_LOSSES.

    Args:
      graph: names the variables.
      placement: says where they live.

    Returns:
      One `Home` per variable, and the regularisers' scalars.

    Raises:
      RuntimeError: eager execution is switched off altogether.
    """
    devices = parameter_devices(graph, placement)
    with tf.init_scope(), tf.name_scope(""):  # out of functions and loops
        twins = tf.compat.v1.get_collection_ref(_KEY)
        by_id = {id(twin.original): twin for twin in twins}
        missing = [
            i for i, v in enumerate(graph.variables) if id(v) not in by_id
        ]
        originals = [keras_layers.raw(graph.variables[i]) for i in missing]
        values = checks.eagerly(lambda: [v.numpy() for v in originals])
        for i, value in zip(missing, values):
            twin = _twin(graph, i, value, devices[i])
            by_id[id(twin.original)] = twin
            twins.append(twin)
    homes = [by_id[id(v)].home for v in graph.variables]
    if keras_layers.scope_here() is not None:
        return homes_in_scope(graph, homes)
    penalties = [by_id[id(graph.variables[i])].penalty for i in graph.trainable]
    return homes, [penalty for penalty in penalties if penalty is not None]


def _twin(
    graph: layer_graph.LayerGraph, i: int, value: Any, device: str
) -> _Twin:
    original, penalty = graph.variables[i], None
    name = re.sub(r"[^\w./-]", "_", original.path).lstrip("_/-") or "variable"
    with tf.device(device):
        variable = tf.compat.v1.Variable(
            value,
            trainable=i in graph.trainable,
            name=name,
            use_resource=True,
        )
    home = Home(variable, device, owner=variable)
    if i in graph.trainable:
        penalty = graph.regularization_loss(i, home)
    if penalty is not None:
        tf.compat.v1.add_to_collection(
            tf.compat.v1.GraphKeys.REGULARIZATION_LOSSES, penalty
        )
    return _Twin(original, home, penalty)


def settled(graph: layer_graph.LayerGraph, built: Any) -> Any:
    """A `TowerGraph` whose updates a Session program finds and runs.

    They go to UPDATE_OPS. Seeds move on whenever the outputs are computed: a
    program without batch norm has never run UPDATE_OPS for its dropout.

    Args:
      graph: names the variables.
      built: the towers of a v1 graph.
    """
    if keras_layers.scope_here() is not None:
        return built  # it hears of what would be assigned
    if tf.compat.v1.get_default_graph().building_function:
        return built  # what is made here can run only here
    seeds = {id(built.variables[i][1]) for i in graph.seeds}
    moves = []
    for op, (variable, _) in zip(built.apply_updates(), built.updates):
        tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, op)
        if id(variable) in seeds:
            moves.append(op)
    if not moves:
        return built

    def moved(output: tf.Tensor | None) -> tf.Tensor | None:
        if output is None:
            return None
        with tf.device(output.device), tf.control_dependencies(moves):
            return tf.identity(output)

    notes = keras_layers.get_notes(built.outputs)
    outputs = tf.nest.map_structure(moved, built.outputs)
    keras_layers.set_notes(outputs, tf.nest.map_structure(moved, notes))
    return dataclasses.replace(built, outputs=outputs)
