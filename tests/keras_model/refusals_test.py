"""refusals: who refuses an op is told with the layer, and what helps."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import chain, placement

import towers
from towers.keras_model.refusals import tower_errors

layers = keras.layers


class OnGpusOnly(layers.Layer):
    def call(self, x):
        state = tf.zeros([1, tf.shape(x)[0], 2])
        result = tf.raw_ops.CudnnRNN(
            input=x[None],
            input_h=state,
            input_c=state,
            params=tf.zeros([99]),
            is_training=False,
        )
        return tf.reshape(result.output, tf.shape(x))


class RefusalTest(absltest.TestCase):
    def test_the_layer_and_the_cure_are_told(self):
        inner = [layers.Dense(2), OnGpusOnly(name="fast")]
        model = chain([2], keras.Sequential(inner, name="inner"))
        x, where = np.ones([4, 2], "float32"), placement(2)
        towered = towers.TowerModel(model, where)
        for call in (
            lambda: towered.predict(x, verbose=0),
            lambda: towered(x),
            lambda: towers.build_towers(model, x, where),
        ):
            with self.assertRaisesRegex(
                tf.errors.InvalidArgumentError,
                '^(?s:.*)The layer .inner/fast. .*layer_devices={"inner/fast": ',
            ) as error:
                call()
            self.assertEqual(error.exception.message.count("has no kernel"), 1)
            self.assertIn("CudnnRNN", error.exception.message)

    def test_state_that_ends_with_a_loop(self):
        class Noisy(layers.Layer):
            def build(self, shape):
                self.seed = keras.random.SeedGenerator(1)

            def call(self, x):
                return tf.map_fn(lambda y: y + self.drawn(y), x)

            def drawn(self, y):
                return keras.random.normal([2], seed=self.seed)

        model = towers.TowerModel(chain([2], Noisy()), placement(1))
        with self.assertRaisesRegex(
            ValueError, "/noisy/.*state' is changed in a loop.* at once, and"
        ):
            model(np.ones([4, 2], "float32"))

    def test_as_a_strict_placement_says_it(self):
        words = (
            "Cannot assign a device for operation tower_1/enc/text/AsString: "
            "Could not satisfy explicit device specification '/device:GPU:1'"
        )
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "tower 1 .*enc/text.*(?s:.*)AsStr"
        ):
            with tower_errors():
                raise tf.errors.InvalidArgumentError(None, None, words)

    def test_other_errors_are_as_they_were(self):
        for words in ("Incompatible shapes", "operation split/x: Could not"):
            with self.assertRaisesRegex(
                tf.errors.InvalidArgumentError, f"^{words}"
            ):
                with tower_errors():
                    raise tf.errors.InvalidArgumentError(None, None, words)
