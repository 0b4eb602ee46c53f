"""forward: a function there and back on one device."""

import tensorflow as tf
from absl.testing import absltest
from executed import Executed

from towers.engine.boundary import Task
from towers.engine.forward import run_towers


class ForwardTest(absltest.TestCase):
    def test_the_backward_pass_stays_on_the_device(self):
        weights = tf.random.normal([4, 4])

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                (y,) = run_towers(
                    [
                        Task(
                            lambda a: {"tower_1": tf.matmul(a[0], weights)},
                            "/CPU:1",
                            (x, None),
                        )
                    ]
                )
                loss = tf.reduce_sum(y["tower_1"])
            return loss, tape.gradient(loss, x)

        x = tf.ones([2, 4])
        executed = Executed(lambda: run(x))
        self.assertEqual(executed.devices("", "MatMul"), {"/CPU:1"})
        expected = tf.matmul(tf.ones([2, 4]), weights, transpose_b=True)
        self.assertLess(abs(run(x)[1] - expected).numpy().max(), 1e-5)

    def test_a_result_without_a_gradient_is_not_differentiated(self):
        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                (y,) = run_towers(
                    [Task(lambda a: [tf.exp(a), tf.tanh(a)], "/CPU:1", x)]
                )
                loss = tf.reduce_sum(y[0]) + 0.0 * tf.stop_gradient(y[1][0])
            return tape.gradient(loss, x)

        x = tf.constant([0.5, 1.5])
        executed = Executed(lambda: run(x))
        self.assertEmpty(executed.devices("", "TanhGrad"))
        self.assertLen(executed.sends(), 1)  # x, and no zeros
        self.assertLess(abs(run(x) - tf.exp(x)).numpy().max(), 1e-6)

    def test_all_results_of_a_function_that_is_differentiated_later(self):
        @tf.function
        def inner(x):
            (y,) = run_towers(
                [Task(lambda a: [tf.exp(a), tf.sin(a)], "/CPU:1", x)]
            )
            return y

        x = tf.constant([0.5, 1.5])
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            a, b = inner(x)
        for y, expected in ((a, tf.exp(x)), (b, tf.cos(x))):
            gradients = tape.gradient(y, x)
            self.assertLess(abs(gradients - expected).numpy().max(), 1e-6)
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forwards:
            b = tf.function(inner)(x)[1]
        self.assertLess(abs(forwards.jvp(b) - tf.cos(x)).numpy().max(), 1e-6)
