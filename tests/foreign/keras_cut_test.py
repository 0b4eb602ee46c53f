"""Where Keras keeps what is cut of its layers: in attributes that it has."""

import keras
import numpy as np
from absl.testing import parameterized

from towers.foreign import keras_cut

layers = keras.layers


class KerasCutTest(parameterized.TestCase):
    @parameterized.parameters(
        (layers.Dense(2), (3,)),
        (layers.EinsumDense("ab,bc->ac", output_shape=2), (3,)),
        (layers.Conv1D(2, 1), (4, 3)),
        (layers.Conv2DTranspose(2, 1), (4, 4, 3)),
    )
    def test_a_kernel_is_an_attribute(self, layer, shape):
        layer.build([None, *shape])
        kernel = vars(layer)[keras_cut.kernel_of(layer)]
        self.assertIs(kernel, layer.weights[0])

    def test_so_is_a_table(self):
        layer = layers.Embedding(3, 2)
        layer.build()
        self.assertIs(vars(layer)[keras_cut.EMBEDDINGS], layer.weights[0])

    def test_attention_consists_of_projections(self):
        layer = layers.MultiHeadAttention(2, 3)
        layer.build([None, 4, 5], [None, 4, 5])
        names = keras_cut.projections(layer)
        inner = [vars(layer)[name] for name in names]
        outer = vars(layer)[keras_cut.OUTPUT]
        self.assertEqual(
            [x.name for x in [*inner, outer]],
            ["query", "key", "value", "attention_output"],
        )
        self.assertEqual(vars(layer)[keras_cut.HEADS], 2)
        dropout = vars(layer)[keras_cut.SCORES_DROPOUT]
        self.assertIsInstance(dropout, layers.Dropout)

    def test_a_changed_copy_computes_with_what_it_is_given(self):
        layer = layers.Dense(2)
        layer.build([None, 3])
        given = {
            keras_cut.kernel_of(layer): np.ones([3, 1]),
            keras_cut.BIAS: None,
        }
        result = keras_cut.changed(layer, given)
        np.testing.assert_array_equal(
            layers.Dense.call(result, np.ones([1, 3])), [[3]]
        )
        self.assertEqual(layer.bias.shape, (2,))
