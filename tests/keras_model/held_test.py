"""Layers that keep a SavedModel, or a tf.Module, under a head that is trained."""

import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[7, 3]).astype("float32")


class Body(tf.Module):
    """What others have trained."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(tf.ones([3, 4]) * 0.3)
        self.calls = tf.Variable(0, trainable=False)

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def serve(self, x):
        return tf.tanh(tf.matmul(x, self.kernel))

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def count(self, x):
        self.calls.assign_add(1)
        return self.serve(x)


class Holder(layers.Layer):
    def __init__(self, endpoint="serve", **kwargs):
        super().__init__(**kwargs)
        self.parts = {"body": [Body()]}
        self.endpoint = endpoint

    def call(self, x):
        return getattr(self.parts["body"][0], self.endpoint)(x)


def loaded(**kwargs) -> keras.Layer:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "body")
        tf.saved_model.save(Body(), path)
        return layers.TFSMLayer(path, name="held", **kwargs)


def held(**kwargs) -> keras.Layer:
    return Holder(name="held", **kwargs)


def under_a_head(layer: keras.Layer) -> keras.Model:
    """The layer between two that are trained."""
    x = keras.Input([3])
    return keras.Model(x, layers.Dense(2)(layer(layers.Dense(3)(x))))


KINDS = [("saved_model", loaded), ("module", held)]


class HeldTest(parameterized.TestCase):
    @parameterized.named_parameters(
        *(
            (f"{name}_{n}", kind, where)
            for name, kind in KINDS
            for n, where in [
                ("two", placement(2)),
                ("three", placement(3, [3, 2, 1])),
            ]
        )
    )
    @pytest.mark.slow(of=["saved_model_two"])
    def test_frozen_it_is_read_where_it_is(self, kind, where):
        models = pair(lambda: under_a_head(kind(trainable=False)), where)
        same_fit(models, X, X[:, :2], batch_size=4)

    @parameterized.named_parameters(KINDS)
    def test_trainable_it_is_refused_by_name(self, kind):
        model = towers.TowerModel(under_a_head(kind()), placement(2))
        close(model(X), model.template(X))
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "'held' is trainable.*`traina"):
            model.fit(X, X[:, :2], verbose=0)

    def test_it_reads_what_is_loaded_into_it(self):
        def frozen():
            return under_a_head(loaded(trainable=False))

        plain, template = make(frozen), make(frozen)
        where = placement(2, parameter_device="/CPU:2")
        in_towers = towers.TowerModel(template, where)
        for model in (plain, in_towers):
            model.set_weights([2 * w for w in make(frozen).get_weights()])
        close(in_towers(X), plain(X))

    def test_what_changes_in_each_tower_is_refused(self):
        layer = Holder("count", trainable=False)
        model = keras.Sequential([keras.Input([3]), layer])
        with self.assertRaisesRegex(ValueError, "tower_0/holder.*add_weight"):
            towers.build_towers(model, X, placement(2))
        towers.build_towers(model, X, placement(1))
        self.assertEqual(layer.parts["body"][0].calls.numpy(), 1)

    def test_xla_is_refused(self):
        model = towers.TowerModel(
            under_a_head(held(trainable=False)), placement(2)
        )
        with self.assertRaisesRegex(ValueError, "'held' reads 'Variable:0'"):
            model.compile("sgd", "mse", jit_compile=True)
