"""tf_iterators: an iterator of a dataset, begun anew.

A function keeps the iterator that it was traced with, and TensorFlow's public way
to begin anew is to make another one. The op that it is begun with can be run
again; but the iterator's resource has no public name, `_iterator_resource`.
"""

from typing import Any

import tensorflow as tf


def restart(iterator: Any, dataset: tf.data.Dataset) -> None:
    """Begins anew, in eager code, on the device of both."""
    tf.raw_ops.MakeIterator(
        dataset=tf.data.experimental.to_variant(dataset),
        iterator=iterator._iterator_resource,
    )
