"""tower: the pure function that one tower computes, and all towers forward."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers, warned
from towers.engine.boundary import Task
from towers.engine.calls import How
from towers.engine.draws import Place
from towers.engine.forward import run_towers
from towers.engine.host import host_of
from towers.foreign import keras_layers, tf_autograph
from towers.keras_model import (
    batch_norms,
    checks,
    draw_look,
    hooks,
    layer_graph,
    tower_draws,
    tower_losses,
)
from towers.keras_model.guards import Guards
from towers.keras_model.halves import Halves, halves_of
from towers.keras_model.homes import Home
from towers.keras_model.moments import besides_moments, packed
from towers.keras_model.parameter_copies import Copies
from towers.keras_model.reads import Misread
from towers.keras_model.rehearsal import Rehearsal
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request
from towers.keras_model.table_look import ByRows, by_rows
from towers.verbs.join import joining
from towers.verbs.split import Shards


def forward(
    graph: layer_graph.LayerGraph,
    homes: Sequence[Home],
    shards: Shards,
    copied: Callable[..., Copies],
    towers: Sequence[Any],
    request: Request,
    inputs: Any,
) -> tuple[Copies, list[Any], dict[int, str]]:
    """What each tower is given and computes, and how state merges.

    As its graph says, by variable: "same" is all towers' alike; of a metric, "sum"
    or "mean".

    Args:
      graph: the model.
      homes: where each variable lives.
      shards: each tower's inputs.
      copied: gives copies of all, of which some cross in a half dtype, see
        `replicated`.
      towers: a `Tower` each, of which index, device, scope and inputs are known.
      request: what is asked for.
      inputs: the nest of which the shards are.

    Raises:
      ValueError: towers cannot be built, or their outputs not be joined.
    """
    one = functools.partial(_computed, graph, homes, towers, request, inputs)
    if graph.is_mixed or graph.pinned_layers:
        rehearsal = _rehearsal(graph, shards, request, towers)
        with warned.once(), contextlib.suppress(Misread):
            halves = Halves()
            if graph.is_mixed:
                halves = halves_of(rehearsal, homes, shards)
            tables = by_rows(rehearsal, homes)
            narrow = halves.inputs
            fed = shards.narrowed(narrow, request.placement.devices)
            copies = copied(halves.weights, request.hands_out, tables.homes)
            computed = one(fed, copies, narrow, tables)
            if not request.hands_out:  # the shards too
                shards.note_casts(narrow)
            return copies, *computed
    copies = copied({})
    return copies, *one(shards, copies, {}, ByRows(graph))


def _computed(
    graph: layer_graph.LayerGraph,
    homes: Sequence[Home],
    towers: Sequence[Any],
    request: Request,
    inputs: Any,
    shards: Shards,
    copies: Copies,
    narrow: Mapping[int, tf.DType],
    tables: ByRows,
) -> tuple[list[Any], dict[int, str]]:
    """What each tower computes, and how state merges.

    Args:
      shards, copies: what towers are given.
      narrow: by place the half dtypes in which inputs have crossed.
      tables: those that towers read by rows.
      graph, homes, towers, request, inputs: as for `forward`.
    """
    placement, own = request.placement, request.users_fn
    how, where = request.how, [home.device for home in homes]
    alike = own is None and not graph.is_spread
    determined = alike and graph.is_determined  # while no layer is hooked
    places, each, located = shards.places(), copies.each, copies.located
    rehearsal = _rehearsal(graph, shards, request, towers)
    guards = Guards(rehearsal)

    def built(talk: bool, how: How) -> list[Any]:
        look = guards.look_at_draws(how is How.COMPILED)
        return run_towers(
            [
                Task(
                    pure_tower(
                        *(graph, tower, request, where, place, look, guards),
                        *(narrow, tables),
                    ),
                    tower.device,
                    argument,
                    _elsewhere(graph, tower),
                    tower.scope if alike or how is not How.BUILT else "",
                )
                for tower, place, argument in zip(
                    towers, places, zip(each, located, shards.fed)
                )
            ],
            joining(shards, placement) if talk else None,
            how,
            determined,
            guards.held + (tables.held if tables.homes else []),
        )

    with hooks.hooked(graph, guards.is_plain), warned.once():
        talks = graph.talks(own)
        if graph.meeting_norms and not talks:
            talks = batch_norms.meet(rehearsal)
        if how is not How.COMPILED and (talks or graph.pinned_layers):
            how = How.BUILT
        try:
            replays = built(talks, how)
        except all_towers.NeedsOthers as needs:
            if how is How.COMPILED:
                raise checks.not_compilable(*needs.args) from None
            replays = built(True, How.BUILT)
        are_known = shards.ranges.are_known
        verdict = guards.agreed(replays, are_known)
    guards.check_outputs(replays, inputs)
    return replays, verdict


def _rehearsal(
    graph: layer_graph.LayerGraph,
    shards: Shards,
    request: Request,
    towers: Sequence[Any],
) -> Rehearsal:
    """Of the first tower's call."""
    tower_fn = called_in(request, towers[0])
    return Rehearsal(graph, shards.fed[0], shards.divided, request, tower_fn)


