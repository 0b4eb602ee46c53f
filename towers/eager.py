"""eager: towers at once, by way of a graph of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.engine.graphs import as_graphs
from towers.foreign import keras_layers
from towers.keras_model.refusals import tower_errors
from towers.keras_model.scope_values import ScopeValues
from towers.placement.placement import Placement
from towers.tower_graph import Pending, TowerGraph
from towers.verbs.batch import Batch


def run_eagerly(
    build: Callable[[Batch], TowerGraph], batch: Batch, placement: Placement
) -> TowerGraph:
    """Builds towers in a graph, runs it, and hands out its values.

    Args:
      build: towers of a batch, in the graph that calls it.
      batch: checked.
      placement: of the towers, for what errors say.
    """
    built: list[TowerGraph] = []
    scope = ScopeValues()

    def run(nest: Any, each: Any, values: Any) -> Any:
        nest = nest if each is None else each[0]
        with scope.again(values):
            graph = build(Batch(nest, batch.whole, each))
        built.append(graph)
        results = _tensors(graph)
        if each is not None:  # they stay where they are
            for tower in results["towers"]:
                del tower["inputs"]
        return results

    split = batch.nest if batch.each is None else None
    with tower_errors(placement), as_graphs():
        values = tf.function(run, autograph=False)(
            split, batch.each, scope.values
        )
    graph = built[-1]
    if batch.each is not None:
        for value, own in zip(values["towers"], batch.each):
            value["inputs"] = own
    keras_layers.set_notes(values["outputs"], values["notes"])
    return dataclasses.replace(
        graph,
        outputs=values["outputs"],
        towers=[
            dataclasses.replace(tower, **value)
            for tower, value in zip(graph.towers, values["towers"])
        ],
        rows=values["rows"],
        pending=Pending(
            [(v, x) for (v, _), x in zip(graph.updates, values["updates"])],
            is_value=True,
        ),
        losses=values["losses"],
    )


def _tensors(graph: TowerGraph) -> dict[str, Any]:
    return {
        "outputs": graph.outputs,
        "notes": keras_layers.get_notes(graph.outputs),
        "towers": [
            {
                "inputs": tower.inputs,
                "outputs": tower.outputs,
                "parameters": tower.parameters,
                "layer_outputs": tower.layer_outputs,
            }
            for tower in graph.towers
        ],
        "rows": graph.rows,
        "updates": [value for _, value in graph.updates],
        "losses": graph.losses,
    }
