"""fixed_rows: what names the batch's rows by a number is shared by towers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from same import same_fit

import towers

layers = keras.layers
TWO = towers.Placement(["/CPU:0", "/CPU:1"])
THREE = towers.Placement(["/CPU:0", "/CPU:1", "/CPU:2"], weights=[3, 2, 1])
FOUR = towers.Placement.cpus(4)
X = np.arange(24, dtype="float32").reshape(4, 3, 2) / 24
MASK = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]]) > 0


class Masked(layers.Layer):
    def __init__(self, mask):
        super().__init__(name="masked")
        self.supports_masking = True
        self.mask = mask

    def call(self, x):
        return x + 0.0

    def compute_mask(self, inputs, previous=None):
        return self.mask


def read(mask):
    """A model whose loss, and a layer of which, goes by a mask."""
    keras.utils.set_random_seed(1)
    tf.random.set_seed(None)
    x = keras.Input([3, 2])
    y = layers.LSTM(2, return_sequences=True)(Masked(mask)(x))
    return keras.Model(x, y)


def sub(mask):
    keras.utils.set_random_seed(1)
    tf.random.set_seed(None)

    class Sub(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Lambda(lambda x: x * 1, mask=mask)
            self.last = layers.SimpleRNN(2, return_sequences=True)

        def call(self, x):
            return self.last(self.first(x))

    model = Sub()
    model(X)
    return model


def called(model, placement, is_open=False):
    shape = [None, 3, 2] if is_open else X.shape

    @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
    def call(x):
        y = towers.build_towers(model, x, placement, training=True).outputs
        return y, getattr(y, "_keras_mask", y)

    return call(X)


class MaskTest(parameterized.TestCase):
    @parameterized.product(
        factory=[read, sub], placement=[TWO, THREE], is_open=[False, True]
    )
    @pytest.mark.rare(after=3)
    def test_a_constant_is_cut_by_rows(self, factory, placement, is_open):
        for mask in (tf.constant(MASK), MASK[:1]):
            plain = factory(mask)
            y, joined = called(factory(mask), placement, is_open)
            np.testing.assert_allclose(y, plain(X), atol=1e-6)
            want = np.broadcast_to(mask, MASK.shape)
            np.testing.assert_array_equal(joined, want)

    def test_copies_of_a_tower_have_their_rows(self):
        model = keras.Sequential([keras.Input([3, 2])])
        model.add(layers.Lambda(tf.identity, mask=tf.constant(MASK)))
        np.testing.assert_array_equal(called(model, FOUR)[1], MASK)

    @pytest.mark.rare
    def test_fit_goes_by_it(self):
        plain, model = read(tf.constant(MASK)), read(tf.constant(MASK))
        how = {"optimizer": lambda: keras.optimizers.SGD(0.5)}
        how |= {"batch_size": 4, "epochs": 2, "tolerance": 1e-6}
        same_fit((plain, towers.TowerModel(model, THREE)), X, X, **how)

    def test_another_number_of_rows_is_refused_by_name(self):
        model = read(tf.constant(np.tile(MASK, (2, 1))))
        with self.assertRaisesRegex(Exception, "(?s)mask of .*masked.* 8 rows"):
            called(model, TWO, is_open=True)

    def test_what_is_no_mask_of_rows_stays(self):
        causal = tf.constant(np.tri(4, 3) > 0)

        class Weighted(layers.Layer):
            supports_masking = True

            def call(self, x, mask=None):
                return x * tf.reduce_sum(tf.cast(mask, x.dtype))

        class Sub(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = Weighted()

            def call(self, x):
                return self.inner(x, mask=causal)

        np.testing.assert_allclose(called(Sub(), TWO)[0], Sub()(X))


class NoiseTest(parameterized.TestCase):
    @parameterized.parameters(layers.Dropout, layers.AlphaDropout)
    def test_noise_of_so_many_rows_is_that_of_any(self, kind):
        def noised(rows):
            layer = kind(0.5, noise_shape=(rows, 1, 2), seed=3)
            model = keras.Sequential([keras.Input([3, 2]), layer])
            return model

        for placement, is_open in ((TWO, True), (THREE, False), (FOUR, False)):
            for_four = called(noised(4), placement, is_open)[0]
            for_any = called(noised(None), placement, is_open)[0]
            np.testing.assert_array_equal(for_four, for_any)
        model = noised(6)
        with self.assertRaisesRegex(ValueError, "noise_shape=.None, 1, 2."):
            called(model, TWO)
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "noise_shape=.None, 1, 2."
        ):
            called(model, TWO, is_open=True)
        graph = towers.build_towers(model, X, TWO, training=False)
        np.testing.assert_array_equal(graph.outputs, X)
