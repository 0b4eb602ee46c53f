"""layer_graph: the private names of Keras that it leans on."""

import keras
import tensorflow as tf
from absl.testing import absltest


class LayerGraphTest(absltest.TestCase):
    def test_keras_still_has_the_private_names(self):
        layer = keras.layers.BatchNormalization()
        layer.build([None, 3])
        self.assertTrue(callable(layer._flatten_layers))
        model = keras.Model()
        model.compile(metrics=["mae"])
        model.seen = keras.metrics.Mean()
        self.assertEqual(model._metrics, [model.seen])
        variable = layer.moving_mean
        self.assertIsInstance(variable._value, tf.Variable)
        self.assertIsInstance(variable._value._unique_id, str)
        generator = keras.random.SeedGenerator(0)
        self.assertEqual(generator.state.name, "seed_generator_state")


if __name__ == "__main__":
    absltest.main()
