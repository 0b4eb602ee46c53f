"""batch_norms: whether towers meet where batch norms take the whole batch's moments.

A tower that asks the others in the midst of its forward pass is to be built beside
them. Whether a batch norm trains only its call tells: by the phase that it is told,
maybe by the model in which it is, which may be called without.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.engine.calls import How
from towers.foreign import keras_layers, specs
from towers.keras_model.aside import call_aside
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request


def meet(
    graph: LayerGraph,
    copies: Sequence[tf.Tensor],
    shard: Any,
    divided: Sequence[bool],
    request: Request,
    tower_fn: Callable[..., Any] | None,
) -> bool:
    """Whether a batch norm that takes all towers' moments trains.

    A tower is built until then, in a graph that is never run. Where it cannot be,
    and where a layer trains though its model does not, it is found when towers are
    built (`NeedsOthers`).

    Args:
      graph: names the layers, of which one may; `hooked`.
      copies, shard: what a tower is given.
      divided: for each leaf whether it is of the tower's rows, or whole.
      request: what is asked for.
      tower_fn: what the tower calls.
    """
    if len(request.placement.devices) == 1 or request.how is How.COMPILED:
        return False
    training = request.training
    if training is None and request.users_fn is None:
        phase = keras_layers.phase_here()
        training = False if phase is None else phase
    if training is False:
        return False

    def call(copies: list[tf.Tensor], shard: Any) -> None:
        replayed(graph, copies, shard, training, "trained/", tower_fn)

    try:
        call_aside(
            *(call, graph.layers, all_towers.by_themselves),
            *(graph.specs_of(copies), specs.of_nest(shard, divided)),
        )
    except all_towers.NeedsOthers:
        return True
    except Exception:  # whatever the user's layers raise, where they are built
        return False
    return False
