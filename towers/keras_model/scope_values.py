"""scope_values: what a `keras.StatelessScope` of the caller's has for variables.

Towers that are called in one read its values, and what they would assign goes
there. In eager code, where a graph of towers has a life of its own, the values are
among its arguments.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_layers


class ScopeValues:
    """The values that are given here and now in the place of variables.

    Attributes:
      is_open: whether there is a scope; it may have no values yet.
      key: what is equal where values of the same variables are given.
      values: them.
    """

    def __init__(self) -> None:
        scope = keras_layers.scope_here()
        mapping = {} if scope is None else dict(scope.state_mapping)
        self.is_open = scope is not None
        self.key = tuple(mapping) if self.is_open else None
        self.values = list(mapping.values())

    def of(self, variable: Any) -> tf.Tensor | None:
        """The value that is given for a variable."""
        scope = keras_layers.scope_here()
        return None if scope is None else scope.get_current_value(variable)

    @contextlib.contextmanager
    def again(self, values: Sequence[tf.Tensor]) -> Iterator[None]:
        """While open, the same are given, as tensors of another graph."""
        if self.key is None:
            yield
            return
        scope = keras.StatelessScope()
        # Not by its argument, of which it might cast the dtype.
        scope.state_mapping.update(zip(self.key, values))
        with scope:
            yield
