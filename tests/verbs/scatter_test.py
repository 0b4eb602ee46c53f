"""scatter: rows of ragged and sparse tensors, taken apart and joined again."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from models import placement

import towers


class DealTest(parameterized.TestCase):
    @parameterized.parameters(0, 1, 4, 7)
    def test_ragged_and_sparse_rows_are_joined_again(self, rows):
        rng = np.random.default_rng(rows)
        lengths = rng.integers(0, 4, rows)
        values = rng.normal(size=lengths.sum())
        ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
        dense = rng.integers(0, 3, [rows, 5])
        sparse = tf.sparse.from_dense(dense)
        # Entries in any order are a sparse tensor, too.
        order = rng.permutation(len(sparse.values))
        sparse = tf.SparseTensor(
            tf.gather(sparse.indices, order),
            tf.gather(sparse.values, order),
            sparse.dense_shape,
        )
        where = placement(3, [2, 1, 1])
        shards = towers.split_batch({"r": ragged, "s": sparse}, where)
        joined = tf.concat([shard["r"] for shard in shards], 0)
        self.assertEqual(joined.to_list(), ragged.to_list())
        parts = [
            tf.sparse.to_dense(tf.sparse.reorder(shard["s"]))
            for shard in shards
        ]
        np.testing.assert_array_equal(tf.concat(parts, 0), dense)
        sizes = [rows // 2, 3 * rows // 4 - rows // 2, rows - 3 * rows // 4]
        self.assertEqual([len(part) for part in parts], sizes)

    def test_gradients_of_rows_that_were_gathered_are_joined(self):
        x = tf.reshape(tf.range(14.0), [7, 2])

        @tf.function
        def slope(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                shards = towers.split_batch(x, placement(3, [2, 1, 1]))
                last = [tf.gather(y, [tf.shape(y)[0] - 1] * 2) for y in shards]
                total = sum(tf.reduce_sum(y**2) for y in last)
            return tape.gradient(total, x)

        taken = np.isin(np.arange(7), [2, 4, 6])[:, np.newaxis]
        np.testing.assert_array_equal(slope(x), 4 * x * taken)

    def test_a_uniform_axis_stays_uniform(self):
        inner = tf.RaggedTensor.from_row_splits(tf.range(5), [0, 2, 2, 5, 5])
        ragged = tf.RaggedTensor.from_uniform_row_length(inner, 2)
        shards = towers.split_batch(ragged, placement(2))
        self.assertEqual(
            [shard.to_list() for shard in shards],
            [[[[0, 1], []]], [[[2, 3, 4], []]]],
        )
        self.assertEqual(shards[0].shape.as_list(), [1, 2, None])
