"""halves: weights and inputs that cross in the half dtype in which towers take them.

Under mixed precision Keras casts a weight where a layer reads it. If all of a tower
that reads it is one such cast, it can be cast where it lives: the tower computes
the same, and so does its gradient. Likewise an input, that nothing takes but casts.
Whether it is so, is seen in a call of the model before anything crosses, in a graph
that is never run; a tower which reads otherwise is not built (`Misread`), and all
crosses as it is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers
from towers.keras_model import guards, hooks
from towers.keras_model.findings import Findings
from towers.keras_model.homes import Home
from towers.keras_model.kinds import Kind
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.reads import is_wide
from towers.keras_model.rehearsal import Rehearsal
from towers.placement.device_names import same_device
from towers.verbs.split import Shards


@dataclasses.dataclass(frozen=True)
class Halves:
    """The half dtypes of what is cast before it crosses.

    Attributes:
      weights: by place in the model's variables.
      inputs: by place among the flat inputs.
    """

    weights: Mapping[int, tf.DType] = dataclasses.field(default_factory=dict)
    inputs: Mapping[int, tf.DType] = dataclasses.field(default_factory=dict)


_FINDINGS: Findings[Halves] = Findings()


def halves_of(
    rehearsal: Rehearsal, homes: Sequence[Home], shards: Shards
) -> Halves:
    """What crosses in half.

    Args:
      rehearsal: of the first tower's call.
      homes: where the model's variables live.
      shards: what towers are given.
    """
    graph, request = rehearsal.graph, rehearsal.request
    devices = request.placement.devices
    weights = _crossing(graph, homes, devices)
    inputs = shards.crossing(devices, is_wide)
    if not weights and not inputs:
        return Halves()
    policies = tuple(x.dtype_policy.name for x in graph.layers)
    halves = _FINDINGS.of(
        graph,
        request,
        (policies, str(rehearsal.specs())),
        lambda: read_once(rehearsal),
    )
    return Halves(
        {k: dtype for k, dtype in halves.weights.items() if k in weights},
        {k: dtype for k, dtype in halves.inputs.items() if k in inputs},
    )


def _crossing(
    graph: LayerGraph, homes: Sequence[Home], devices: Sequence[str]
) -> set[int]:
    """The places of weights of float32 that a tower has elsewhere."""
    places = set()
    for i, device in enumerate(devices):
        elsewhere = graph.elsewhere(i, device)
        places |= {
            k
            for k, home in enumerate(homes)
            if graph.kinds[k] in (Kind.TRAINED, Kind.OWN)
            and keras_layers.raw(graph.variables[k]).dtype == tf.float32
            and not same_device(home.device, elsewhere.get(k, device))
        }
    return places


def read_once(rehearsal: Rehearsal) -> Halves:
    """The half dtypes of weights that are cast where they are read, once; of inputs.

    Nothing, if the model cannot be called so.
    """
    readings = [Halves()]

    def call(values: list[tf.Tensor], shard: Any) -> None:
        replay = rehearsal.replay(values, shard, "read/")
        readings.append(Halves(replay.halves, replay.input_halves))

    graph, request = rehearsal.graph, rehearsal.request
    is_plain = request.users_fn is None and guards.is_plain(
        graph, rehearsal.shard
    )
    try:
        with hooks.hooked(graph, is_plain):
            rehearsal.run(call)
    except Exception:  # whatever the user's layers raise, where they are built
        return Halves()
    return readings[-1]
