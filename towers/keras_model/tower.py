"""tower: the pure function that one tower computes."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers, tf_autograph
from towers.keras_model import layer_graph, shared_state
from towers.keras_model.moments import besides_moments, packed
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request


def pure_tower(
    graph: layer_graph.LayerGraph,
    index: int,
    scope: str,
    request: Request,
    devices: Sequence[str],
    divided: Sequence[bool],
    tower: Any = None,
) -> Callable[[Any], dict[str, Any]]:
    """The pure function of one tower: (copies, shard) to a nest of tensors.

    A `tower_fn` that has a parameter named `tower`, after the model and its shard,
    gets `tower`.
    """
    tower_fn = request.tower_fn
    if request.users_fn is not None:
        asks = _asks_for_tower(request.users_fn)
        tower_fn = tf_autograph.converted(tower_fn)
        if asks:
            tower_fn = functools.partial(tower_fn, tower=tower)

    def run(argument: tuple[list[tf.Tensor], Any]) -> dict[str, Any]:
        copies, shard = argument
        replay = replayed(
            graph, copies, shard, request.training, scope, tower_fn, index
        )
        moments = packed(graph, devices, replay.moments, index)
        told = besides_moments(graph, replay.state, replay.moments)
        aside = tf.nest.map_structure(
            _stopped, {"state": told, "moments": moments}
        )
        shared = shared_state.shared_state(
            graph, aside["state"], copies, shard, divided
        )
        return {
            "outputs": replay.outputs,
            "notes": replay.notes,
            "losses": replay.losses,
            "layer_outputs": replay.layer_outputs,
            # Names without tensors, which are there in copies of a tower too.
            "shared": dict.fromkeys(shared),
            "activations": [
                dict.fromkeys([name] if name else ())
                for name in replay.activations
            ],
            **aside,
        }

    return keras_layers.carried(run)


def _asks_for_tower(function: Callable[..., Any]) -> bool:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of what Python cannot look into
        return False
    return "tower" in names[2:]


def _stopped(value: tf.Tensor | None) -> tf.Tensor | None:
    if value is None:
        return None
    with tf.device(value.device):  # a seed's is the host
        return tf.stop_gradient(value)
