"""Variables that TensorFlow's checkpoints have as one: sliced anew, and whole."""

import tempfile

import numpy as np
import tensorflow as tf
from absl.testing import absltest

from towers.foreign.tf_slices import Sliced

VALUE = np.arange(24.0).reshape(2, 3, 4)


class Keras:
    """What has a variable, as Keras's have."""

    def __init__(self, value):
        self.value = tf.Variable(value)
        self.shape = self.value.shape


def sliced(value, sizes, axis):
    parts = np.split(value, np.cumsum(sizes)[:-1], axis)
    return Sliced([Keras(part) for part in parts], axis)


class TfSlicesTest(absltest.TestCase):
    def test_are_one_tensor_in_a_file(self):
        folder = tempfile.mkdtemp()
        path = tf.train.Checkpoint(w=sliced(VALUE, [1, 3], 2)).write(
            folder + "/a"
        )
        whole = tf.Variable(0 * VALUE)
        tf.train.Checkpoint(w=whole).read(path).assert_consumed()
        np.testing.assert_array_equal(whole, VALUE)
        path = tf.train.Checkpoint(w=whole).write(folder + "/b")
        other = sliced(0 * VALUE, [2, 1], 1)
        tf.train.Checkpoint(w=other).read(path).assert_consumed()
        result = np.concatenate([piece.value for piece in other.pieces], 1)
        np.testing.assert_array_equal(result, VALUE)

    def test_of_another_shape_are_refused_whole(self):
        path = tf.train.Checkpoint(w=sliced(VALUE, [1, 3], 2)).write(
            tempfile.mkdtemp() + "/a"
        )
        other = sliced(np.zeros([2, 3, 5]), [1, 4], 2)
        with self.assertRaisesRegex(tf.errors.InvalidArgumentError, "shape"):
            tf.train.Checkpoint(w=other).read(path)
        for piece in other.pieces:
            self.assertEqual(np.max(piece.value), 0)
