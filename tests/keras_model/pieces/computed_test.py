"""Layers in pieces: numbers, devices, and what crosses."""

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from models import DEVICES, close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
column, row = towers.column_wise, towers.row_wise
PAIR, OTHERS = DEVICES[1:3], DEVICES[2:4]
SHARED = {"up": column(PAIR), "down": row(PAIR)}
EACH = {
    "up": [column(DEVICES[:2]), column(OTHERS)],
    "down": [row(DEVICES[:2]), row(OTHERS)],
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=[7, 6]).astype("float32")
Y = RNG.normal(size=[7, 3]).astype("float32")


def mlp() -> keras.Model:
    """Two layers of ten units between, and what keeps pieces apart."""
    return keras.Sequential(
        [
            keras.Input([6]),
            layers.Dense(10, "gelu", name="up"),
            layers.LeakyReLU(),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3, name="down"),
        ]
    )


def uneven() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([6]),
            layers.Dense(10, "softmax", kernel_regularizer="l2", name="up"),
            layers.Dense(3, "tanh", activity_regularizer="l1", name="down"),
        ]
    )


class Block(layers.Layer):
    """A residual block of a user's own."""

    def __init__(self):
        super().__init__()
        self.up = layers.Dense(8, "relu", name="up")
        self.norm = layers.LayerNormalization()
        self.down = layers.Dense(6, use_bias=False, name="down")

    def build(self, shape):
        self.up.build(shape)
        self.down.build([*shape[:-1], 8])
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x + self.down(self.up(x)))


def nested() -> keras.Model:
    x = keras.Input([6])
    block = Block()
    inner = keras.Sequential([keras.Input([6]), block, block], name="inner")
    return keras.Model(x, layers.Dense(3, name="last")(inner(x)))


HOW = {"tolerance": 1e-6, "batch_size": 4, "epochs": 2}


class NumbersTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("shared", mlp, placement(2, layer_devices=SHARED)),
        (
            "of_own",
            mlp,
            placement(2, None, parameter_device="balanced", layer_devices=EACH),
        ),
        (
            "in_three",
            uneven,
            placement(
                2,
                layer_devices={
                    "up": column(DEVICES[:3]),
                    "down": row(DEVICES[1:]),
                },
            ),
        ),
        ("in_one", mlp, placement(1, layer_devices=SHARED)),
        (
            "nested",
            nested,
            placement(
                3,
                layer_devices={
                    "inner/.*/up": column(PAIR),
                    "inner/.*/down": row(PAIR),
                    "last": row(OTHERS),
                },
            ),
        ),
    )
    @pytest.mark.slow(of=["in_one", "of_own", "nested", "in_three"])
    def test_are_the_plain_model_s(self, model, where):
        models = plain, cut = pair(model, where)
        how = {"optimizer": lambda: keras.optimizers.SGD(0.1, 0.9), **HOW}
        same_fit(models, X, Y, predict=True, **how)
        close(cut.template.get_weights(), plain.get_weights(), 1e-6)


class LogitsTest(absltest.TestCase):
    def test_losses_take_those_of_pieces(self):
        def model():
            start = keras.initializers.RandomNormal(stddev=50, seed=1)
            layer = layers.Dense(3, "sigmoid", True, start, name="up")
            return keras.Sequential([keras.Input([6]), layer])

        where = placement(1, layer_devices={"up": column(PAIR)})
        plain, cut = model(), towers.TowerModel(model(), where)
        for each in (plain, cut):
            each.compile("sgd", "binary_crossentropy")
        losses = [m.test_on_batch(X, Y > 0) for m in (plain, cut)]
        self.assertAlmostEqual(*losses, places=4)
        self.assertGreater(losses[0], 20)  # of probabilities it is less


class OptimizersTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (
            "all_at_once",
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.AdamW(
                    *(0.01, 0.1),
                    use_ema=True,
                    ema_overwrite_frequency=2,
                    gradient_accumulation_steps=2,
                    global_clipnorm=0.5,
                )
            ),
        ),
        ("adam", lambda: keras.optimizers.Adam(0.01, amsgrad=True)),
        ("nesterov", lambda: keras.optimizers.SGD(0.1, 0.9, nesterov=True)),
        ("rmsprop", lambda: keras.optimizers.RMSprop(0.01, clipvalue=0.01)),
        ("adagrad", lambda: keras.optimizers.Adagrad(0.1)),
        ("nadam", lambda: keras.optimizers.Nadam(0.01)),
        ("lion", lambda: keras.optimizers.Lion(0.01)),
    )
    @pytest.mark.slow(of=["adam", "nesterov", "prop", "adagrad", "lion"])
    def test_numbers_are_the_plain_model_s(self, optimizer):
        where = placement(2, layer_devices=SHARED)
        same_fit(pair(mlp, where), X, Y, optimizer=optimizer, **HOW)


class CrossingTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    @pytest.mark.slow(after=1)
    def test_inputs_and_partial_sums_cross_and_no_weight(self, n):
        model = towers.TowerModel(make(mlp), placement(n, layer_devices=SHARED))
        model.compile("sgd", "mse")
        report = towers.execution_report(model.train_on_batch, X, Y)
        for j, device in enumerate(PAIR):
            for path in ("up", "down"):
                report.assert_runs_on(f"tower_0/{path}/piece_{j}", device)
        there = 2 * (X.nbytes + 2 * Y.nbytes)  # and back, and gradients
        bias = 2 * 3 * 4  # of "down", to tower 1 and back
        numbers = 2 * 12 + (n + 1) * 16  # of the optimizer, and seeds
        rest = numbers + (n - 1) * bias
        self.assertEqual(report.total_bytes, there + rest)
