"""specs: what leaves of nests are, to TensorFlow: of so many rows, or of any number.

Here, below all others, as what `compile` made is built by specs, too.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

_ITS_OWN = object()  # the rows that a leaf has


def of(leaf: Any, rows: Any = _ITS_OWN) -> tf.TypeSpec | None:
    """The spec of a tensor, of a symbol of Keras or of a spec; None stays.

    Args:
      leaf: what has a first axis of rows, if any.
      rows: how many, or None for any number; if not given, those that it has.
    """
    if leaf is None:
        return None
    if isinstance(leaf, keras.KerasTensor):
        leaf = tf.TensorSpec(leaf.shape, leaf.dtype)
    is_spec = isinstance(leaf, tf.TypeSpec)
    spec = leaf if is_spec else tf.type_spec_from_value(leaf)
    if rows is _ITS_OWN or not spec.shape.rank:
        return spec
    return shaped(spec, [rows, *spec.shape[1:]])


def of_nest(nest: Any, divided: Sequence[bool]) -> Any:
    """A nest of specs, of any number of rows where leaves are divided by them."""
    flat = zip(tf.nest.flatten(nest), divided)
    return tf.nest.pack_sequence_as(
        nest, [of(x, None) if mine else of(x) for x, mine in flat]
    )


def shaped(spec: Any, shape: Any) -> Any:
    """A spec of the same kind, of another shape."""
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return type(spec)(shape, spec.dtype)


def filled(spec: Any, size: int) -> Any:
    """A spec whose axes of unknown size have this one."""
    return shaped(spec, [size if n is None else n for n in spec.shape])
