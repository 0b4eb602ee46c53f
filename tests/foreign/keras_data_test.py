"""What Keras's `fit` makes of what it is given, whose class has no public name."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import keras_data


class Counting(keras.Model):
    """Counts what its steps are given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        return x

    def make_test_function(self, force=False):
        self.test_function = self.count

    def count(self, batches):
        self.seen.append(next(batches))
        return {}  # as what a step says


class EpochsTest(absltest.TestCase):
    def test_keras_loops_over_them_and_says_when_an_epoch_begins(self):
        begun = []
        result = keras_data.Epochs(
            ["a", "b"], lambda: 2, lambda: begun.append(True)
        )
        model = Counting()
        model.compile(loss="mse")
        for _ in range(2):
            model.evaluate(result, verbose=0)
        self.assertEqual(model.seen, ["a", "b"] * 2)
        self.assertLen(begun, 2)

    def test_weights_of_classes_are_those_of_fit(self):
        weighted = keras_data.weighted_by_class({0: 2.0, 2: 0.5})
        for y in ([0, 1, 2], np.eye(3, dtype="float32"), [[0], [1], [2]]):
            data = tf.data.Dataset.from_tensors((np.ones([3, 2]), y))
            _, _, weights = next(iter(data.map(weighted)))
            self.assertEqual(weights.numpy().tolist(), [2, 1, 0.5])
