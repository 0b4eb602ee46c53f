"""attached: the private names of Keras for a mask and for logits."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import keras_layers


class AttachedTest(absltest.TestCase):
    def test_keras_still_has_the_private_names(self):
        masked = keras.layers.Masking()(np.zeros([1, 2, 3], "float32"))
        self.assertEqual(keras_layers.get_mask(masked).shape, [1, 2])

    def test_losses_take_the_logits_that_are_attached(self):
        logits = tf.constant([[200.0, -200.0]])
        probabilities = tf.nn.softmax(logits)
        keras_layers.set_notes(
            probabilities, [{"logits": logits, "mask": None}]
        )
        loss = keras.losses.categorical_crossentropy(
            [[0.0, 1.0]], probabilities
        )
        self.assertAlmostEqual(float(loss[0]), 400.0, places=3)

    def test_logits_are_found_in_a_graph(self):
        @tf.function
        def run(x):
            for function in (tf.nn.softmax, tf.nn.sigmoid):
                y = function(x)
                (note,) = keras_layers.get_notes(y)
                self.assertIs(note["logits"], x)
            return keras_layers.activation(x)

        self.assertIsNone(run(tf.ones([2, 3])))


if __name__ == "__main__":
    absltest.main()