def _elsewhere(graph: layer_graph.LayerGraph, tower: Any) -> dict[int, str]:
    """What of a tower's argument is taken elsewhere: of copies, and of `located`."""
    elsewhere = graph.elsewhere(tower.index, tower.device)
    if graph.seeds and host_of(tower.device) != tower.device:
        elsewhere[len(graph.variables)] = host_of(tower.device)
    return elsewhere


def pure_tower(
    graph: layer_graph.LayerGraph,
    tower: Any,
    request: Request,
    devices: Sequence[str],
    place: Place,
    look: draw_look.Look | None,
    guards: Guards,
    narrow: Mapping[int, tf.DType],
    tables: ByRows,
) -> Callable[[Any], dict[str, Any]]:
    """The pure function of one tower: to a nest of tensors.

    Its argument are the tower's copies, where it is in the batch as `draws.located`
    has it, or None, and its shard.
    """
    tower_fn = called_in(request, tower)

    def run(argument: tuple[list[tf.Tensor], Any, Any]) -> dict[str, Any]:
        copies, located, shard = argument
        if request.how is How.COMPILED and place.is_known:
            located = None  # XLA knows shapes, and no tower is a copy
        root = tf.compat.v1.get_default_graph()
        before, drawn = len(root.get_operations()), None
        if look is not None:
            with tf.name_scope(tower.scope):
                drawn = tower_draws.Own(place, located, look, tower_fn)
            states = {i: copies[i] for i in graph.seeds}
            drawn.set_given(states, shard, guards.divided)
        replay = replayed(
            *(graph, copies, shard, request.training, tower.scope),
            *(tower_fn, tower.index, drawn),
            tables.of_tower() if tables.homes else None,
        )
        if any(replay.input_halves.get(k) != x for k, x in narrow.items()):
            raise Misread
        moments, state = {}, replay.state
        if replay.moments:
            moments = packed(graph, devices, replay.moments, tower.index)
            state = besides_moments(graph, state, replay.moments)
        aside = tf.nest.map_structure(
            _stopped, {"state": state, "moments": moments}
        )
        rules, findings = guards.findings(
            *(tower.scope, replay, aside, copies, shard, drawn),
            root.get_operations()[before:],
        )
        return {
            "outputs": replay.outputs,
            "notes": replay.notes,
            "losses": replay.losses
            and tower_losses.of_tower(graph, replay, rules, (copies, shard)),
            "layer_outputs": replay.layer_outputs,
            "activations": [
                dict.fromkeys([name] if name else ())
                for name in replay.activations
            ],
            **findings,
            **aside,
        }

    return keras_layers.carried(run)


def called_in(request: Request, tower: Any) -> Callable[..., Any] | None:
    """What a tower calls, of the model and its shard.

    A `tower_fn` that has a parameter named `tower`, after those two, gets `tower`.
    """
    if request.users_fn is None:
        return request.tower_fn
    tower_fn = tf_autograph.converted(request.users_fn)
    if _asks_for_tower(request.users_fn):
        tower_fn = functools.partial(tower_fn, tower=tower)
    return tower_fn


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
