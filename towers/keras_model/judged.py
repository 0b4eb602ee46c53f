"""judged: how what each tower says of losses and metrics becomes one.

By the graph that made it: what is a sum over rows adds up, what is a mean weighs
by rows, what has rows is joined, and what depends on none is the same in all
towers. Of what is neither, nobody can tell.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine import all_towers, boundary, row_kinds
from towers.engine.row_kinds import MEAN, SAME, SUM, OfRows, Total, agreed
from towers.engine.row_sums import Judge
from towers.foreign import keras_layers
from towers.keras_model import layer_graph, shared_state
from towers.keras_model.attributes import as_before
from towers.keras_model.kinds import Kind
from towers.keras_model.merge_rules import AVERAGED, SHARES, SUMMED, UNKNOWN
from towers.keras_model.moments import besides_moments
from towers.keras_model.rehearsal import Rehearsal
from towers.keras_model.replay import Replay, replayed
from towers.keras_model.row_losses import adds_up
from towers.keras_model.sources import Sources


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the graph of a tower says of all towers.

    Attributes:
      shared: as `shared_state`.
      losses: a rule for each loss.
      metrics: a rule by variable of a metric.
    """

    shared: set[shared_state.Shared]
    losses: list[str]
    metrics: dict[int, str]


class OfTowers:
    """Judges towers, whose graphs may know their numbers of rows.

    Where that is known, a layer may take it for a constant, which no op shows.
    So the model is called once more then, in a graph that is never run, if there
    is anything to ask. Of what cannot be called so, nothing is known.

    Args:
      rehearsal: of a tower's call, whose graph is `hooked`.
    """

    def __init__(self, rehearsal: Rehearsal):
        self._rehearsal = rehearsal
        self._graph = rehearsal.graph
        self._open: Verdict | None = None

    def rules(
        self,
        replay: Replay,
        state: dict[int, tf.Tensor],
        sources: Sources,
    ) -> tuple[list[str], dict[int, str]]:
        """Those of losses, and of metrics' variables; to be called in a tower.

        Args:
          replay: what the tower computed.
          state: its new values by variable.
          sources: what it is given.
        """
        graph, metrics = self._graph, _metrics(self._graph, state)
        if len(self._rehearsal.request.placement.devices) == 1:
            return ["none"] * len(replay.losses), dict.fromkeys(metrics, "sum")
        if not metrics and all(replay.regularized):
            return [rule or UNKNOWN for rule in replay.regularized], {}
        if _are_open(sources):
            return _rules(graph, replay, state, sources, metrics)
        verdict = self.of_open_rows()
        if len(verdict.losses) != len(replay.losses):
            return [UNKNOWN] * len(replay.losses), {}
        return verdict.losses, verdict.metrics

    def of_open_rows(self) -> Verdict:
        """What a tower of any number of rows says, asked once."""
        if self._open is None:
            self._open = Verdict(set(), [], {})
            with (
                contextlib.suppress(Exception),
                all_towers.alone(),
                as_before(self._graph.layers),
            ):
                self._ask()
        return self._open

    def _ask(self) -> None:
        graph, request = self._graph, self._rehearsal.request

        def call(copies: list[tf.Tensor], shard: Any) -> None:
            replay = replayed(
                *(graph, copies, shard, request.training, "open/"),
                request.tower_fn,
            )
            new = besides_moments(graph, replay.state, replay.moments)
            state = {i: tf.identity(x) for i, x in new.items()}
            sources = Sources(copies, shard, self._rehearsal.divided)
            self._open = Verdict(
                shared_state.shared_state(graph, state, sources),
                *_rules(graph, replay, state, sources, _metrics(graph, state)),
            )

        tf.function(call, autograph=False).get_concrete_function(
            graph.variable_specs(), self._rehearsal.specs()
        )


def _metrics(
    graph: layer_graph.LayerGraph, state: dict[int, tf.Tensor]
) -> list[int]:
    return [i for i in state if graph.kinds[i] is Kind.METRIC]


def _are_open(sources: Sources) -> bool:
    """Whether no tensor of a tower's rows knows how many those are."""
    return all(
        not leaf.shape.rank or leaf.shape[0] is None for leaf in sources.own
    )


def judge_of(
    graph: layer_graph.LayerGraph,
    replay: Replay,
    sources: Sources,
) -> Judge:
    """Who knows what a tower was given, and what all towers share.

    Args:
      graph: the model.
      replay: what the tower computed.
      sources: what it is given.
    """
    kept = [sources.copies[i] for i in graph.row_states]
    rows = kept + all_towers.dealt()
    values: list[tf.Tensor] = []
    others: list[tf.Tensor] = []
    splits: list[tf.Tensor] = []
    for leaf in sources.own:
        if isinstance(leaf, tf.Tensor):
            rows.append(leaf)
        else:
            ragged = isinstance(leaf, tf.RaggedTensor)
            values.append(leaf.flat_values if ragged else leaf.values)
            others += boundary.tensors_of(leaf)
            if ragged and leaf.ragged_rank == 1:
                splits.append(leaf.row_splits)
    return Judge(
        rows, values, taken_as_same(replay), others, sources.drawn, splits
    )


def taken_as_same(replay: Replay) -> list[tf.Tensor]:
    """What counts as the same in all towers, whatever it is made of.

    Moments of a batch norm are the shard's, as its outputs are.
    """
    moments = [x for calls in replay.moments.values() for x in calls]
    statistics = [x for m in moments for x in (m.mean, m.variance)]
    return [*all_towers.shared(), *statistics]


def _rules(
    graph: layer_graph.LayerGraph,
    replay: Replay,
    state: dict[int, tf.Tensor],
    sources: Sources,
    metrics: Sequence[int],
) -> tuple[list[str], dict[int, str]]:
    judge, copies = judge_of(graph, replay, sources), sources.copies
    losses = [
        rule or _of_loss(judge.kind(loss))
        for rule, loss in zip(replay.regularized, replay.losses)
    ]
    rules = {i: _of_total(judge.change(state[i], copies[i])) for i in metrics}
    if UNKNOWN in rules.values():
        added = {i: "sum" for i in _of_rows(graph) if rules.get(i) == UNKNOWN}
        rules.update(added)
    return losses, rules


def _of_rows(graph: layer_graph.LayerGraph) -> list[int]:
    """Variables of Keras's own metrics that are given targets, row by row."""
    kept = [m for x in graph.layers for m in keras_layers.kept_metrics(x)]
    return [
        graph.index_of(v)
        for metric in [*kept, *tf.nest.flatten(graph.model)]
        if isinstance(metric, keras.metrics.Metric)
        and type(metric) not in (keras.metrics.Mean, keras.metrics.Sum)
        and keras_layers.is_keras_own(metric)
        and adds_up(metric) is not False
        for v in metric.variables
    ]


def _of_loss(kind: row_kinds.RowKind) -> str:
    if not isinstance(kind, OfRows):
        return _of_total(kind)
    if kind.axis == 0 and kind.power in (0, -1):
        return SHARES if kind.power else "concat"
    rule = _of_total(Total(True, kind.power))
    return {"sum": SUMMED, "mean": AVERAGED}.get(rule, UNKNOWN)


def _of_total(kind: row_kinds.RowKind) -> str:
    one = agreed([kind])
    if one == SAME:
        return "same"
    if not isinstance(one, Total):
        return UNKNOWN
    return {SUM: "sum", MEAN: "mean"}.get(one.as_sum, UNKNOWN)
