"""guards: what is looked for in the graph of a tower, beside the story.

Each looks for one thing that towers could get wrong, and does nothing for a model
that has it not: draws by seeds that are the same in all towers (`draws`), changes
of variables that are no model's (`held`), widths that rows tell (`row_widths`),
rows in another order (`row_order`), and how losses, metrics and other state become
one (`judged`, `shared_state`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.keras_model import (
    drawn_shapes,
    draws,
    judged,
    layer_graph,
    row_order,
    row_widths,
    shared_state,
)
from towers.keras_model.held import check_changes_nothing
from towers.keras_model.replay import Replay
from towers.keras_model.request import Request


class Guards:
    """What is looked for in the towers of one model.

    Args:
      graph: names the layers and the variables.
      divided: for each leaf of a shard whether it is of the tower's rows, or
        whole.
      request: what was asked for.
    """

    def __init__(
        self,
        graph: layer_graph.LayerGraph,
        divided: Sequence[bool],
        request: Request,
    ):
        self.divided = divided
        self._graph, self._request = graph, request
        self._judge = judged.OfTowers(graph, divided, request)

    def look_at_draws(
        self, copies: Sequence[tf.Tensor], shard: Any, is_compiled: bool
    ) -> draws.Look:
        """What a tower of many rows draws, looked at when one does."""

        def looked(tower_fn: Callable[..., Any] | None, anew: bool) -> Any:
            return drawn_shapes.of_many_rows(
                *(self._graph, copies, shard, self.divided),
                *(self._request, tower_fn, anew),
            )

        is_only = len(self._request.placement.devices) == 1
        return draws.Look(looked, is_compiled, is_only)

    def findings(
        self,
        scope: str,
        replay: Replay,
        aside: dict[str, Any],
        copies: Sequence[tf.Tensor],
        shard: Any,
        drawn: draws.Own,
    ) -> tuple[list[str], dict[str, Any]]:
        """Those of one tower, to be called in it.

        Args:
          scope: the tower's, with its slash.
          replay: what it computed.
          aside: its new state and moments.
          copies, shard: what it was given.
          drawn: its draws.

        Returns:
          A rule for each loss; and names without tensors, which are there in
          copies of a tower too.

        Raises:
          ValueError: the tower changes what all towers would.
        """
        graph = self._graph
        state, made = aside["state"], drawn.operations
        if drawn.place.index == 0:
            drawn.check(scope)
        if len(self._request.placement.devices) > 1:
            check_changes_nothing(made)
            row_widths.warn_of_hidden(
                graph,
                [replay.outputs, replay.losses, aside],
                [x for x in made if x.name.startswith(scope)],
                *(shard, self.divided),
            )
        shared = shared_state.shared_state(
            graph, state, copies, shard, self.divided, drawn.of_place
        )
        rules, metrics = self._judge.rules(
            replay, state, copies, shard, drawn.rows
        )
        unordered: Sequence[int] = ()
        if self._request.is_split:
            unordered = row_order.unordered(
                replay.outputs, shard, self.divided, copies
            )
        return rules, {
            "shared": dict.fromkeys(shared),
            "metrics": dict.fromkeys(metrics.items()),
            "unordered": dict.fromkeys(unordered),
        }

    def agreed(
        self,
        findings: Sequence[dict[str, Any]],
        copies: Sequence[tf.Tensor],
        shard: Any,
        rows_are_known: bool,
    ) -> dict[int, str]:
        """How state merges, by variable, where all towers' findings agree.

        "same" is all towers' alike; of a metric, "sum" or "mean".

        Args:
          findings: one per tower.
          copies, shard: what the first one is given.
          rows_are_known: whether towers know their numbers of rows.
        """
        shared = set.intersection(*(set(x["shared"]) for x in findings))
        if shared and rows_are_known and len(findings) > 1:
            shared &= self._judge.of_open_rows(copies, shard).shared
        metrics = set.intersection(*(set(x["metrics"]) for x in findings))
        return {**dict(metrics), **{i: "same" for i, _ in shared}}
