"""guards: what is looked for in the graph of a tower, beside the story.

Each looks for one thing that towers could get wrong:

  tower_draws      random numbers by seeds that are the same in all towers
  attributes       tensors of one tower that a layer keeps
  fixed_rows       masks and noise for a batch of so many rows
  widths           ragged rows, dense as wide as the longest of a tower's
  row_widths       widths that a tower's rows tell, where nothing shows it
  mixed_rows       what is made of all rows together
  row_order        rows in another order
  batchless        outputs that have no rows
  held             variables that are no model's, and changes of them
  judged           how losses and metrics become one
  shared_state     how other state does
  and, by `foreign`, gradients that a layer takes by itself (`tf_custom_gradients`)
  and what Keras asks of the machine (`keras_machine`)

None does anything for a model that has it not. What is told by the ops that a tower
made, by its state or its losses, is asked of those first. The rest, which listens
while a tower is built, is left out for plain layers: see `is_plain`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.boundary import Held
from towers.foreign import keras_layers
from towers.keras_model import (
    batchless,
    draw_look,
    judged,
    mixed_rows,
    row_order,
    row_widths,
    shared_state,
    tower_draws,
)
from towers.keras_model.held import check_changes_nothing, held_variables
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.rehearsal import Rehearsal
from towers.keras_model.replay import Replay
from towers.keras_model.sources import Sources
from towers.verbs.gather import check_structures, spread

# Layers whose `call` in Keras is arithmetic on what it is given and on weights: it
# draws nothing, keeps nothing, makes nothing ragged or dense of that, has no mask or
# noise of a number of rows, no variable beside its weights, no gradient of its own,
# and never asks for the machine, but for channels that come first.
_PLAIN = (
    keras.Sequential,
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.Average,
    keras.layers.AveragePooling2D,
    keras.layers.BatchNormalization,
    keras.layers.Concatenate,
    keras.layers.Conv2D,
    keras.layers.Dense,
    keras.layers.DepthwiseConv2D,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.InputLayer,
    keras.layers.LayerNormalization,
    keras.layers.MaxPooling2D,
    keras.layers.Multiply,
    keras.layers.ReLU,
    keras.layers.Reshape,
    keras.layers.Softmax,
    keras.layers.Subtract,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)


def is_plain(graph: LayerGraph, shard: Any) -> bool:
    """Whether it is known that towers need not be listened to while they are built.

    That is so of dense tensors in layers of Keras's own that are plain, exactly as
    Keras has them, in a model that calls nothing else. Of any other layer, and of a
    user's above all, it is not known.

    Args:
      graph: the model; all that the tower calls.
      shard: a nest that it is called with.
    """
    return all(
        x is None or isinstance(x, tf.Tensor) for x in tf.nest.flatten(shard)
    ) and all(
        keras_layers.is_as_written(layer, _PLAIN)
        and getattr(layer, "data_format", None) != "channels_first"
        and not keras_layers.bare_operations(layer)
        for layer in graph.layers
    )


class Guards:
    """What is looked for in the towers of one model.

    Args:
      rehearsal: of the first one's call.

    Attributes:
      is_plain: whether nothing is listened to.
      divided: for each leaf of a shard whether it is of the tower's rows, or
        whole.
    """

    def __init__(self, rehearsal: Rehearsal):
        graph, request = rehearsal.graph, rehearsal.request
        is_own = request.users_fn is None
        self.is_plain = is_own and is_plain(graph, rehearsal.shard)
        self.divided = rehearsal.divided
        self._rehearsal, self._graph = rehearsal, graph
        self._request = request
        self._may_mix = is_own and not self.is_plain

    @functools.cached_property
    def _judge(self) -> judged.OfTowers:
        return judged.OfTowers(self._rehearsal)

    @property
    def held(self) -> list[Held]:
        """Variables that layers keep beside Keras's weights."""
        return [] if self.is_plain else held_variables(self._graph.layers)

    def look_at_draws(self, is_compiled: bool) -> draw_look.Look | None:
        """What a tower of many rows draws, looked at when one does."""
        if self.is_plain:
            return None

        def look(tower_fn: Callable[..., Any] | None, anew: bool) -> Any:
            own = dataclasses.replace(self._rehearsal, tower_fn=tower_fn)
            return draw_look.of_many_rows(own, anew)

        is_only = len(self._request.placement.devices) == 1
        return draw_look.Look(look, is_compiled, is_only)

    def findings(
        self,
        scope: str,
        replay: Replay,
        aside: dict[str, Any],
        sources: Sources,
        drawn: tower_draws.Own | None,
        ops: Sequence[tf.Operation],
    ) -> tuple[list[str], dict[str, Any]]:
        """Those of one tower, to be called in it.

        Args:
          scope: the tower's, with its slash.
          replay: what it computed.
          aside: its new state and moments.
          sources: what it is given.
          drawn: its draws, if it may have any.
          ops: those that it is made of, and those for all towers.

        Returns:
          A rule for each loss; and names without tensors, which are there in
          copies of a tower too.

        Raises:
          ValueError: the tower changes what all towers would.
        """
        state, kinds = aside["state"], {op.type for op in ops}
        are_several = len(self._request.placement.devices) > 1
        rules: list[str] = []
        metrics: dict[int, str] = {}
        shared: set[shared_state.Shared] = set()
        unordered: list[int] = []
        if drawn is not None:
            sources = dataclasses.replace(sources, drawn=drawn.rows)
            if drawn.place.index == 0:
                drawn.check(scope)
            drawn.check_counts()
            if are_several:
                check_changes_nothing(ops)
        if are_several and not row_widths.SIZED.keys().isdisjoint(kinds):
            row_widths.warn_of_hidden(
                self._graph,
                [replay.outputs, replay.losses, aside],
                [x for x in ops if x.name.startswith(scope)],
                sources,
            )
        if (
            are_several
            and self._may_mix
            and not mixed_rows.MIXES.isdisjoint(kinds)
        ):
            self._warn_of_mixed(replay, sources)
        if state:
            shared = shared_state.shared_state(self._graph, state, sources)
        if state or replay.losses:
            rules, metrics = self._judge.rules(replay, state, sources)
        if self._request.is_split and not row_order.MOVES.isdisjoint(kinds):
            unordered = row_order.unordered(replay.outputs, sources)
        return rules, {
            "shared": dict.fromkeys(shared),
            "metrics": dict.fromkeys(metrics.items()),
            "unordered": dict.fromkeys(unordered),
        }

    def _warn_of_mixed(self, replay: Replay, sources: Sources) -> None:
        """Looks once; other towers are made alike."""
        self._may_mix = False
        outputs = tf.nest.flatten(replay.outputs)
        rules = tf.nest.flatten(spread(self._request.merge, replay.outputs))
        mixed_rows.warn_of(
            self._graph,
            judged.judge_of(self._graph, replay, sources),
            [y for y, rule in zip(outputs, rules) if rule == "concat"],
            judged.taken_as_same(replay),
        )

    def check_outputs(
        self, replays: Sequence[dict[str, Any]], inputs: Any
    ) -> None:
        """Raises unless outputs are of one structure, and can be joined.

        Args:
          replays: what each tower computed.
          inputs: the nest that the model is called with.

        Raises:
          ValueError: they differ, have no rows to join, or in another order.
        """
        each = [replay["outputs"] for replay in replays]
        check_structures(each)
        unordered = {i for replay in replays for i in replay["unordered"]}
        are_all_split = all(self.divided)
        if self._request.users_fn is not None:
            return
        # What is plain has rows where its inputs have.
        if (
            unordered
            or not are_all_split
            or not (self.is_plain or all(map(_are_open, each)))
        ):
            question = batchless.Question(
                self._graph, inputs, self.divided, self._request
            )
            rules = spread(self._request.merge, each[0])
            question.check_joined(each, rules, unordered)

    def agreed(
        self, findings: Sequence[dict[str, Any]], rows_are_known: bool
    ) -> dict[int, str]:
        """How state merges, by variable, where all towers' findings agree.

        "same" is all towers' alike; of a metric, "sum" or "mean".

        Args:
          findings: one per tower.
          rows_are_known: whether towers know their numbers of rows.
        """
        shared = set.intersection(*(set(x["shared"]) for x in findings))
        if shared and rows_are_known and len(findings) > 1:
            shared &= self._judge.of_open_rows().shared
        metrics = set.intersection(*(set(x["metrics"]) for x in findings))
        return {**dict(metrics), **{i: "same" for i, _ in shared}}


def _are_open(outputs: Any) -> bool:
    """Whether no output of a tower knows its number of rows, as shards do not."""
    return all(
        x is None or not x.shape.rank or x.shape[0] is None
        for x in tf.nest.flatten(outputs)
    )
