"""keras_autocast: a read tells what it is cast to."""

import keras
import tensorflow as tf
from absl.testing import absltest

from towers.foreign.keras_autocast import half_here


class Told(keras.layers.Layer):
    """Notes what reads of its weights are said to be, and what they are."""

    def build(self, shape):
        self.k = self.add_weight(shape=(2,), name="k")
        self.full = self.add_weight(shape=(2,), autocast=False, name="full")

    def call(self, x):
        self.told = [
            (half_here(v) or v.value.dtype, v.value.dtype)
            for v in (self.k, self.full)
        ]
        return x


class AutocastTest(absltest.TestCase):
    def test_it_is_what_a_read_gives(self):
        for policy, read in (
            ("mixed_bfloat16", tf.bfloat16),
            ("mixed_float16", tf.float16),
            ("float32", tf.float32),
            ("bfloat16", tf.bfloat16),
        ):
            layer = Told(dtype=policy)
            layer(tf.ones([1, 2]))
            for words, is_so in layer.told:
                self.assertEqual(words, is_so)
            self.assertEqual(layer.told[0][0], read)

    def test_a_layer_of_full_width_inside_casts_nothing(self):
        inner = Told(dtype="float32")

        class Outer(keras.layers.Layer):
            def call(self, x):
                return inner(x)

        Outer(dtype="mixed_bfloat16")(tf.ones([1, 2]))
        self.assertEqual(inner.told, [(tf.float32, tf.float32)] * 2)

    def test_outside_of_layers_there_is_none(self):
        self.assertIsNone(half_here(keras.Variable([1.0, 2.0])))
