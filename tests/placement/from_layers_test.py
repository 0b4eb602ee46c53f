"""Layers that were made under devices run where they were made."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from models import chain, cnn
from same import same_fit

import towers

layers = keras.layers
RNG = np.random.default_rng(0)


def two_branches() -> keras.Model:
    x = keras.Input([6])
    with tf.device("/CPU:1"):
        inner = chain(
            [6], layers.Dense(9, "tanh"), layers.Dense(4), name="left"
        )
        left = inner(x)
    with tf.device("/CPU:2"):
        right = layers.Dense(4, "tanh", name="right")(x)
        heads = layers.MultiHeadAttention(2, 2, name="heads")
        right = heads(right[:, None], right[:, None])[:, 0]
    return keras.Model(x, layers.Concatenate(name="both")([left, right]))


class FromLayersTest(absltest.TestCase):
    @pytest.mark.rare
    def test_each_branch_trains_on_its_device(self):
        plain, model = two_branches(), two_branches()
        model.set_weights(plain.get_weights())
        placement = towers.Placement.from_layers(model)
        self.assertEqual(placement.devices, ("/CPU:2",))  # most bytes
        model = towers.TowerModel(model, placement)
        x, y = (RNG.normal(size=[5, n]).astype("float32") for n in (6, 8))
        for m in (plain, model):
            m.compile(keras.optimizers.SGD(0.1), "mse")
        report = towers.execution_report(
            lambda: model.fit(x, y, batch_size=5, verbose=0, shuffle=False)
        )
        for device, paths in (
            (
                "/CPU:1",
                [layer.name for layer in model.get_layer("left").layers],
            ),
            ("/CPU:2", ["right", "heads", "both"]),
        ):
            for path in paths:
                scope = f"left/{path}" if device == "/CPU:1" else path
                report.assert_runs_on(f"tower_0/{scope}", device)
        self.assertEqual({*report.parameter_bytes}, {"/CPU:1", "/CPU:2"})
        same_fit((plain, model), x, y, optimizer=None, batch_size=3)

    def test_towers_elsewhere_and_what_else_a_placement_takes(self):
        placement = towers.Placement.from_layers(
            two_branches(), ["/CPU:0", "/CPU:3"], weights=[2, 1]
        )
        self.assertEqual(placement.parameter_device, "/CPU:0")
        self.assertEqual(placement.layer_devices["right"], "/CPU:2")

    def test_what_cannot_be_told_is_refused(self):
        class Both(layers.Layer):
            def build(self, _):
                for i in range(2):
                    with tf.device(f"/CPU:{i}"):
                        self.add_weight(shape=[2], name=f"w{i}")

            def call(self, x):
                return x

        several = chain([2], Both(name="both"))
        for model, message in (
            (several, "both.*on /CPU:0, /CPU:1"),
            (keras.Sequential([layers.Dense(2)]), "not built"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                towers.Placement.from_layers(model)
        with self.assertRaisesRegex(TypeError, "keras.Model"):
            towers.Placement.from_layers(layers.Dense(2))
        with self.assertRaisesRegex(TypeError, "itself"):
            towers.Placement.from_layers(cnn(), layer_devices={})
