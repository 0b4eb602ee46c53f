"""average_gradients: by rows, sparse ones stay sparse."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import towers


class AverageGradientsTest(parameterized.TestCase):
    @parameterized.parameters((None, 3.0), ([3, 1], 2.0), ([0, 5], 5.0))
    def test_dense(self, rows, expected):
        first = np.nan if rows == [0, 5] else 1.0
        (mean, none) = towers.average_gradients(
            [[tf.constant(first), None], [tf.constant(5.0), None]], rows
        )
        self.assertEqual(mean.numpy(), expected)
        self.assertIsNone(none)

    def test_sparse_stays_sparse(self):
        def slices(value, index):
            return tf.IndexedSlices(
                tf.constant([[value]]),
                tf.constant([index]),
                tf.constant([4, 1]),
            )

        (mean,) = towers.average_gradients(
            [[slices(2.0, 1)], [slices(4.0, 3)]], rows=[1, 3]
        )
        self.assertIsInstance(mean, tf.IndexedSlices)
        dense = tf.convert_to_tensor(mean).numpy().ravel()
        np.testing.assert_allclose(dense, [0, 0.5, 0, 3])

    @parameterized.parameters(([],), ([[1.0], []],))
    def test_bad_lists_are_refused(self, gradients):
        with self.assertRaisesRegex(ValueError, "one list per tower"):
            towers.average_gradients(gradients)

    def test_a_nest_is_refused(self):
        with self.assertRaisesRegex(TypeError, "got dicts"):
            towers.average_gradients([{"a": tf.constant(1.0)}] * 2)

    def test_bad_rows_are_refused(self):
        with self.assertRaisesRegex(ValueError, "`rows`"):
            towers.average_gradients([[tf.constant(1.0)]], rows=[1, 2])
