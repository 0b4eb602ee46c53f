"""replicate: copies there, the sum of gradients back."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import Executed

from towers.verbs.replicate import replicate, total
from towers.verbs.rows import Rows


class ReplicateTest(absltest.TestCase):
    def test_gradients_are_summed_where_the_value_lives(self):
        value = tf.constant([1.0, 2.0, 3.0])

        @tf.function
        def run(value, rows):
            kept = Rows(rows, [False, True, True]).kept("/CPU:2")
            with tf.GradientTape() as tape:
                tape.watch(value)
                copies = replicate(value, "/CPU:2", kept)
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
        self.assertEqual(executed.devices("", "^AddV2$"), {"/CPU:2"})

    def test_integers_are_the_same_tensor(self):
        value = tf.constant([1, 2])
        copies = replicate(value, "/CPU:1", [None, None])
        self.assertTrue(all(copy is value for copy in copies))


class TotalTest(parameterized.TestCase):
    @parameterized.product(n=[1, 2, 5], dropped=[(), (0,), (0, 3), (1, 2, 4)])
    def test_it_is_the_sum_of_what_is_kept(self, n, dropped):
        terms = [
            tf.fill([2], np.nan if i in dropped else 2.0**i) for i in range(n)
        ]

        @tf.function
        def run(rows):
            kept = [rows[i] > 0 for i in range(n)]
            some = [
                None if i % 2 and i not in dropped else k
                for i, k in enumerate(kept)
            ]
            return total(terms, kept), total(terms, some)

        rows = tf.constant([int(i not in dropped) for i in range(n)])
        expected = sum(2.0**i for i in range(n) if i not in dropped)
        for result in run(rows):
            self.assertEqual(result.numpy().tolist(), [expected] * 2)

    @parameterized.named_parameters(("may_be_empty", True), ("full", False))
    def test_sums_are_executed_one_by_one(self, may_be_empty):
        @tf.function
        def run(x, rows):
            kept = [rows[i] > 0 if may_be_empty else None for i in range(4)]
            return total([tf.sin(x * i) for i in range(1, 5)], kept)

        x, rows = tf.ones([3]), tf.constant([1, 1, 0, 1])
        executed = Executed(lambda: run(x, rows))
        kinds = [node.op for _, _, node in executed.nodes]
        # An AddN of all would make TensorFlow simulate the graph's memory.
        self.assertNotIn("AddN", kinds)
        self.assertEqual(kinds.count("AddV2"), 3)
