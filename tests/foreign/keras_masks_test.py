"""Masks that attention takes from its inputs are gone from what was given, too."""

import keras
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import keras_layers
from towers.foreign.keras_masks import forget_masks


class KerasMasksTest(absltest.TestCase):
    def test_what_a_layer_took_from_a_copy_is_gone(self):
        layer = keras.layers.Embedding(3, 2, mask_zero=True)
        first, second = layer(tf.constant([[1, 0]])), layer(tf.constant([[1]]))
        copies = [tf.identity(first), tf.identity(second)]
        keras_layers.set_mask(copies[1], keras_layers.get_mask(second))
        forget_masks(
            {"a": first, "b": [second, 3]},
            {"a": copies[0], "b": [copies[1], 3]},
        )
        self.assertIsNone(keras_layers.get_mask(first))
        self.assertIsNotNone(keras_layers.get_mask(second))
