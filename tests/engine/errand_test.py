"""errand: what a function of all towers changes besides what it returns."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import close, placement

import towers

layers = keras.layers


class Taking(layers.Layer):
    """Calls all_towers as it is told."""

    needs_all_towers = True

    def __init__(self, ask):
        super().__init__(name="taking")
        self.ask = ask
        self.seed = keras.random.SeedGenerator(3)
        self.count = self.add_weight(name="count", trainable=False, shape=())
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        return x + self.ask(self, x)


def taking(ask):
    return keras.Sequential([keras.Input([3]), layers.Dense(3), Taking(ask)])


def build(ask, **kwargs):
    model = taking(ask)
    where, spec = placement(3, [2, 1, 1]), tf.TensorSpec([None, 3])

    @tf.function(autograph=False, input_signature=[spec])
    def run(x):
        graph = towers.build_towers(model, x, where, **kwargs)
        return graph.outputs, [value for _, value in graph.updates]

    return model, run.get_concrete_function()


def mean(v):
    return tf.reduce_mean(v, 0)


class ErrandTest(absltest.TestCase):
    def test_a_seed_that_the_function_draws_from_goes_on_in_all_towers(self):
        def ask(self, x):
            def drawn(v):
                noise = keras.random.normal([3], seed=self.seed)
                return mean(v) * 0.0 + noise

            one = towers.all_towers(drawn, x)
            return one + towers.all_towers(drawn, x) * 10.0 - x

        model, run = build(ask)
        x = tf.ones([7, 3])
        before = model.layers[-1].seed.state.numpy()
        outputs, (advanced,) = run(x)
        outputs = outputs.numpy()
        close(outputs, np.repeat(outputs[:1], 7, 0))
        self.assertGreater(np.std(outputs[0]), 1e-3)
        model(x)
        after = model.layers[-1].seed.state.numpy()
        self.assertFalse(np.array_equal(before, after))
        np.testing.assert_array_equal(advanced, after)

    def test_state_that_the_function_would_change_in_one_tower(self):
        def counted(self, x):
            def count(v):
                self.count.assign_add(tf.reduce_sum(v))
                return mean(v)

            return towers.all_towers(count, x)

        def normed(self, x):
            return towers.all_towers(
                lambda v: mean(self.norm(v, training=True)), x
            )

        for ask, name in ((counted, "count"), (normed, "moving_mean")):
            with self.assertRaisesRegex(ValueError, f"updates '.*{name}'"):
                build(ask, training=True)

    def test_a_loss_that_the_function_would_add_in_one_tower(self):
        def ask(self, x):
            def adding(v):
                self.add_loss(tf.reduce_mean(v))
                return mean(v)

            return towers.all_towers(adding, x)

        with self.assertRaisesRegex(ValueError, "let that return its loss"):
            build(ask)

    def test_a_gradient_for_a_weight_inside_of_a_tower(self):
        def ask(self, x):
            kernel = tf.ones([3])
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                y = towers.all_towers(lambda v: mean(v) * kernel, x)
            return tape.gradient(y, kernel)

        with self.assertRaisesRegex(RuntimeError, "by itself"):
            build(ask)
