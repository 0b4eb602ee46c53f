"""table_look: which tables towers read by rows, seen before they are built.

Those of embeddings that are pinned to where their table lives, if nothing but their
lookups reads it: no head that is tied to it, no regularizer, no code of a user's. Of
layers that are Keras's own this is known. Else a call of the model is looked at, in
a graph that is never run; a tower which reads otherwise is not built (`Misread`), and
gets the tables whole.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.boundary import Held
from towers.foreign import keras_layers
from towers.keras_model import hooks
from towers.keras_model.findings import Findings
from towers.keras_model.homes import Home
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.pieces.joined import Joined
from towers.keras_model.rehearsal import Rehearsal
from towers.keras_model.row_tables import Tables
from towers.placement.device_names import same_device

_FINDINGS: Findings[set[int]] = Findings()


@dataclasses.dataclass(frozen=True)
class ByRows:
    """The tables that towers read by rows.

    Attributes:
      graph: the model.
      layers: by the ids of layers that look rows up, the places of their tables in
        `graph.variables`, of those that are whole.
      homes: by these places, and those of pieces, where the tables live.
    """

    graph: LayerGraph
    layers: Mapping[int, int] = dataclasses.field(default_factory=dict)
    homes: Mapping[int, Home] = dataclasses.field(default_factory=dict)

    def of_tower(self, only_looks: bool = False) -> Tables:
        """How one tower reads them, or is seen to."""
        tables = self.graph.variables
        variables = {id(tables[k]): x.variable for k, x in self.homes.items()}
        return Tables(
            [tables[k] for k in self.homes],
            {layer: tables[k] for layer, k in self.layers.items()},
            None if only_looks else variables,
        )

    @property
    def held(self) -> list[Held]:
        """The tables, as variables that towers read past their arguments."""
        return [
            Held(home.variable, self.graph.variables[k].path, False)
            for k, home in self.homes.items()
        ]

    def without(self, whole: Container[int]) -> "ByRows":
        """The same, less those with these places."""
        return ByRows(
            self.graph,
            {i: k for i, k in self.layers.items() if k not in whole},
            {k: x for k, x in self.homes.items() if k not in whole},
        )


def by_rows(rehearsal: Rehearsal, homes: Sequence[Home]) -> ByRows:
    """The tables of which towers read rows.

    Args:
      rehearsal: of the first tower's call.
      homes: where the model's variables live.
    """
    graph, request = rehearsal.graph, rehearsal.request
    tables = _pinned(graph, homes, request.placement.devices)
    if not tables.homes:
        return tables
    if (
        request.users_fn is None
        and graph.is_keras_own
        and all(
            isinstance(x, tf.Tensor) for x in tf.nest.flatten(rehearsal.shard)
        )
    ):
        return tables
    call = tuple(tables.homes), str(rehearsal.specs())
    return tables.without(
        _FINDINGS.of(
            graph, request, call, lambda: _read_whole(tables, rehearsal)
        )
    )


def _pinned(
    graph: LayerGraph, homes: Sequence[Home], devices: Sequence[str]
) -> ByRows:
    """The tables that live where their layers look them up."""
    layers, by_place = {}, {}
    for layer, _ in graph.pinned_layers:
        if not _looks_up(layer):
            continue
        table = layer.embeddings
        whole = not isinstance(table, Joined)
        for piece in [table] if whole else table.pieces:
            k = graph.index_of(piece)
            if _is_by_rows(graph, k, homes[k], devices):
                by_place[k] = homes[k]
                if whole:
                    layers[id(layer)] = k
    return ByRows(graph, layers, by_place)


def _is_by_rows(
    graph: LayerGraph, k: int, home: Home, devices: Sequence[str]
) -> bool:
    """Whether a table, at place k, can be read by rows where it lives."""
    return (
        home.stand_in is None
        and graph.variables[k].regularizer is None
        and not keras_layers.made_by_strategy(home.variable)
        and all(
            same_device(graph.elsewhere(i, d).get(k, d), home.device)
            for i, d in enumerate(devices)
        )
    )


def _looks_up(layer: Any) -> bool:
    """Whether a layer is Keras's embedding, and does nothing but look up rows."""
    return (
        keras_layers.is_as_written(layer, (keras.layers.Embedding,))
        and layer.built
        and not layer.lora_enabled
    )


def _read_whole(tables: ByRows, rehearsal: Rehearsal) -> set[int]:
    """The places of tables that something else reads; all, if it cannot be seen."""
    graph, wholes = tables.graph, [set(tables.homes)]

    def call(values: list[tf.Tensor], shard: Any) -> None:
        look = tables.of_tower(only_looks=True)
        rehearsal.replay(values, shard, "read/", tables=look)
        wholes.append(
            {k for k in tables.homes if id(graph.variables[k]) in look.whole}
        )

    try:
        with hooks.hooked(graph):
            rehearsal.run(call)
    except Exception:  # whatever the user's layers raise, where they are built
        pass
    return wholes[-1]
