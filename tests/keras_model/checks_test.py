"""checks: what towers can be made of."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import cnn, make

import towers
from towers.foreign import keras_layers
from towers.keras_model import checks
from towers.keras_model.signature import input_signature


class ChecksTest(absltest.TestCase):
    def test_a_keras_2_model_is_refused_by_name(self):
        other = type("Model", (), {"__module__": "tf_keras.src.engine"})
        with self.assertRaisesRegex(TypeError, "Keras 2"):
            checks.check_model(other())

    def test_a_layer_is_refused_with_what_to_write(self):
        with self.assertRaisesRegex(
            TypeError, r"keras.Sequential\(\[layer\]\)"
        ):
            checks.check_model(keras.layers.Dense(1))
        checks.check_model([make(cnn), keras.metrics.Mean()], nested=True)

    def test_a_model_is_built_outside_of_any_graph(self):
        model = keras.Sequential([keras.layers.Dense(2)])
        self.assertFalse(keras_layers.is_built(model))

        @tf.function
        def build(x):
            checks.ensure_built(model, x)
            return x

        build(np.ones([3, 4], "float32"))
        self.assertTrue(keras_layers.is_built(model))
        self.assertEqual(input_signature(model).shape, (None, 4))
        self.assertFalse(tf.is_symbolic_tensor(model.weights[0].value.handle))

    def test_a_row_alone_is_told_from_a_batch(self):
        """Of one number each, rows are a batch to Keras, and here."""
        model, where = make(cnn), towers.Placement(["/CPU:0", "/CPU:1"])
        x = np.ones([4, *model.input_shape[1:]], "float32")
        y = np.ones([4, *model.output_shape[1:]], "float32")
        rows = tf.data.Dataset.from_tensor_slices((x, y))
        for way in ("auto", True):
            wrapped = towers.TowerModel(model, where, loss_on_towers=way)
            wrapped.compile("sgd", "mse")
            with self.assertRaisesRegex(ValueError, "is a row alone"):
                wrapped.fit(rows, verbose=0)
        with self.assertRaisesRegex(ValueError, "is a row alone"):
            towers.build_towers(model, x[0], where)
        one = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        outputs = towers.build_towers(one, np.ones([4], "float32"), where)
        self.assertEqual(outputs.outputs.shape, (4, 1))

    def test_a_graph_can_look_out(self):
        with tf.Graph().as_default():
            self.assertTrue(checks.eagerly(tf.executing_eagerly))
            self.assertFalse(tf.executing_eagerly())
