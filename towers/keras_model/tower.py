"""tower: the pure function that one tower computes, and all towers forward."""

import contextlib
import dataclasses
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
    tower_losses,
)
from towers.keras_model.guards import Guards
from towers.keras_model.halves import Halves, halves_of
from towers.keras_model.homes import Home
from towers.keras_model.moments import besides_moments, packed
from towers.keras_model.parameter_copies import Copies
from towers.keras_model.reads import Misread
from towers.keras_model.rehearsal import Rehearsal
from towers.keras_model.replay import Replay, replayed
from towers.keras_model.request import Request
from towers.keras_model.sources import Sources
from towers.keras_model.table_look import ByRows, by_rows
from towers.keras_model.tower_draws import Own
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
    plain = Blueprint(graph, homes, request, inputs, {}, ByRows(graph))
    if graph.is_mixed or graph.pinned_layers:
        rehearsal = plain.rehearsal(shards, towers[0])
        with warned.once(), contextlib.suppress(Misread):
            halves = Halves()
            if graph.is_mixed:
                halves = halves_of(rehearsal, homes, shards)
            narrow, tables = halves.inputs, by_rows(rehearsal, homes)
            fed = shards.narrowed(narrow, request.placement.devices)
            copies = copied(halves.weights, request.hands_out, tables.homes)
            blueprint = dataclasses.replace(plain, narrow=narrow, tables=tables)
            computed = _computed(blueprint, towers, fed, copies)
            if not request.hands_out:  # the shards too
                shards.note_casts(narrow)
            return copies, *computed
    copies = copied({})
    return copies, *_computed(plain, towers, shards, copies)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What all towers of a model are built by.

    Attributes:
      graph, homes, request, inputs: as for `forward`.
      narrow: by place the half dtypes in which inputs have crossed.
      tables: those that towers read by rows.
    """

    graph: layer_graph.LayerGraph
    homes: Sequence[Home]
    request: Request
    inputs: Any
    narrow: Mapping[int, tf.DType]
    tables: ByRows

    def rehearsal(self, shards: Shards, first: Any) -> Rehearsal:
        """Of the first tower's call."""
        tower_fn = called_in(self.request, first)
        fed, divided = shards.fed[0], shards.divided
        return Rehearsal(self.graph, fed, divided, self.request, tower_fn)


def _computed(
    blueprint: Blueprint,
    towers: Sequence[Any],
    shards: Shards,
    copies: Copies,
) -> tuple[list[Any], dict[int, str]]:
    """What each tower computes of its shard and copies, and how state merges."""
    graph, request = blueprint.graph, blueprint.request
    own, how, tables = request.users_fn, request.how, blueprint.tables
    alike = own is None and not graph.is_spread
    determined = alike and graph.is_determined  # while no layer is hooked
    arguments = zip(copies.each, copies.located, shards.fed)
    each = [*zip(towers, shards.places(), arguments)]
    rehearsal = blueprint.rehearsal(shards, towers[0])
    guards = Guards(rehearsal)

    def built(talk: bool, how: How) -> list[Any]:
        look = guards.look_at_draws(how is How.COMPILED)
        pure = functools.partial(pure_tower, blueprint, guards, look)
        return run_towers(
            [
                Task(
                    pure(tower, place),
                    tower.device,
                    argument,
                    _elsewhere(graph, tower),
                    tower.scope if alike or how is not How.BUILT else "",
                )
                for tower, place, argument in each
            ],
            joining(shards, request.placement) if talk else None,
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
        verdict = guards.agreed(replays, shards.ranges.are_known)
    guards.check_outputs(replays, blueprint.inputs)
    return replays, verdict


def _elsewhere(graph: layer_graph.LayerGraph, tower: Any) -> dict[int, str]:
    """What of a tower's argument is taken elsewhere: of copies, and of `located`."""
    elsewhere = graph.elsewhere(tower.index, tower.device)
    if graph.seeds and host_of(tower.device) != tower.device:
        elsewhere[len(graph.variables)] = host_of(tower.device)
    return elsewhere


def pure_tower(
    blueprint: Blueprint,
    guards: Guards,
    look: draw_look.Look | None,
    tower: Any,
    place: Place,
) -> Callable[[Any], dict[str, Any]]:
    """The pure function of one tower: to a nest of tensors.

    Its argument are the tower's copies, where it is in the batch as `draws.located`
    has it, or None, and its shard.
    """
    graph, request = blueprint.graph, blueprint.request
    narrow, tables = blueprint.narrow, blueprint.tables
    tower_fn = called_in(request, tower)

    def run(argument: tuple[list[tf.Tensor], Any, Any]) -> dict[str, Any]:
        copies, located, shard = argument
        if request.how is How.COMPILED and place.is_known:
            located = None  # XLA knows shapes, and no tower is a copy
        sources = Sources(copies, shard, guards.divided, located)
        root = tf.compat.v1.get_default_graph()
        before, drawn = len(root.get_operations()), None
        if look is not None:
            with tf.name_scope(tower.scope):
                drawn = Own(place, sources, graph.seeds, look, tower_fn)
        replay = replayed(
            *(graph, copies, shard, request.training, tower.scope),
            *(tower_fn, tower.index, drawn),
            tables.of_tower() if tables.homes else None,
        )
        if any(replay.input_halves.get(k) != x for k, x in narrow.items()):
            raise Misread
        aside = _aside(blueprint, tower, replay)
        ops = root.get_operations()[before:]
        rules, findings = guards.findings(
            *(tower.scope, replay, aside, sources, drawn, ops)
        )
        return {
            "outputs": replay.outputs,
            "notes": replay.notes,
            "losses": replay.losses
            and tower_losses.of_tower(graph, replay, rules, sources),
            "layer_outputs": replay.layer_outputs,
            "activations": [
                dict.fromkeys([name] if name else ())
                for name in replay.activations
            ],
            **findings,
            **aside,
        }

    return keras_layers.carried(run)


def _aside(blueprint: Blueprint, tower: Any, replay: Replay) -> dict[str, Any]:
    """A tower's new state and moments, to which no gradient goes."""
    moments, state = {}, replay.state
    if replay.moments:
        graph, where = blueprint.graph, [x.device for x in blueprint.homes]
        moments = packed(graph, where, replay.moments, tower.index)
        state = besides_moments(graph, state, replay.moments)
    aside = {"state": state, "moments": moments}
    return tf.nest.map_structure(_stopped, aside)


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
