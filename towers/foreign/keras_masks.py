"""keras_masks: masks that a layer takes away from what it is given.

Keras has no public word for the mask of a tensor (`_keras_mask`).
`keras_masks_test.py` fails when that changes.
"""

from typing import Any

import tensorflow as tf

from towers.foreign.keras_layers import get_mask


def forget_masks(nest: Any, copies: Any) -> None:
    """Takes from tensors the masks that a layer took from copies of them.

    Attention does that, so that nobody after it goes by the mask of its inputs.

    Args:
      nest: of tensors and other values.
      copies: the nest that the layer was called with.
    """
    pairs = zip(tf.nest.flatten(nest), tf.nest.flatten(copies))
    for one, other in pairs:
        if get_mask(one) is not None and get_mask(other) is None:
            one._keras_mask = None
