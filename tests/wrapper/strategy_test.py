"""A model that was built under a tf.distribute strategy, wrapped outside."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain, close, placement

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[6, 3]).astype("float32")  # batches of 4 and 2
Y = RNG.normal(size=[6, 1]).astype("float32")


def model():
    keras.utils.set_random_seed(0)
    return chain(
        [3],
        layers.Dense(4, activation="tanh"),
        layers.BatchNormalization(trainable=False),
        layers.Dense(1),
    )


def compile_model(model):
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])


def train(model, **kwargs):
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, **kwargs)


class StrategyTest(parameterized.TestCase):
    @parameterized.parameters(
        (tf.distribute.MirroredStrategy, False),
        (tf.distribute.MirroredStrategy, True),
        (tf.distribute.experimental.CentralStorageStrategy, False),
    )
    @pytest.mark.rare(after=1)
    def test_it_trains_as_the_plain_model_does(self, strategy, trained):
        plain = model()
        if trained:
            compile_model(plain)
            plain.optimizer.build(plain.trainable_variables)
        with strategy(["/CPU:0", "/CPU:1"]).scope():
            template = model()
            if trained:  # as after some steps, which cannot be taken here:
                # a process has collectives for one model only.
                compile_model(template)
                template.optimizer.build(template.trainable_variables)
                for ours, theirs in zip(
                    [*plain.variables, *plain.optimizer.variables],
                    [*template.variables, *template.optimizer.variables],
                    strict=True,
                ):
                    value = np.abs(RNG.normal(size=ours.shape)) / 9.0
                    if "float" not in ours.dtype:
                        value = np.full(ours.shape, 3)
                    if ours.name != "learning_rate":
                        ours.assign(value)
                        theirs.assign(value)
        towered = towers.TowerModel(template, placement(3, [2, 1, 1]))
        if not trained:
            for m in (plain, towered):
                compile_model(m)
        histories = [train(m, epochs=2).history for m in (plain, towered)]
        self.assertEqual(histories[0].keys(), histories[1].keys())
        for key, values in histories[0].items():
            close(histories[1][key], values, 1e-4)
        close(towered.get_weights(), plain.get_weights(), 1e-4)
        for v in towered.variables + towered.optimizer.variables:
            self.assertNotIn("distribute", type(v.value).__module__)
