"""build: split, replicate, forward, gather. The whole story."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.keras_model.homes import Home
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.losses import gathered_losses
from towers.keras_model.outputs import gathered_outputs
from towers.keras_model.parameter_copies import Copies, replicated
from towers.keras_model.request import Request
from towers.keras_model.state import Before, merge_state
from towers.tower_graph import Pending, Tower, TowerGraph
from towers.verbs.batch import Batch
from towers.verbs.gather import gather_known
from towers.verbs.split import own_shards, split_shards


def assemble(
    graph: LayerGraph,
    homes: list[Home],
    penalties: list[tf.Tensor],
    batch: Batch,
    request: Request,
    forward: Callable[..., tuple[Copies, list[Any], dict[int, str]]],
) -> TowerGraph:
    """A checked model as towers.

    Args:
      graph: the model, and names its variables.
      homes: where they live.
      penalties: its weight regularisers.
      batch: what it is called with.
      request: what else is asked for.
      forward: what all towers compute, and what they are given for it: the
        function of this name in `keras_model.tower`.
    """
    placement = request.placement
    divide = split_shards if batch.each is None else own_shards
    shards = divide(batch, placement, request.hands_out)
    copied = functools.partial(replicated, graph, homes, placement, shards)
    own = shards.true
    with tf.name_scope(""):
        begun = [
            Tower(i, device, _scope(i), own and request.inputs_of(own[i]))
            for i, device in enumerate(placement.devices)
        ]
    where = [home.device for home in homes]
    copies, replays, verdict = forward(
        graph, homes, shards, copied, begun, request, batch.nest
    )

    def gather(each: Any, rule: Any, label: str = "output") -> Any:
        return gather_known(each, placement, rule, shards.rows, label)

    outputs = gathered_outputs(replays, request.merge, gather, placement)
    losses: list[tf.Tensor] = []
    adders: list[Any] = []
    merged: dict[int, tf.Tensor] = {}
    if any(replay["losses"] for replay in replays):
        losses, adders = gathered_losses(
            *(graph.layers, replays, gather),
            *(str(placement.output_device), shards.rows),
        )
    if any(replay["state"] or replay["moments"] for replay in replays):
        merged = merge_state(
            Before(graph, copies.values, where, shards.rows, copies.each),
            [replay["state"] for replay in replays],
            verdict,
            [replay["moments"] for replay in replays],
        )
    towers = [
        dataclasses.replace(
            tower,
            outputs=replay["outputs"],
            parameters=own,
            layer_outputs=replay["layer_outputs"],
        )
        for tower, replay, own in zip(begun, replays, copies.parameters)
    ]
    return TowerGraph(
        outputs,
        towers,
        shards.rows.counts,
        Pending([(homes[k].owner, merged[k]) for k in sorted(merged)], False),
        losses + penalties,
        adders,
        [(v, home.variable) for v, home in zip(graph.variables, homes)],
    )


def _scope(i: int) -> str:
    """The name scope of a tower, with its slash."""
    with tf.name_scope(f"tower_{i}") as scope:
        return scope
