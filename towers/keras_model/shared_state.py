"""shared_state: which state comes out the same in all towers, or does not.

What a layer makes of its weights and its state only, each tower makes alike. What
it makes of rows has to be merged.
"""

import tensorflow as tf

from towers.engine import all_towers, boundary, dependence
from towers.keras_model import layer_graph
from towers.keras_model.kinds import Kind
from towers.keras_model.sources import Sources

# A variable, by its index, and what its new value has of constants.
Shared = tuple[int, str]


def shared_state(
    graph: layer_graph.LayerGraph,
    state: dict[int, tf.Tensor],
    sources: Sources,
) -> set[Shared]:
    """Variables whose new value depends on no row of a tower.

    To be called in the tower. Metrics are left out: what changes each of their
    variables is `judged`.

    Args:
      graph: names the variables.
      state: new values by variable.
      sources: what the tower is given.
    """
    kept = [sources.copies[i] for i in graph.row_states]
    rows = [*sources.rows, *boundary.tensors_of(sources.located), *kept]
    shared = all_towers.shared()
    return {
        (i, dependence.constants(value, [*sources.copies, *shared]))
        for i, value in state.items()
        if graph.kinds[i] not in (Kind.ROWS, Kind.METRIC, Kind.SEED)
        and not dependence.depends(value, rows, shared)
    }
