"""keras_data: batches of a kind that Keras does not know, for its `fit`.

What `fit` is given becomes an adapter, of which it asks for something to loop over.
An instance of `DataAdapter` it takes as it is; that class, and what makes sample
weights of `class_weight`, have no public name. (A `tf.data.Dataset` of one's own
would have to have private methods of TensorFlow's.)
`keras_data_test.py` fails when one of them changes.
"""

from collections.abc import Callable, Iterable
from typing import Any

from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import (
    make_class_weight_map_fn,
)


class Epochs(DataAdapter):
    """Batches that Keras loops over, anew in each epoch.

    Args:
      batches: what is looped over.
      count: how many there are, or None.
      begin: called when an epoch begins.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        count: Callable[[], int | None],
        begin: Callable[[], None],
    ):
        self._batches = batches
        self._count = count
        self._begin = begin

    def get_tf_dataset(self) -> Iterable[Any]:
        return self._batches

    @property
    def num_batches(self) -> int | None:
        return self._count()

    @property
    def batch_size(self) -> None:
        return None

    @property
    def has_partial_batch(self) -> None:
        return None

    @property
    def partial_batch_size(self) -> None:
        return None

    def on_epoch_begin(self) -> None:
        self._begin()


def weighted_by_class(class_weight: dict[int, float]) -> Callable[..., Any]:
    """From the parts of a batch, (x, y), to (x, y, sample_weight), as in `fit`."""
    return make_class_weight_map_fn(class_weight)
