"""TowerGraph: a model as towers, what a builder hands out."""

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers import session_values
from towers.foreign import keras_layers, tf_functions
from towers.keras_model import checks
from towers.placement.device_names import few
from towers.verbs.handing_out import Promised

UNAPPLIED = (
    "Towers were built in training, and nobody has applied what they change"
)
_CURE = (
    "Call `apply_updates()` of the TowerGraph in each step, or read its `updates`; "
    "without, moving statistics stand still, and dropout masks are always the same."
)


class _WhenAsked:
    """An attribute whose tensors are made, if they are only promised, when asked."""

    def __get__(self, owner: Any, kind: Any) -> Sequence[tf.Tensor]:
        if owner is None:  # a default
            return ()
        values = vars(owner)["parameters"]
        return [x.kept() if isinstance(x, Promised) else x for x in values]

    def __set__(self, owner: Any, value: Sequence[Any]) -> None:
        vars(owner)["parameters"] = value


@dataclasses.dataclass(frozen=True)
class Tower:
    """One tower of a graph; in a `tower_fn`, what is known before it runs.

    Attributes:
      index: its place among the towers.
      device: where it runs.
      scope: its name scope, with a slash at the end.
      inputs: its true shard, maybe of 0 rows, on the input device.
      outputs: what its forward pass returned, on its device; for an empty
        shard, of one spare row.
      parameters: its copies of the model's trainable variables, in order. A table
        of which it looks rows up is read as a whole when you ask for these.
      layer_outputs: outputs of the layers asked for, by path.
    """

    index: int
    device: str
    scope: str
    inputs: Any
    outputs: Any = None
    parameters: _WhenAsked = _WhenAsked()
    layer_outputs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Tower {self.index} on {self.device}>"


class Pending:
    """What a step changes, which somebody is to apply; warns if nobody does.

    Attributes:
      pairs: (variable, merged value).
      is_read: whether somebody has read them.

    Args:
      pairs: those.
      is_value: whether they are eager values, which end with the last copy of
        their `TowerGraph`; else they end with the function that is being made.
    """

    def __init__(self, pairs: list[tuple[Any, tf.Tensor]], is_value: bool):
        self.pairs = pairs
        self.is_read = not pairs
        self._is_value = is_value
        if not is_value and not self.is_read:
            tf_functions.when_made(self._warn)

    def _warn(self) -> None:
        if not self.is_read:
            self.is_read = True
            names = [getattr(v, "path", v.name) for v, _ in self.pairs]
            warnings.warn(f"{UNAPPLIED}: {few(names)}. {_CURE}", stacklevel=2)

    def __del__(self) -> None:
        if self._is_value and not sys.is_finalizing():
            self._warn()

    def __deepcopy__(self, memo: Any) -> "Pending":
        return self


@dataclasses.dataclass(frozen=True)
class TowerGraph:
    """A model as towers.

    Attributes:
      outputs: gathered on the output device, like `model(inputs)`.
      towers: one `Tower` per device.
      rows: int32 [n_towers], the rows of each true shard.
      pending: holds `updates`.
      losses: scalars: `add_loss` and activity terms of the whole batch, then
        weight regularisers once.
      adders: of those that depend on the inputs, the layers that added them.
      variables: (the model's variable, the one that is read) for each of the
        model's. They differ in a `tf.compat.v1` graph.
    """

    outputs: Any
    towers: list[Tower]
    rows: tf.Tensor
    pending: Pending
    losses: list[tf.Tensor]
    adders: list[Any]
    variables: list[tuple[Any, Any]]

    def __repr__(self) -> str:
        devices = [tower.device for tower in self.towers]
        return (
            f"<TowerGraph: {len(devices)} towers on {few(devices)}; "
            f"{len(self.variables):,} variables, {len(self.pending.pairs):,} updates>"
        )

    @property
    def updates(self) -> list[tuple[Any, tf.Tensor]]:
        """(variable, merged value) for the state that a step changes.

        In a `tf.compat.v1` graph the variables are the graph's own.
        """
        self.pending.is_read = True
        return self.pending.pairs

    @property
    def n_input_losses(self) -> int:
        """How many of `losses` depend on the inputs."""
        return len(self.adders)

    def apply_updates(self) -> Any:
        """Assigns `updates` to the variables, each once, on its device.

        Returns:
          In a `tf.compat.v1` graph the list of ops that do it when they are
          run; the same are in the collection UPDATE_OPS already. Else None.
        """
        ops = [variable.assign(value) for variable, value in self.updates]
        return [op.op for op in ops] if checks.in_v1_graph() else None

    def copy_to_model(self, session: Any) -> None:
        """Gives the Keras model the values that a Session has trained.

        Args:
          session: a `tf.compat.v1.Session`, monitored or not, of this graph.

        Raises:
          RuntimeError: the towers read the model's own variables.
        """
        session_values.copy_to_model(self._twins("copy_to_model"), session)

    def copy_from_model(self, session: Any) -> None:
        """Gives a Session the values of the Keras model. Adds no ops.

        Args:
          session: a `tf.compat.v1.Session`, monitored or not, of this graph.

        Raises:
          RuntimeError: the towers read the model's own variables.
        """
        session_values.copy_from_model(self._twins("copy_from_model"), session)

    def _twins(self, name: str) -> list[tuple[Any, Any]]:
        if not all(
            keras_layers.raw(ours) is not theirs
            for ours, theirs in self.variables
        ):
            raise RuntimeError(
                f"{name} copies between a Keras model and a tf.compat.v1 "
                "graph, but these towers read the model's own variables. "
                "There is nothing to copy."
            )
        return self.variables
