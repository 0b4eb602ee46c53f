"""reads: how a tower reads weights and inputs: how often, and through which cast.

A weight that is read once, and cast to a half dtype there, may come in that dtype,
and so may an input of which nothing else is taken: see `halves`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.keras_autocast import half_here
from towers.foreign.keras_layers import raw
from towers.foreign.tf_custom_gradients import Follower

_HALF = 2  # bytes
_SIZES = ("Shape", "ShapeN", "Size", "Rank")  # alike in any dtype


def is_wide(leaf: Any) -> bool:
    """Whether something is a dense tensor of floats, wider than half ones."""
    return (
        isinstance(leaf, tf.Tensor)
        and leaf.dtype.is_floating
        and leaf.dtype.size > _HALF
    )


class Misread(BaseException):
    """Ends a tower that reads otherwise than was seen before it was built.

    It passes what a layer catches, and Keras.
    """


class Reads:
    """Notes how one replay of a model reads its variables.

    Args:
      variables, values: as for `replay.Values`. Values of half their variables'
        width are those that are taken for such.
    """

    def __init__(self, variables: Sequence[Any], values: Sequence[tf.Tensor]):
        self._values = {id(v): x for v, x in zip(variables, values)}
        self._halves = {
            id(v): x.dtype
            for v, x in zip(variables, values)
            if x.dtype != raw(v).dtype
        }
        self._graph = tf.compat.v1.get_default_graph()
        self._dtypes: dict[int, list[tf.DType | None]] = {}
        self._is_aside = False
        self._beside: set[str] = set()  # ops

    def read(self, variable: Any, value: Any, follower: Follower | None) -> Any:
        """What a read gives: the value, if it is noted.

        Args:
          variable: what is read.
          value: what the scope has for it, or None.
          follower: knows of gradients that are taken there.

        Raises:
          Misread: it was to be read once, and through a cast.
        """
        if self._is_aside:
            full = raw(variable).dtype
            return value if value is None else tf.cast(value, full)
        is_plain = tf.compat.v1.get_default_graph() is self._graph and (
            follower is None or follower.is_idle
        )
        self.note(variable, half_here(variable) if is_plain else None)
        return value

    def note(self, variable: Any, dtype: tf.DType | None = None) -> None:
        """Notes a read; of no dtype if it is no plain one, through a cast."""
        dtypes = self._dtypes.setdefault(id(variable), [])
        dtypes.append(dtype)
        half = self._halves.get(id(variable))
        if half is not None and dtypes != [half]:
            raise Misread

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While open, reads are none of the tower's, and of the full width."""
        before = len(self._graph.get_operations())
        self._is_aside = True
        yield
        self._is_aside = False
        ops = self._graph.get_operations()[before:]
        self._beside = {op.name for op in ops}

    def halves(
        self, variables: Sequence[Any], follower: Follower | None
    ) -> dict[int, tf.DType]:
        """By place, the dtype of what is read once, and cast to that.

        Raises:
          Misread: a backward pass may read what was to be read once.
        """
        dtypes: dict[int, tf.DType] = {}
        if follower is not None and follower.is_opaque:
            if self._halves:
                raise Misread
            return dtypes
        for k, variable in enumerate(variables):
            reads = self._dtypes.get(id(variable), [])
            if (
                len(reads) == 1
                and reads[0]
                and self.is_cast(variable, reads[0])
            ):
                dtypes[k] = reads[0]
        return dtypes

    def input_halves(
        self,
        leaves: Sequence[Any],
        results: Sequence[Any],
        follower: Follower | None,
    ) -> dict[int, tf.DType]:
        """By place, the half dtype to which all that takes an input casts it.

        Args:
          leaves: what the tower is given.
          results: what it returns, in which an input may be as it is.
          follower: knows of gradients that are taken there.
        """
        if follower is not None and follower.is_opaque:
            return {}
        dtypes = {}
        for k, leaf in enumerate(leaves):
            if not is_wide(leaf) or any(leaf is x for x in results):
                continue
            takers = [op for op in leaf.consumers() if op.type not in _SIZES]
            casts = {
                op.outputs[0].dtype if op.type == "Cast" else None
                for op in takers
            }
            dtype = casts.pop() if len(casts) == 1 else None
            if dtype is not None and dtype.is_floating and dtype.size == _HALF:
                dtypes[k] = dtype
        return dtypes

    def is_cast(self, variable: Any, dtype: tf.DType) -> bool:
        """Whether nothing takes the value but one cast."""
        takers = self._values[id(variable)].consumers()
        takers = [op for op in takers if op.name not in self._beside]
        return (
            len(takers) == 1
            and takers[0].type == "Cast"
            and takers[0].outputs[0].dtype == dtype
        )
