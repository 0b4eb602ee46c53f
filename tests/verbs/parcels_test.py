"""parcels: what is small crosses in one tensor, there and back."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized

import towers
from towers.verbs.parcels import is_small, parcelled, replicate_together
from towers.verbs.rows import Rows

TARGETS = ["/CPU:1", "/CPU:2", "/CPU:3"]


def run(use, values, rows=(1, 1, 1), ways=()):
    """Gradients of a loss that towers make of their copies, and the report."""

    @tf.function(autograph=False)
    def step(rows, *values):
        kept = Rows(rows, [True] * 3).kept("/CPU:0")
        with tf.GradientTape() as tape:
            tape.watch(values)
            copies = replicate_together(values, "/CPU:0", TARGETS, kept)
            losses = []
            for i, device in enumerate(TARGETS):
                with tf.device(device):
                    losses.append(use(i, [column[i] for column in copies]))
            with tf.device("/CPU:0"):
                loss = tf.add_n([x for x in losses if x is not None])
        said = tape.gradient(loss, values)
        kinds.append([type(g).__name__ for g in said])
        return [tf.convert_to_tensor(g) for g in said if g is not None]

    kinds = []
    with tf.device("/CPU:0"):
        values = [tf.identity(v) for v in values]
    rows = tf.constant(rows)
    report = towers.execution_report(step, rows, *values)
    return step(rows, *values), kinds[-1], report


class ReplicateTest(parameterized.TestCase):
    VALUES = [
        tf.constant([[1.0, 2.0], [3.0, 4.0]]),
        tf.constant([5.0]),
        tf.constant(6.0),
    ]

    def test_one_tensor_there_and_one_back(self):
        def use(i, values):
            return sum(tf.reduce_sum(v**2) for v in values) * (i + 1.0)

        said, _, report = run(use, self.VALUES)
        for gradient, value in zip(said, self.VALUES):
            np.testing.assert_array_equal(gradient, 12 * value)
        parcels = [t for t in report.transfers if t.shape == (6,)]
        self.assertLen([t for t in parcels if t.source == "/CPU:0"], 3)
        self.assertLen([t for t in parcels if t.target == "/CPU:0"], 3)

    def test_towers_without_rows_say_nothing(self):
        def use(i, values):
            return tf.reduce_sum(values[0] * (np.nan if i == 1 else 1.0 + i))

        said, *_ = run(use, self.VALUES, [1, 0, 1])
        np.testing.assert_array_equal(said[0], 4 * np.ones([2, 2]))

    def test_what_is_not_used_has_no_gradient(self):
        def use(i, values):
            return tf.reduce_sum(values[i % 2]) if i < 2 else None

        said, kinds, _ = run(use, self.VALUES)
        self.assertEqual(kinds[2], "NoneType")
        self.assertLen(said, 2)
        for gradient in said:
            np.testing.assert_array_equal(gradient, tf.ones_like(gradient))

    def test_sparse_gradients_stay_sparse(self):
        def use(i, values):
            rows = tf.gather(values[0], [i % 2])
            return tf.reduce_sum(rows) * values[2] * (1.0 + i)

        said, kinds, _ = run(use, self.VALUES)
        self.assertEqual(kinds[0], "IndexedSlices")
        np.testing.assert_array_equal(said[0], [[24, 24], [12, 12]])
        self.assertEqual(float(said[1]), 3 * 4 + 7 * 2)

    def test_derivatives_forwards(self):
        values = [v.numpy() for v in self.VALUES]

        @tf.function(autograph=False)
        def forwards(*values):
            ones = tuple(tf.ones_like(v) for v in values)
            with tf.autodiff.ForwardAccumulator(values, ones) as accumulator:
                copies = replicate_together(
                    values, "/CPU:0", TARGETS, [None] * 3
                )
                y = sum(
                    tf.reduce_sum(c**3) for column in copies for c in column
                )
            return accumulator.jvp(y)

        expected = 9 * sum((v**2).sum() for v in values)
        self.assertEqual(forwards(*values), expected)

    def test_gradients_forwards(self):
        """A Hessian times a vector: of no towers' own, but of what they sum."""
        values = [v.numpy() for v in self.VALUES]

        @tf.function(autograph=False)
        def forwards(*values):
            ones = tuple(tf.ones_like(v) for v in values)
            with tf.autodiff.ForwardAccumulator(values, ones) as accumulator:
                with tf.GradientTape() as tape:
                    tape.watch(values)
                    copies = replicate_together(
                        values, "/CPU:0", TARGETS, [None] * 3
                    )
                    y = sum(
                        tf.reduce_sum(c**3) for column in copies for c in column
                    )
                gradients = tape.gradient(y, values)
            return accumulator.jvp(gradients)

        for value, said in zip(values, forwards(*values)):
            np.testing.assert_allclose(said, 18 * value)


class ParcelledTest(absltest.TestCase):
    def test_each_tower_s_own(self):
        @tf.function
        def run():
            with tf.device("/CPU:0"):
                seeds = [
                    [tf.constant([i, k]) for i in range(2)] for k in (3, 4)
                ]
            columns = parcelled(seeds, "/CPU:0", TARGETS[:2], TARGETS[:2])
            return columns

        self.assertEqual(
            [[x.numpy().tolist() for x in column] for column in run()],
            [[[0, 3], [1, 3]], [[0, 4], [1, 4]]],
        )

    def test_what_is_small(self):
        self.assertTrue(is_small(tf.zeros([16, 1024])))
        self.assertFalse(is_small(tf.zeros([17, 1024])))
        self.assertFalse(is_small(tf.constant("text")))
