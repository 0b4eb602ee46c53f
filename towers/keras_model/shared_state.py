"""shared_state: which state comes out the same in all towers, or does not.

What a layer makes of its weights and its state only, each tower makes alike. What
it makes of rows has to be merged.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers, boundary, dependence
from towers.keras_model import layer_graph
from towers.keras_model.moments import besides_moments
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request
from towers.verbs.split import open_spec

# A variable, by its index, and what its new value has of constants.
Shared = tuple[int, str]


def shared_state(
    graph: layer_graph.LayerGraph,
    state: dict[int, tf.Tensor],
    copies: Sequence[tf.Tensor],
    shard: Any,
    divided: Sequence[bool],
) -> set[Shared]:
    """Variables whose new value depends on no row of a tower.

    To be called in the tower. Metrics are left out: their variables belong
    together, a mean of means with its count.

    Args:
      graph: names the variables.
      state: new values by variable.
      copies: the tower's copy of each variable.
      shard: the tower's inputs.
      divided: for each leaf whether it is of the tower's rows, or whole.
    """
    rows = [
        tensor
        for leaf, mine in zip(tf.nest.flatten(shard), divided)
        if mine
        for tensor in boundary.leaves(leaf)
    ]
    rows += [copies[i] for i in graph.row_states]
    known = all_towers.shared()
    return {
        (i, dependence.constants(value, [*copies, *known]))
        for i, value in state.items()
        if not (i in graph.row_states or graph.is_metric(i) or graph.is_seed(i))
        and not dependence.depends(value, rows, known)
    }


def of_open_rows(
    graph: layer_graph.LayerGraph,
    copies: Sequence[tf.Tensor],
    shard: Any,
    divided: Sequence[bool],
    request: Request,
) -> set[Shared]:
    """As `shared_state`, of a tower with any number of rows.

    Where that is known, a layer may take it for a constant, which no op shows.
    So the model is called once more, in a graph that is never run. What it
    cannot do so is not shared.

    Args:
      graph: names the variables; `hooked`.
      copies, shard: what a tower is given.
      divided: as for `shared_state`.
      request: tells the phase and the `tower_fn`.
    """
    found: set[Shared] = set()

    def call(copies: list[tf.Tensor], shard: Any) -> None:
        replay = replayed(
            graph, copies, shard, request.training, "open/", request.tower_fn
        )
        state = besides_moments(graph, replay.state, replay.moments)
        tensors = {i: tf.identity(x) for i, x in state.items()}
        found.update(shared_state(graph, tensors, copies, shard, divided))

    specs = [
        open_spec(x, mine) for x, mine in zip(tf.nest.flatten(shard), divided)
    ]
    with contextlib.suppress(Exception), all_towers.alone():
        tf.function(call, autograph=False).get_concrete_function(
            [open_spec(x, i in graph.row_states) for i, x in enumerate(copies)],
            tf.nest.pack_sequence_as(shard, specs),
        )
    return found
