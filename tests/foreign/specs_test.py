"""specs: what leaves are, of so many rows or of any number."""

import keras
import tensorflow as tf
from absl.testing import absltest

from towers.foreign import specs

RAGGED = tf.ragged.constant([[1.0], [2.0, 3.0]])
SPARSE = tf.sparse.from_dense([[0.0, 1.0, 2.0]])


class SpecsTest(absltest.TestCase):
    def test_rows_are_their_own_or_those_that_are_given(self):
        for leaf, shape in (
            (tf.ones([3, 2]), [3, 2]),
            (keras.KerasTensor([3, 2], "float32"), [3, 2]),
            (tf.TensorSpec([3, None]), [3, None]),
            (RAGGED, [2, None]),
            (SPARSE, [1, 3]),
        ):
            own = specs.of(leaf)
            self.assertEqual(own.shape.as_list(), shape)
            for rows in (None, 7):
                spec = specs.of(leaf, rows)
                self.assertIs(type(spec), type(own))
                self.assertEqual(spec.dtype, own.dtype)
                self.assertEqual(spec.shape.as_list(), [rows, *shape[1:]])

    def test_what_has_no_rows_stays(self):
        self.assertIsNone(specs.of(None, 7))
        for leaf in (tf.constant(1.0), tf.TensorSpec(None)):
            self.assertEqual(specs.of(leaf, 7), specs.of(leaf))

    def test_a_nest_has_rows_where_it_is_divided(self):
        nest = {"a": tf.ones([3, 2]), "b": [None, RAGGED, tf.ones([3, 1])]}
        result = specs.of_nest(nest, [True, True, True, False])
        shapes = [x and x.shape.as_list() for x in tf.nest.flatten(result)]
        self.assertEqual(shapes, [[None, 2], None, [None, None], [3, 1]])
        self.assertEqual(result["b"][1].ragged_rank, 1)

    def test_unknown_sizes_are_filled(self):
        spec = specs.filled(tf.SparseTensorSpec([None, 4]), 5)
        self.assertEqual(spec, tf.SparseTensorSpec([5, 4]))
