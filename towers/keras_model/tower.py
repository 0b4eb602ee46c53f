"""tower: the pure function that one tower computes, and all towers forward."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers, warned
from towers.engine.calls import How
from towers.engine.draws import Place
from towers.engine.forward import run_towers
from towers.foreign import keras_layers, tf_autograph
from towers.keras_model import (
    drawn_shapes,
    draws,
    hooks,
    judged,
    layer_graph,
    losses,
    row_order,
    row_widths,
    shared_state,
    widths,
)
from towers.keras_model.held import check_changes_nothing, held_variables
from towers.keras_model.moments import besides_moments, packed
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request
from towers.verbs.join import joining
from towers.verbs.split import Shards


def forward(
    graph: layer_graph.LayerGraph,
    homes: list[str],
    shards: Shards,
    copies: list[list[Any]],
    towers: Sequence[Any],
    request: Request,
) -> tuple[list[Any], dict[int, str]]:
    """What each tower computes, and how state merges, as its graph says.

    By variable: "same" is all towers' alike; of a metric, "sum" or "mean".

    Args:
      graph: the model.
      homes: the device of each variable.
      shards: each tower's inputs.
      copies: each tower's parameters.
      towers: a `Tower` each, of which index, device, scope and inputs are known.
      request: what is asked for.
    """
    placement, own = request.placement, request.users_fn
    talks, how = graph.talks(request.training, own), request.how
    if how is not How.COMPILED and (talks or graph.pinned_layers):
        how = How.BUILT
    alike = own is None and not graph.is_spread
    determined = alike and graph.is_determined  # while no layer is hooked
    scopes = [tower.scope for tower in towers]
    fed, divided, phase = shards.fed[0], shards.divided, request.training
    places = _places(shards)

    def looked(tower_fn: Callable[..., Any] | None) -> Any:
        return drawn_shapes.of_many_rows(
            graph, copies[0], fed, divided, phase, tower_fn
        )

    judge = judged.OfTowers(graph, divided, request)

    def built(talk: bool, how: How) -> list[Any]:
        look = draws.Look(looked, how is How.COMPILED)
        return run_towers(
            [
                pure_tower(
                    *(graph, tower.index, tower.scope, request, homes),
                    *(divided, tower, places[tower.index], look, judge),
                )
                for tower in towers
            ],
            placement.devices,
            list(zip(copies, shards.fed)),
            # As the copies come first.
            [graph.elsewhere(tower.index, tower.device) for tower in towers],
            joining(shards, placement) if talk else None,
            scopes if alike or how is not How.BUILT else (),
            how,
            determined,
            held_variables(graph.layers),
        )

    with hooks.hooked(graph), warned.once():
        try:
            replays = built(talks, how)
        except all_towers.NeedsOthers as needs:
            if how is How.COMPILED:
                raise widths.refusal(str(needs)) from None
            replays = built(True, How.BUILT)
        shared = set.intersection(*(set(x["shared"]) for x in replays))
        if shared and shards.ranges.are_known and len(replays) > 1:
            shared &= judge.of_open_rows(copies[0], shards.fed[0]).shared
    agreed = set.intersection(*(set(x["metrics"]) for x in replays))
    return replays, {**dict(agreed), **{i: "same" for i, _ in shared}}


def _places(shards: Shards) -> list[Place]:
    """Where in the batch each tower's rows are."""
    ranges = shards.ranges
    total = sum(ranges.true) if ranges.are_known else shards.rows
    return [
        Place(i, start, fed, total)
        for i, (start, fed) in enumerate(zip(ranges.starts, ranges.fed))
    ]


def pure_tower(
    graph: layer_graph.LayerGraph,
    index: int,
    scope: str,
    request: Request,
    devices: Sequence[str],
    divided: Sequence[bool],
    tower: Any,
    place: Place,
    look: draws.Look,
    judge: judged.OfTowers,
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

    def operations() -> list[tf.Operation]:
        return tf.compat.v1.get_default_graph().get_operations()

    def run(argument: tuple[list[tf.Tensor], Any]) -> dict[str, Any]:
        copies, shard = argument
        before = len(operations())
        drawn = draws.Own(place, look, tower_fn)
        drawn.set_apart([copies[i] for i in graph.seeds], shard, divided)
        replay = replayed(
            *(graph, copies, shard, request.training, scope),
            *(tower_fn, index, drawn),
        )
        made = operations()[before:]
        if len(request.placement.devices) > 1:
            check_changes_nothing(made)
        if place.index == 0:
            drawn.check(scope)
        moments = packed(graph, devices, replay.moments, index)
        told = besides_moments(graph, replay.state, replay.moments)
        aside = tf.nest.map_structure(
            _stopped, {"state": told, "moments": moments}
        )
        if len(request.placement.devices) > 1:
            row_widths.warn_of_hidden(
                graph,
                [replay.outputs, replay.losses, aside],
                [x for x in operations()[before:] if x.name.startswith(scope)],
                shard,
                divided,
            )
        shared = shared_state.shared_state(
            graph, aside["state"], copies, shard, divided
        )
        rules, metrics = judge.rules(
            *(replay, aside["state"], copies, shard, drawn.rows)
        )
        return {
            "outputs": replay.outputs,
            "notes": replay.notes,
            "losses": losses.of_tower(graph, replay, rules, argument),
            "layer_outputs": replay.layer_outputs,
            # Names without tensors, which are there in copies of a tower too.
            "shared": dict.fromkeys(shared),
            "metrics": dict.fromkeys(metrics.items()),
            "unordered": dict.fromkeys(
                row_order.unordered(replay.outputs, shard, divided, copies)
                if request.is_split
                else ()
            ),
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
