"""replicate: copies there, the sum of gradients back."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from executed import Executed

from towers import replicate


class ReplicateTest(absltest.TestCase):
    def test_gradients_are_summed_where_the_value_lives(self):
        value = tf.constant([1.0, 2.0, 3.0])

        @tf.function
        def run(value, rows):
            kept = replicate.keep_flags(rows, [False, True, True], "/CPU:2")
            with tf.GradientTape() as tape:
                tape.watch(value)
                copies = replicate.replicate(value, "/CPU:2", kept)
                terms = []
                for i, copy in enumerate(copies):
                    with tf.device(f"/CPU:{i}"):
                        # 0 * NaN is NaN: what an empty tower says is dropped.
                        scale = tf.where(rows[i] > 0, i + 1.0, np.nan)
                        terms.append(tf.reduce_sum(copy * scale))
                loss = tf.add_n(terms)
            return tape.gradient(loss, value)

        rows = tf.constant([2, 0, 1])
        executed = Executed(lambda: run(value, rows))
        np.testing.assert_array_equal(run(value, rows), [4.0, 4.0, 4.0])
        self.assertEqual(executed.devices("", "^AddN$"), {"/CPU:2"})

    def test_integers_are_the_same_tensor(self):
        value = tf.constant([1, 2])
        copies = replicate.replicate(value, "/CPU:1", [None, None])
        self.assertTrue(all(copy is value for copy in copies))


if __name__ == "__main__":
    absltest.main()
