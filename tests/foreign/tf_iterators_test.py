"""Iterators that a function has captured begin anew."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_iterators


class IteratorsTest(absltest.TestCase):
    def test_a_captured_iterator_begins_anew(self):
        dataset = tf.data.Dataset.range(3)
        with tf.device("/CPU:1"):
            iterator = iter(dataset)
        step = tf.function(lambda: next(iterator))
        step()
        self.assertEqual(int(step()), 1)
        tf_iterators.restart(iterator, dataset)
        self.assertEqual(int(step()), 0)


if __name__ == "__main__":
    absltest.main()
