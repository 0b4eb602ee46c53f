"""forward: a function there and back on one device."""

import tensorflow as tf
from absl.testing import absltest
from executed import Executed

from towers.engine.forward import run_towers


class ForwardTest(absltest.TestCase):
    def test_the_backward_pass_stays_on_the_device(self):
        weights = tf.random.normal([4, 4])

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                (y,) = run_towers(
                    [lambda a: {"tower_1": tf.matmul(a[0], weights)}],
                    ["/CPU:1"],
                    [(x, None)],
                )
                loss = tf.reduce_sum(y["tower_1"])
            return loss, tape.gradient(loss, x)

        x = tf.ones([2, 4])
        executed = Executed(lambda: run(x))
        self.assertEqual(executed.devices("", "MatMul"), {"/CPU:1"})
        expected = tf.matmul(tf.ones([2, 4]), weights, transpose_b=True)
        self.assertLess(abs(run(x)[1] - expected).numpy().max(), 1e-5)


if __name__ == "__main__":
    absltest.main()
