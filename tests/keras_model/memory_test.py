"""memory: an allocation that no machine can meet, in one tower, both ways."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import DEVICES

import towers

X = np.ones([6, 3], "float32")
X[2:4] = 9.0  # the second tower's
Y = np.ones([6, 2], "float32")


def greedy(x):
    """0, for which much memory is needed where a row is large."""
    columns = tf.where(tf.reduce_max(x) > 5, tf.constant(2**45, tf.int64), 1)
    rows = tf.shape(x, tf.int64)[0]
    return tf.reduce_sum(tf.zeros(tf.stack([rows, columns])))


@tf.custom_gradient
def greedy_backward(x):
    return tf.identity(x), lambda dy: dy + greedy(x)


@keras.saving.register_keras_serializable("memory_test")
class Greedy(keras.layers.Layer):
    def __init__(self, backward=False):
        super().__init__(name="greedy")
        self.backward = backward

    def call(self, x):
        return greedy_backward(x) if self.backward else x + greedy(x)


def model(backward=False, pins=None):
    inner = keras.Sequential([keras.Input([3]), Greedy(backward)], name="inner")
    layers = [
        keras.Input([3]),
        keras.layers.Dense(3, kernel_initializer="identity"),
        inner,
        keras.layers.Dense(2),
    ]
    placement = towers.Placement(
        [DEVICES[0], DEVICES[1], DEVICES[0]], layer_devices=pins
    )
    model = towers.TowerModel(keras.Sequential(layers), placement)
    model.compile("sgd", "mse")
    return model


def error_text(call):
    try:
        call()
    except tf.errors.ResourceExhaustedError as error:
        return str(error)
    return ""


# What is greedy takes it from the rows, and a test of towers is told so.
@pytest.mark.filterwarnings("ignore:.*greedy. takes a width:UserWarning")
class MemoryTest(parameterized.TestCase):
    @parameterized.parameters(
        lambda m: m.fit(X, Y, batch_size=6, shuffle=False, verbose=0),
        lambda m: m(X),
        lambda m: m.train_on_batch(X, Y),
        lambda m: m.evaluate(X, Y, verbose=0),
        lambda m: m.predict(X, verbose=0),
        lambda m: towers.build_towers(m.template, X, m.placement),
    )
    @pytest.mark.rare(after=1)
    def test_tower_device_and_layer(self, call):
        plain = error_text(lambda: call(model()))
        self.assertIn(
            "Tower 1 ran out of memory on /CPU:1, in the layer 'inner/greedy', "
            "for 281,474,976,710,656 bytes (float32[2, 35184372088832]). ",
            plain,
        )
        for help in ("weights", "keras.remat", "layer_devices", "smaller"):
            self.assertIn(help, plain)
        self.assertIn("OOM when allocating", plain)  # TensorFlow's own words

    @pytest.mark.rare
    def test_backward_and_pinned(self):
        m = model(True, {"inner/greedy": DEVICES[2]})
        self.assertStartsWith(
            error_text(lambda: m.train_on_batch(X, Y)),
            "Tower 1 ran out of memory on /CPU:2, in the layer 'inner/greedy', "
            "which is pinned there and not on the tower's /CPU:1, in its "
            "backward pass, for 281",
        )

    @pytest.mark.rare  # TensorFlow waits ten seconds for memory
    def test_functions_and_sessions(self):
        m = model()

        @tf.function
        def step(x):
            return towers.build_towers(m.template, x, m.placement).outputs

        self.assertStartsWith(error_text(lambda: step(X)), "Graph execution")
        result = error_text(lambda: towers.memory_errors(m.placement)(step)(X))
        self.assertStartsWith(result, "Tower 1 ran out of memory on /CPU:1, in")
        with tf.Graph().as_default():
            x = tf.compat.v1.placeholder(tf.float32, [None, 3])
            outputs = towers.build_towers(m.template, x, m.placement).outputs
            with tf.compat.v1.Session() as session:
                session.run(tf.compat.v1.global_variables_initializer())
                run = towers.memory_errors()(session.run)
                result = error_text(lambda: run(outputs, {x: X}))
        self.assertStartsWith(result, "Tower 1 ran out of memory on /CPU:1, in")
        with self.assertRaisesRegex(TypeError, "`placement`"):
            with towers.memory_errors(3):
                pass

    @pytest.mark.rare
    def test_what_is_of_no_tower_stays(self):
        with self.assertRaises(tf.errors.ResourceExhaustedError) as caught:
            with towers.memory_errors():
                tf.function(greedy)(tf.constant(X))
        self.assertNotIn("Tower", str(caught.exception))
        for message in ("[[{{node tower_1/a/b}}]]", "OOM when allocating"):
            mine = tf.errors.ResourceExhaustedError(None, None, message)
            with self.assertRaises(tf.errors.ResourceExhaustedError) as caught:
                with towers.memory_errors():
                    raise mine
            self.assertIs(caught.exception, mine)
