"""Stateful RNNs: unbuilt, with dropout, and fed with other rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[6, 3, 2]).astype("float32")
Y = np.ones([6, 1], "float32")


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__()
        self.rnn = layers.GRU(3, stateful=True, **kwargs)
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(self.rnn(x))


def sequential():
    return keras.Sequential([layers.LSTM(3, stateful=True), layers.Dense(1)])


def of_fixed_rows(**kwargs):
    x = keras.Input(batch_shape=X.shape)
    return keras.Model(x, layers.LSTM(3, stateful=True, **kwargs)(x))


class StatefulTest(parameterized.TestCase):
    @parameterized.parameters((Subclassed, 2, None), (sequential, 3, [3, 2, 1]))
    @pytest.mark.rare
    def test_an_unbuilt_one_starts_and_goes_on_as_plain(self, kind, n, weights):
        models = plain, towered = pair(kind, placement(n, weights))
        how = {"optimizer": lambda: keras.optimizers.SGD(0.2)}
        same_fit(models, X, Y, batch_size=6, epochs=2, **how)
        for _ in range(2):  # from where the last batch has left them
            close(towered(X), plain(X))

    @parameterized.parameters((2, None), (3, [3, 2, 1]))
    @pytest.mark.slow(after=1)
    def test_dropout_of_its_states_is_of_the_tower_s_rows(self, n, weights):
        model = make(lambda: of_fixed_rows(recurrent_dropout=0.5))
        where = placement(n, weights)
        trained = towers.build_towers(model, X, where, training=True)
        self.assertEqual(trained.outputs.shape, (6, 3))
        close(towers.build_towers(model, X, where).outputs, model(X))

    @pytest.mark.slow
    def test_another_number_of_rows_is_refused_in_keras_s_words(self):
        model = make(Subclassed)
        model(X)
        towered = towers.TowerModel(model, placement(2))
        towered.compile("sgd", "mse")
        towered.predict(X, batch_size=6, verbose=0)
        for call in (
            lambda: towered.predict(X[:4], batch_size=4, verbose=0),
            lambda: towered.fit(X, Y, batch_size=4, verbose=0),
            lambda: towered(X[:4]),
            lambda: towers.build_towers(model, X[:4], towered.placement),
        ):
            with self.assertRaisesRegex(
                ValueError,
                "If an RNN is stateful, the batch size(?s:.*)"
                "Expected batch size: 6(?s:.*)Received batch size: 4",
            ) as error:
                call()
            self.assertNotIsInstance(error.exception, tf.errors.OpError)
