"""row_tables: tables of which a step reads rows, and never all.

TensorFlow copies a variable that it updates sparsely whenever that is read as a
whole. So a tower gets a stand-in for a table, which has no rows, and the sparse
gradients of the table; what it looks up is gathered where the table lives.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient
from towers.keras_model.reads import Misread


def rows(stand_in: tf.Tensor, variable: tf.Variable, ids: tf.Tensor) -> Any:
    """Rows of a table, read where it lives.

    Args:
      stand_in: what the tower has of it; to this the gradients go.
      variable: the table, [rows, width].
      ids: whole numbers of any shape.

    Returns:
      A tensor [*ids.shape, width].
    """
    shape = variable.shape

    @own_gradient
    def gathered(_: tf.Tensor, ids: tf.Tensor) -> Any:
        result = tf.raw_ops.ResourceGather(
            resource=variable.handle, indices=ids, dtype=variable.dtype
        )
        result.set_shape([*ids.shape, shape[1]])
        here = tf.compat.v1.get_default_graph()
        first = [] if here.building_function else [result.op]

        def backward(upstream: tf.Tensor) -> Any:
            # In a graph of tf.compat.v1 nothing else has it before the update.
            with tf.control_dependencies(first):
                values = tf.reshape(upstream, [-1, shape[1]])
            where = tf.reshape(ids, [-1])
            return tf.IndexedSlices(values, where, tf.constant([*shape])), None

        return result, backward

    return gathered(stand_in, ids)


class Tables:
    """How one replay of a model reads its tables: by rows, or as a whole.

    Args:
      tables: all of them, pieces of some too.
      layers: by the ids of layers that look rows up, the whole tables that they have.
      variables: by the ids of tables the variables to read; None only looks on.

    Attributes:
      whole: the ids of tables that something else read, or that were looked up in
        another way than can be done by rows.
    """

    def __init__(
        self,
        tables: Sequence[keras.Variable],
        layers: Mapping[int, keras.Variable],
        variables: Mapping[int, tf.Variable] | None,
    ):
        self._tables, self._layers = tables, layers
        self._variables = variables
        self._ids = {id(table) for table in tables}
        self._expected: keras.Variable | None = None
        self.whole: set[int] = set()

    def note(self, variable: Any) -> None:
        """Notes that something reads a variable.

        Raises:
          Misread: it is a table that was to be read by rows only.
        """
        if id(variable) in self._ids and variable is not self._expected:
            self.whole.add(id(variable))
            if self._variables is not None:
                raise Misread

    def call(
        self, layer: Any, original: Callable[..., Any], notes: Any
    ) -> Callable[..., Any]:
        """What a layer is to compute: its call, or the rows of its table.

        Args:
          layer: any.
          original: its call.
          notes: those of the replay.
        """
        table = self._layers.get(id(layer))
        if table is None or not notes.is_outright:
            return original

        def looked_up(*args: Any, **kwargs: Any) -> Any:
            (ids,) = args if args else kwargs.values()
            if not isinstance(ids, tf.Tensor):
                return original(ids)
            with self._looking(table):
                if self._variables is None:
                    return original(ids)
                stand_in = tf.convert_to_tensor(table)
            return _embedded(layer, stand_in, self._variables[id(table)], ids)

        return looked_up

    def rows(
        self, table: keras.Variable, ids: tf.Tensor, notes: Any
    ) -> tf.Tensor | None:
        """Rows of a table, or of a piece of one; None if it is read whole.

        Args:
          table: any.
          ids: whole numbers of any shape, none below 0.
          notes: those of the replay.
        """
        if id(table) not in self._ids or not notes.is_outright:
            return None
        with self._looking(table):
            stand_in = tf.convert_to_tensor(table)
        if self._variables is None:
            return tf.gather(stand_in, ids)
        return rows(stand_in, self._variables[id(table)], ids)

    def end(self, is_opaque: bool) -> None:
        """To be called after the replay.

        Args:
          is_opaque: whether a backward pass may read what the replay has not.

        Raises:
          Misread: as `note` does.
        """
        for table in self._tables if is_opaque else ():
            self.note(table)

    @contextlib.contextmanager
    def _looking(self, table: keras.Variable) -> Iterator[None]:
        """While open, a read of the table is that of its lookup."""
        self._expected = table
        try:
            yield
        finally:
            self._expected = None


def _embedded(
    layer: keras.layers.Embedding,
    stand_in: tf.Tensor,
    variable: tf.Variable,
    ids: tf.Tensor,
) -> tf.Tensor:
    """As `Embedding.call`, and `keras.ops.take` in that, have it."""
    if ids.dtype not in (tf.int32, tf.int64):
        ids = tf.cast(ids, tf.int32)
    count = tf.cast(variable.shape[0], ids.dtype)
    ids = tf.where(ids < 0, ids + count, ids)
    return tf.cast(rows(stand_in, variable, ids), layer.compute_dtype)
