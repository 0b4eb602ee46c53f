"""Whatever a model draws, in any number of towers it is what the plain one draws.

Models as people write them, with layers that drop, add noise, sample or augment.
"""

import functools
import inspect
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, ops
from models import chain, close, make, placement

import towers


@keras.saving.register_keras_serializable()
class VAE(keras.Model):
    """Samples by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = layers.Dense(8), layers.Dense(2)
        self.seed = keras.random.SeedGenerator(5)

    def call(self, x, training=False):
        mean, log_var = ops.split(self.encoder(x), 2, -1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        return self.decoder(mean + ops.exp(0.5 * log_var) * noise)


class Drawing(layers.Layer):
    """One that draws in training by its own generator."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(9)

    def call(self, x, training=False):
        return self.drawn(x) if training else x


class StochasticDepth(Drawing):
    def drawn(self, x):
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        keep = 0.7 + keras.random.uniform(shape, seed=self.seed)
        return x / 0.7 * ops.floor(keep)


class Stateless(Drawing):
    def drawn(self, x):
        seed = tf.cast(self.seed.next(), tf.int32)
        noise = tf.random.stateless_truncated_normal(tf.shape(x), seed)
        return x * (1 + 0.1 * noise)


class NoisyDense(Drawing):
    """Its kernel is noisy, of as many rows and columns as a tower has rows."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))

    def call(self, x, training=False):
        kernel = self.kernel
        if training:
            noise = keras.random.normal(kernel.shape, seed=self.seed)
            kernel = kernel * (1 + 0.3 * noise)
        return x @ kernel


class Number(Drawing):
    def drawn(self, x):
        return x * keras.random.uniform((), seed=self.seed)


class TimeMajor(layers.Layer):
    def __init__(self):
        super().__init__()
        self.drop = layers.Dropout(0.5, seed=8)

    def call(self, x, training=False):
        y = self.drop(ops.transpose(x, [1, 0, 2]), training=training)
        return ops.transpose(y, [1, 0, 2])


class Windows(TimeMajor):
    def call(self, x, training=False):
        _, times, width = x.shape
        y = ops.reshape(x, (-1, times // 2, width))
        y = self.drop(y, training=training)
        return ops.reshape(y, (-1, times, width))


class Constant(layers.Layer):
    """Draws by a number, in a model without any generator."""

    def call(self, x, training=False):
        return keras.random.dropout(x, 0.5, seed=42) if training else x


def transformer():
    x = keras.Input([6, 8])
    y = layers.GaussianNoise(0.1)(x)
    y = layers.MultiHeadAttention(2, 4, dropout=0.3)(y, y)
    y = layers.LayerNormalization()(x + layers.Dropout(0.3)(y))
    y = layers.LSTM(7, dropout=0.3, recurrent_dropout=0.2)(y)
    return keras.Model(x, layers.Dense(2)(y))


def shared():
    x, drop, dense = keras.Input([8]), layers.Dropout(0.4), layers.Dense(8)
    y = drop(dense(drop(dense(x))))
    return keras.Model(x, layers.Dense(2)(y))


def nested():
    inner = [keras.Input([8]), layers.Dense(8), layers.Dropout(0.4)]
    return chain(
        [8], keras.Sequential(inner), layers.Dropout(0.2), layers.Dense(2)
    )


def of(shape, *makers):
    """A model of layers, each made anew, up to two numbers for each row."""

    def model():
        each = [maker() for maker in makers]
        flat = [layers.Flatten()] if len(shape) > 1 else []
        return chain(shape, *each, *flat, layers.Dense(2))

    return model


def layer(kind, *args, **kwargs):
    return functools.partial(kind, *args, **kwargs)


def vae():
    model = VAE()
    model(np.zeros([2, 8], "float32"))
    return model


DENSE = layer(layers.Dense, 9, activation="tanh")
TRAINED = {
    "dropout": of([8], DENSE, layer(layers.Dropout, 0.5)),
    "transformer": transformer,
    "gaussian": of(
        [8],
        layer(layers.GaussianNoise, 0.3),
        DENSE,
        layer(layers.GaussianDropout, 0.3),
        layer(layers.AlphaDropout, 0.2),
    ),
    "noise_shape": of(
        [6, 8],
        layer(layers.Dropout, 0.5, noise_shape=(None, 1, 8)),
        layer(layers.Dropout, 0.5, noise_shape=(1, 6, 8)),
    ),
    "recurrent": of(
        [6, 8],
        layer(
            layers.GRU,
            7,
            dropout=0.3,
            recurrent_dropout=0.2,
            return_sequences=True,
        ),
        layer(layers.SimpleRNN, 5, dropout=0.3, recurrent_dropout=0.2),
    ),
    "bidirectional": of(
        [6, 8],
        lambda: layers.Bidirectional(layers.LSTM(7, dropout=0.3)),
    ),
    "time_distributed": of(
        [6, 8], lambda: layers.TimeDistributed(layers.Dropout(0.4))
    ),
    "vae": vae,
    "stochastic_depth": of([4, 4, 3], StochasticDepth),
    "stateless": of([8], Stateless, DENSE),
    "noisy_dense": of([8], NoisyDense, NoisyDense, Number),
    "time_major": of([6, 8], TimeMajor, Windows),
    "constant": of([8], DENSE, Constant, DENSE, Constant),
    "shared": shared,
    "nested": nested,
}
# Layers of Keras that draw, of rows of what shape; and those that mix rows.
DRAWN = {
    (8,): [
        layer(layers.AlphaDropout, 0.3),
        layer(layers.Dropout, 0.3),
        layer(layers.GaussianDropout, 0.3),
        layer(layers.GaussianNoise, 0.3),
    ],
    (6, 8): [
        layer(layers.SpatialDropout1D, 0.3),
        layer(layers.GRU, 3, dropout=0.3, recurrent_dropout=0.3),
        layer(layers.LSTM, 3, dropout=0.3, recurrent_dropout=0.3),
        layer(layers.SimpleRNN, 3, dropout=0.3, recurrent_dropout=0.3),
        lambda: Attending(layers.MultiHeadAttention, 2, 4, dropout=0.3),
        lambda: Attending(layers.GroupQueryAttention, 4, 2, 1, dropout=0.3),
        lambda: Attended(layers.Attention, dropout=0.3),
        lambda: Attended(layers.AdditiveAttention, dropout=0.3),
    ],
    (4, 6, 2): [
        layer(layers.ConvLSTM1D, 2, 3, dropout=0.3, recurrent_dropout=0.3),
    ],
    (3, 6, 6, 2): [
        layer(layers.ConvLSTM2D, 2, 3, dropout=0.3, recurrent_dropout=0.3),
        layer(layers.SpatialDropout3D, 0.3),
    ],
    (2, 4, 4, 4, 2): [
        layer(layers.ConvLSTM3D, 2, 3, dropout=0.3, recurrent_dropout=0.3),
    ],
    (12, 12, 3): [
        layer(layers.SpatialDropout2D, 0.3),
        *(
            layer(getattr(layers, name), *args)
            for name, args in {
                "RandomBrightness": (0.2,),
                "RandomColorDegeneration": (0.5,),
                "RandomColorJitter": ((0, 255), 0.5, 0.5, 0.5, 0.2),
                "RandomContrast": (0.2,),
                "RandomCrop": (8, 8),
                "RandomElasticTransform": (0.5,),
                "RandomErasing": (0.5,),
                "RandomFlip": (),
                "RandomGaussianBlur": (0.5,),
                "RandomGrayscale": (0.5,),
                "RandomHue": (0.2,),
                "RandomInvert": (0.5,),
                "RandomPerspective": (0.5,),
                "RandomPosterization": (4,),
                "RandomRotation": (0.2,),
                "RandomSaturation": (0.2,),
                "RandomSharpness": (0.2,),
                "RandomShear": (0.2, 0.2),
                "RandomTranslation": (0.2, 0.2),
                "RandomZoom": (0.2, 0.2),
                "Solarization": (0.3,),
            }.items()
            if hasattr(layers, name)  # older Keras has fewer
        ),
    ],
}
# `RandAugment` by Keras's `Equalization`, which is of the batch.
MIXED = {"AugMix", "CutMix", "MixUp", "RandAugment"}
CELLS = {"GRUCell", "JaxLayer", "LSTMCell", "SimpleRNNCell"}  # of layers above


class Attending(layers.Layer):
    def __init__(self, kind, *args, **kwargs):
        super().__init__()
        self.attention = kind(*args, **kwargs)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, training=False):
        return self.attention(x, x, training=training)


class Attended(Attending):
    def build(self, shape):
        self.attention.build([shape, shape])

    def call(self, x, training=False):
        return self.attention([x, x], training=training)


def kind_of(layer):
    return type(getattr(layer, "attention", layer)).__name__


def seeds(model):
    return [v.numpy() for v in model.variables if "seed_generator" in v.path]


def data(model, rows):
    shape = getattr(model, "input_shape", None) or (None, 8)
    random = np.random.default_rng(rows)
    x = random.normal(size=[rows, *shape[1:]]).astype("float32")
    return x, random.normal(size=[rows, 2]).astype("float32")


def trained(model, start=0, **compile):
    """After two epochs of 12, 12 and 3 rows."""
    if not model.compiled:
        optimizer = keras.optimizers.SGD(0.05)
        model.compile(optimizer, "mse", **compile)
    x, y = data(getattr(model, "template", model), 27)
    fit = {"batch_size": 12, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=start + 2, initial_epoch=start, **fit)
    return model


def largest(weights, others):
    return max(
        float(np.max(np.abs(a.astype("float64") - b)))
        for a, b in zip(weights, others)
        if a.dtype.kind == "f"
    )


class FitTest(parameterized.TestCase):
    @parameterized.named_parameters(zip(TRAINED, TRAINED))
    @pytest.mark.slow(of=["transformer", "stateless"])
    @pytest.mark.rare(
        of=[*TRAINED.keys() - {"dropout", "transformer", "stateless"}]
    )
    def test_weights_and_seeds_are_the_plain_model_s(self, name):
        plain = make(TRAINED[name])
        before = plain.get_weights()
        trained(plain)
        moved = largest(plain.get_weights(), before)
        self.assertGreater(moved, 1e-3)
        for where in (placement(2), placement(3, [3, 2, 1]), placement(4)):
            here = trained(towers.TowerModel(make(TRAINED[name]), where))
            apart = largest(here.get_weights(), plain.get_weights())
            self.assertLess(apart, 1e-5 * moved)
            np.testing.assert_array_equal(seeds(here), seeds(plain))
        # Each goes on from what the other has saved, but for seeds' states, which
        # Keras's files have not.
        folder = tempfile.mkdtemp()
        saved = [f"{folder}/{k}.weights.h5" for k in range(2)]
        plain.save_weights(saved[0])
        here.save_weights(saved[1])
        plain = make(TRAINED[name])
        here = towers.TowerModel(make(TRAINED[name]), placement(3, [3, 2, 1]))
        plain.load_weights(saved[1])
        here.load_weights(saved[0])
        trained(plain, 2)
        trained(here, 2)
        apart = largest(here.get_weights(), plain.get_weights())
        self.assertLess(apart, 2e-5 * moved)
        np.testing.assert_array_equal(seeds(here), seeds(plain))

    @pytest.mark.rare
    def test_half_precision_is_no_further_than_without_draws(self):
        def model(rate):
            return of(
                [8],
                layer(layers.Dense, 9, dtype="mixed_bfloat16"),
                layer(layers.Dropout, rate, dtype="mixed_bfloat16"),
                layer(layers.Dropout, rate, dtype="mixed_float16"),
            )

        apart = []
        for rate in (0.5, 0.0):
            plain, here = make(model(rate)), make(model(rate))
            trained(plain)
            trained(towers.TowerModel(here, placement(3, [3, 2, 1])))
            apart.append(largest(here.get_weights(), plain.get_weights()))
        self.assertLessEqual(apart[0], 4 * apart[1])

    @parameterized.parameters("transformer", "nested", "vae", "stateless")
    @pytest.mark.rare
    def test_under_xla_they_are_the_plain_model_s_under_xla(self, name):
        if name == "transformer":
            model = of(
                [6, 8],
                lambda: Attending(layers.MultiHeadAttention, 2, 4, dropout=0.3),
                layer(layers.GaussianNoise, 0.3),
                layer(layers.AlphaDropout, 0.3),
            )
        else:
            model = TRAINED[name]
        plain = trained(make(model), jit_compile=True)
        for where in (placement(2), placement(3, [3, 2, 1])):
            here = towers.TowerModel(make(model), where)
            trained(here, jit_compile=True)
            close(here.get_weights(), plain.get_weights(), 1e-6)


class LayersTest(parameterized.TestCase):
    def test_every_layer_of_keras_that_draws_is_here(self):
        here = {kind_of(m()) for makers in DRAWN.values() for m in makers}
        all_of_them = {
            kind.__name__
            for kind in vars(layers).values()
            if inspect.isclass(kind)
            and issubclass(kind, layers.Layer)
            and "seed" in inspect.signature(kind).parameters
        }
        # Its `dropout` has a seed, as `Attention`'s.
        self.assertEqual(
            all_of_them - MIXED - CELLS, here - {"AdditiveAttention"}
        )

    @parameterized.product(shape=tuple(DRAWN), rows=(None, 7))
    @pytest.mark.rare(of=[*(f"{k}" for k in range(1, 2 * len(DRAWN)))])
    def test_it_draws_what_it_draws_plainly(self, shape, rows):
        # Of rows whose number is not known, Keras makes all that it distorts
        # of the batch's first.
        makers = [
            maker
            for maker in DRAWN[shape]
            if rows or kind_of(maker()) != "RandomElasticTransform"
        ]

        def model():
            x = keras.Input(shape)
            return keras.Model(x, [maker()(x) for maker in makers])

        plain, here = make(model), make(model)
        random = np.random.default_rng(0)
        x = random.uniform(0, 255, [7, *shape]).astype("float32")
        spec = [tf.TensorSpec([rows, *shape])]

        @tf.function(input_signature=spec, autograph=False)
        def plainly(x):
            return plain(x, training=True)

        @tf.function(input_signature=spec, autograph=False)
        def in_towers(x):
            where = placement(3, [3, 2, 1])
            graph = towers.build_towers(here, x, where, True)
            graph.apply_updates()
            return graph.outputs

        for _ in range(2):
            for a, b, maker in zip(in_towers(x), plainly(x), makers):
                scale = float(np.max(np.abs(b)))
                np.testing.assert_allclose(
                    a, b, rtol=1e-5, atol=5e-6 * scale, err_msg=str(maker)
                )
        np.testing.assert_array_equal(seeds(here), seeds(plain))
