"""errand: what one tower computes for all of them, while the others wait."""

import contextvars
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.engine import closure
from towers.foreign import tf_autograph
from towers.foreign.patches import bound

_errand: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "errand", default=None
)


@dataclasses.dataclass
class Errand:
    """A function of whole values, to be run where a tower reads its weights.

    Attributes:
      function: of the values, and of what is shared.
      values: those of all towers.
      shared: what is not joined; None for nothing.
      asked: the name scope in which the tower called `all_towers`.
      device, scope: where the function runs.
      seeds: for each seed that it draws from, that and what it was before.
      steps: for each of those, that and how far it went.
    """

    function: Callable[..., Any]
    values: Any
    shared: Any
    asked: str
    device: str
    scope: str
    seeds: list[tuple[Any, tf.Tensor]] = dataclasses.field(default_factory=list)
    steps: list[tuple[Any, tf.Tensor]] = dataclasses.field(default_factory=list)

    def result(self, ownership: closure.Ownership) -> Any:
        """Runs the function, in the tower's thread.

        Args:
          ownership: of the tower's tensors.

        Raises:
          ValueError: the function takes what depends on the tower's rows.
        """
        with (
            bound(_errand, self),
            tf.device(None),
            tf.device(self.device),
            tf.name_scope(self.scope),
        ):
            result = closure.applied(
                lambda: users_result(self.function, self.values, self.shared),
                self.values,
                self.shared,
                ownership,
                self.asked,
                lambda: {before.name for _, before in self.seeds},
            )
            self.steps += [
                (seed, seed.value - before) for seed, before in self.seeds
            ]
            return result


def users_result(function: Callable[..., Any], values: Any, shared: Any) -> Any:
    """The user's function of values, and of what is shared if that is given."""
    call = tf_autograph.converted(function)
    if shared is None:
        return call(*values)
    try:
        named = "shared" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a built-in one
        named = False
    if named:
        return call(*values, shared=shared)
    return call(*values, shared)


def is_run() -> bool:
    """Whether what is built is the function of a call of `all_towers`."""
    return _errand.get() is not None


def note_draw(seed: Any, before: tf.Tensor) -> None:
    """Notes that the function of an errand draws from a seed.

    Args:
      seed: a Keras variable.
      before: its value in the tower, before the draw.
    """
    seeds = _errand.get().seeds
    if all(seed is not other for other, _ in seeds):
        seeds.append((seed, before))
