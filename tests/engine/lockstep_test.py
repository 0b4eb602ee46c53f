"""lockstep: towers that are built side by side have the gradients of each."""

import tensorflow as tf
from absl.testing import absltest
from executed import Executed

from towers.engine import lockstep
from towers.engine.boundary import Task


def squares_of_sines(x, scale=None):
    """Two towers that meet nowhere, and the gradients of what they say."""
    devices = ["/CPU:1", "/CPU:2"]
    tensors = [x[:2], x[2:]]

    def tower(argument):
        result = tf.sin(argument["x"]) ** 2
        return [result if scale is None else result * scale(), None]

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = lockstep.run_in_step(
            [Task(tower, d, {"x": x}) for d, x in zip(devices, tensors)], list
        )
        total = tf.add_n(
            [tf.reduce_sum(y) * (i + 1) for i, (y, _) in enumerate(outputs)]
        )
    return [y for y, _ in outputs], tape.gradient(total, tensors)


class InStepTest(absltest.TestCase):
    def test_each_tower_has_its_own_gradient_on_its_device(self):
        run = tf.function(squares_of_sines, autograph=False)
        x = tf.random.normal([5])
        executed = Executed(lambda: run(x))
        outputs, gradients = run(x)
        y = tf.sin(x) ** 2
        slope = 2 * tf.sin(x) * tf.cos(x)
        self.assertAllClose(outputs, [y[:2], y[2:]])
        self.assertAllClose(gradients, [slope[:2], 2 * slope[2:]])
        for op in ("Sin", "Cos"):
            self.assertEqual(
                executed.devices("", f"^{op}$"), {"/CPU:1", "/CPU:2"}
            )

    def assertAllClose(self, actual, expected):
        for a, e in zip(actual, expected, strict=True):
            self.assertLess(abs(a - e).numpy().max(), 1e-6)

    def test_a_gradient_that_would_be_lost_is_refused(self):
        @tf.function(autograph=False)
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                double = 2 * x[0]
                squares_of_sines(x, scale=lambda: double)

        with self.assertRaisesRegex(ValueError, "gradient would be lost"):
            run(tf.ones([5]))
