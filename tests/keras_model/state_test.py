"""state: moments of shards, pooled into those of the batch."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized

from towers.keras_model.moments import of_all_shards
from towers.verbs.rows import Rows


class PooledTest(parameterized.TestCase):
    @parameterized.parameters([[3, 4]], [[1, 1, 1]], [[0, 5]], [[7]])
    def test_pooled_moments_are_the_batch_s(self, rows):
        x = np.random.default_rng(0).normal(5, 2, [sum(rows), 3])
        shards = np.split(x, np.cumsum(rows)[:-1])
        parts = [
            tf.stack(
                [s.mean(0), s.var(0)] if len(s) else [np.full(3, np.nan)] * 2
            )
            for s in shards
        ]
        mean, variance = of_all_shards(
            parts, Rows(tf.constant(rows), [r == 0 for r in rows]), "/CPU:0"
        )
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, x.var(0), rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
