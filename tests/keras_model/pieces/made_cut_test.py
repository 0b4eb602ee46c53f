"""split_layer: what begins in pieces, and is the plain layer's otherwise."""

import keras
import numpy as np
from absl.testing import parameterized
from models import DEVICES, close, placement

import towers

L = keras.layers
column, row = towers.column_wise, towers.row_wise
PAIR = DEVICES[1:3]


class SplitLayerTest(parameterized.TestCase):
    @parameterized.parameters(
        (lambda: L.Embedding(60, 8), row, [None]),
        (lambda: L.Dense(60), column, [None, 8]),
        (lambda: L.Conv1D(60, 3), row, [None, 9, 8]),
        (lambda: L.EinsumDense("ab,bcd->acd", (6, 4)), column, [None, 8]),
    )
    def test_pieces_are_made_where_they_live(self, kind, cut, shape):
        layer = towers.split_layer(kind(), cut(PAIR))
        self.assertFalse(layer.built)
        layer.build(shape)
        plain = kind()
        plain.build(shape)
        for one, other in zip(layer.get_weights(), plain.get_weights()):
            self.assertEqual(one.shape, other.shape)
        pieces = layer.weights[:2]
        for piece, device in zip(pieces, PAIR):
            self.assertEndsWith(piece.value.device, device[1:])
        first, second = (np.ravel(piece.numpy()) for piece in pieces)
        self.assertGreater(np.max(np.abs(first - second)), 0)  # its own numbers

    @parameterized.parameters(
        "glorot_uniform", "he_normal", "lecun_normal", "random_normal"
    )
    def test_they_begin_as_widely_as_the_whole(self, initializer):
        kinds = [L.Dense(400, kernel_initializer=initializer) for _ in range(3)]
        for layer, cut in zip(kinds, (None, row, column)):
            if cut:
                towers.split_layer(layer, cut(DEVICES))
            layer.build([None, 40])
        expected, *result = (np.std(x.kernel.numpy()) for x in kinds)
        for one in result:
            self.assertAlmostEqual(one / expected, 1, delta=0.05)

    def test_what_looks_at_all_is_cut_from_all(self):
        layer = L.Dense(6, kernel_initializer="orthogonal")
        towers.split_layer(layer, column(DEVICES)).build([None, 6])
        kernel = layer.kernel.numpy()
        close(kernel.T @ kernel, np.eye(6))

    def test_it_is_of_a_model_in_towers(self):
        layer = towers.split_layer(L.Dense(6, name="up"), column(PAIR))
        model = keras.Sequential([keras.Input([3]), layer, L.Dense(2)])
        pieces = [id(v) for v in layer.weights]
        where = placement(2, layer_devices={"up": column(PAIR)})
        model = towers.TowerModel(model, where)
        self.assertEqual([id(v) for v in layer.weights], pieces)
        plain = keras.Sequential([keras.Input([3]), L.Dense(6), L.Dense(2)])
        plain.set_weights(model.get_weights())
        x = np.ones([4, 3], "float32")
        close(model(x), plain(x), 1e-6)

    def test_one_that_is_built_keeps_its_numbers(self):
        layer = L.MultiHeadAttention(4, 3)
        layer.build([None, 5, 6], [None, 5, 6])
        weights = layer.get_weights()
        self.assertIs(towers.split_layer(layer, column(PAIR)), layer)
        close(layer.get_weights(), weights, 0)
        self.assertLen(layer.weights, 15)

    @parameterized.parameters(
        (3, column(PAIR), TypeError, "must be a keras.Layer; got int"),
        (L.Dense(2), PAIR, TypeError, "`where` must be towers.column_wise"),
        (L.Dense(2), row(["/CPU:9"]), ValueError, r"`where.devices\[0\]`"),
        (L.LSTM(2), row(PAIR), ValueError, "asked for 'lstm.*is a LSTM"),
        (L.Dense(1), column(PAIR), ValueError, "1 along axis 1.*fewer than 2"),
        (
            L.MultiHeadAttention(4, 3),
            column(PAIR),
            ValueError,
            "is not built",
        ),
    )
    def test_what_cannot_be_is_told(self, layer, where, kind, words):
        with self.assertRaisesRegex(kind, words):
            towers.split_layer(layer, where).build([None, 3])
