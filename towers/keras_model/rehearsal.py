"""rehearsal: a tower's call that is not run, and of which layers keep nothing."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.foreign import keras_layers, specs
from towers.keras_model import checks, row_order
from towers.keras_model.attributes import as_before
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.replay import Replay, replayed
from towers.keras_model.request import Request


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a tower calls, to be called once more in a graph that is never run.

    Attributes:
      graph: names the layers and the variables.
      shard: what the tower is given.
      divided: for each leaf of it whether it is of the tower's rows, or whole.
      request: what is asked for.
      tower_fn: what the tower calls, of the request, as it is called there.
    """

    graph: LayerGraph
    shard: Any
    divided: Sequence[bool]
    request: Request
    tower_fn: Callable[..., Any] | None

    def specs(self, rows: int | None = None) -> Any:
        """Of the shard, of so many rows; if not given, of any number."""
        if rows is None:
            return specs.of_nest(self.shard, self.divided)
        return row_order.specs_of(self.shard, self.divided, rows)

    def replay(
        self, values: Sequence[tf.Tensor], shard: Any, scope: str, **more: Any
    ) -> Replay:
        """What the tower computes, as `replayed` has it."""
        phase = self.request.training
        arguments = self.graph, values, shard, phase, scope, self.tower_fn
        return replayed(*arguments, **more)

    def run(
        self,
        call: Callable[[list[tf.Tensor], Any], None],
        rows: int | None = None,
        beside: Callable[
            [], contextlib.AbstractContextManager[None]
        ] = all_towers.alone,
    ) -> None:
        """Traces a call, of values and a shard, in a graph that is never run.

        What layers note in attributes and add as losses, and what it draws from
        the generators of Python and NumPy, is taken back. It is made in a thread
        of its own, as a layer may be in the middle of a call here, in a copy of
        that call's context.

        Args:
          call: which has a `replay`; to be called while the graph is `hooked`.
          rows: of the shard, and of what the model keeps for rows, or any number.
          beside: opens what other towers there are to it, see `all_towers`.

        Raises:
          Exception: whatever the user's layers raise, where they are built.
        """
        layers = self.graph.layers

        def traced() -> None:
            with beside(), as_before(layers):
                for layer in layers:
                    keras_layers.forget_added(layer)
                tf.function(call, autograph=False).get_concrete_function(
                    self.graph.variable_specs(rows), self.specs(rows)
                )

        checks.eagerly(keras_layers.carried(traced))
