"""What a SavedModel keeps besides weights: seeds and state."""

import os
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, placement

import towers

layers = keras.layers
THREE = placement(3, [2, 1, 1], parameter_device="/CPU:2")
ONE = placement(1, parameter_device="/CPU:2")


class Noise(layers.Layer):
    """Noise that is on at inference, and counts of how often it was."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(3)

    def build(self, _):
        zero = {"initializer": "zeros", "trainable": False}
        self.total = self.add_weight(shape=[], name="total", **zero)
        self.calls = self.add_weight(
            shape=[], name="calls", dtype="int32", **zero
        )

    def call(self, x):
        self.total.assign_add(2.0)
        self.calls.assign_add(1)
        shape = keras.ops.shape(x)
        return x + keras.random.normal(shape, seed=self.seed) + self.total


def noisy():
    return keras.Sequential([keras.Input([3]), layers.Dense(4), Noise()])


def folder():
    return os.path.join(tempfile.mkdtemp(), "model")


def exported(model, where, **kwargs):
    path = folder()
    towers.export_towers(model, path, where, **kwargs)
    return tf.saved_model.load(path)


def plain(model):
    path = folder()
    model.export(path, verbose=False)
    return tf.saved_model.load(path)


class StateTest(parameterized.TestCase):
    @parameterized.named_parameters(("one", ONE), ("no_devices", None))
    def test_draws_are_those_of_keras_s_own_export(self, where):
        model, x = noisy(), np.ones([5, 3], "float32")
        ours, theirs = exported(model, where), plain(model)
        before = [v.numpy() for v in model.variables]
        signature = ours.signatures["serving_default"]
        for serve in (
            ours.serve,
            ours.serve,
            lambda x: signature(inputs=tf.constant(x))["output_0"],
        ):
            close(serve(x), theirs.serve(x))
        close(
            [v.numpy() for v in ours.parameters],
            [v.numpy() for v in theirs.variables],
        )
        close([v.numpy() for v in model.variables], before)

    @parameterized.parameters((None,), ("save_variable_devices",))
    def test_towers_draw_anew_and_their_state_moves_on_once(self, policy):
        model, x, path = noisy(), np.ones([5, 3], "float32"), folder()
        towers.export_towers(model, path, THREE)
        loaded = tf.saved_model.load(
            path,
            options=tf.saved_model.LoadOptions(
                experimental_variable_policy=policy
            ),
        )
        where = "CPU:2$" if policy else "CPU:0$"
        for variable in loaded.parameters:
            self.assertRegex(variable.device, where)
        signature = loaded.signatures["serving_default"]
        said = [
            loaded.serve(x).numpy() - 2.0,
            signature(inputs=tf.constant(x))["output_0"].numpy() - 4.0,
        ]
        rest = np.tile(model.layers[0](x[:1]), [5, 1])
        noise = np.concatenate(said) - np.concatenate([rest] * 2)
        self.assertLen(np.unique(noise.round(4)), 40)  # of rows, towers, calls
        self.assertLess(np.abs(noise).max(), 5)
        names = [v.path.split("/")[-1] for v in model.variables]
        values = dict(zip(names, [v.numpy() for v in loaded.parameters]))
        self.assertEqual(values["total"], 4.0)
        self.assertEqual(values["calls"], 2)
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(loaded.serve(x))
        weights = [v for v in loaded.parameters if v.trainable][:2]
        for gradient in tape.gradient(total, weights):
            self.assertIsNotNone(gradient)

    @parameterized.named_parameters(("towers", THREE), ("no_devices", None))
    def test_a_stateful_rnn_goes_on_from_call_to_call(self, where):
        model = keras.Sequential(
            [
                keras.Input(batch_shape=(4, 2, 3)),
                layers.LSTM(3, stateful=True, return_sequences=True),
                layers.GRU(2, stateful=True),
            ]
        )
        loaded = exported(model, where)
        x = np.random.default_rng(0).normal(size=[4, 2, 3]).astype("float32")
        said = [loaded.serve(x) for _ in range(3)]
        close(said, [model(x) for _ in range(3)])
        self.assertGreater(np.abs(said[0] - said[1]).max(), 1e-3)
        for rows in (1, 5):  # one row would be taken for four
            with self.assertRaisesRegex(TypeError, r"shape=\(4, 2, 3\)"):
                loaded.serve(np.ones([rows, 2, 3], "float32"))


if __name__ == "__main__":
    absltest.main()
