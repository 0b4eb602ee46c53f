"""A model that was built under a tf.distribute strategy, wrapped outside."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, placement

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[6, 3]).astype("float32")  # batches of 4 and 2
Y = RNG.normal(size=[6, 1]).astype("float32")


def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([3]),
            layers.Dense(4, activation="tanh"),
            layers.BatchNormalization(trainable=False),
            layers.Dense(1),
        ]
    )


def train(model, **kwargs):
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, **kwargs)


class StrategyTest(parameterized.TestCase):
    @parameterized.parameters(
        (tf.distribute.MirroredStrategy, False),
        (tf.distribute.MirroredStrategy, True),
        (tf.distribute.experimental.CentralStorageStrategy, False),
    )
    def test_it_trains_as_the_plain_model_does(self, strategy, trained):
        plain = model()
        with strategy(["/CPU:0", "/CPU:1"]).scope():
            template = model()
            if trained:
                template.compile(
                    keras.optimizers.Adam(), "mse", metrics=["mae"]
                )
        if trained:
            plain.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
            plain.optimizer.build(plain.trainable_variables)
            train(template)
            for ours, theirs in zip(
                [*plain.variables, *plain.optimizer.variables],
                [*template.variables, *template.optimizer.variables],
                strict=True,
            ):
                ours.assign(theirs.numpy())
        towered = towers.TowerModel(template, placement(3, [2, 1, 1]))
        if not trained:
            for m in (plain, towered):
                m.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
        histories = [train(m, epochs=2).history for m in (plain, towered)]
        self.assertEqual(histories[0].keys(), histories[1].keys())
        for key, values in histories[0].items():
            close(histories[1][key], values, 1e-4)
        close(towered.get_weights(), plain.get_weights(), 1e-4)
        for v in towered.variables + towered.optimizer.variables:
            self.assertNotIn("distribute", type(v.value).__module__)


if __name__ == "__main__":
    absltest.main()
