"""guards: nothing listens to plain layers, which are built the same if it does."""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import placement

import towers
from towers.keras_model import guards
from towers.keras_model.layer_graph import LayerGraph

layers = keras.layers
OPTIONS = {
    "Activation": {"activation": "relu"},
    "AveragePooling2D": {"pool_size": 2},
    "Conv2D": {"filters": 3, "kernel_size": 2},
    "Dense": {"units": 3, "activation": "softmax"},
    "DepthwiseConv2D": {"kernel_size": 2},
    "Reshape": {"target_shape": [2, -1]},
}
MERGES = ("Add", "Average", "Concatenate", "Multiply", "Subtract")
X = np.random.default_rng(0).normal(size=[5, 4, 4, 3]).astype("float32")


class Mine(layers.Dense):
    pass


class Model(keras.Model):
    def call(self, x):
        return x


def mine(x, mask=None):
    return x


def model_of(kind):
    """A model with one such layer."""
    keras.utils.set_random_seed(0)
    x = keras.Input([4, 4, 3])
    if kind is keras.Sequential:
        return keras.Sequential([x, layers.Dense(2)])
    if kind is layers.InputLayer:
        return keras.Model(x, layers.Dense(2)(x))
    layer = kind(**OPTIONS.get(kind.__name__, {}))
    y = layer([x, x] if kind.__name__ in MERGES else x)
    return keras.Model(x, layers.Dense(2)(y))


def made_of(model, training):
    """Each op of a step, with what it is, what it takes and where it is."""

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, x, placement(2), training)
            loss = tf.reduce_sum(graph.outputs)
        weights = [v.value for v in model.trainable_variables]
        return graph.updates, tape.gradient(loss, weights)

    spec = tf.TensorSpec([None, *X.shape[1:]])
    return [
        (op.name, op.type, op.device, *(x.name for x in op.inputs))
        for op in step.get_concrete_function(spec).graph.get_operations()
    ]


def changed(attribute, value):
    layer = layers.Dense(2)
    setattr(layer, attribute, value)
    return layer


def recomputed():
    with keras.RematScope("full"):
        return layers.Dense(2)


class PlainTest(parameterized.TestCase):
    @parameterized.parameters(
        layers.BatchNormalization, layers.Conv2D, layers.Dense
    )
    def test_a_plain_layer_is_built_the_same_if_something_listens(self, kind):
        self.check(kind)

    @parameterized.parameters(*guards._PLAIN)
    @pytest.mark.rare
    def test_so_is_each(self, kind):
        self.check(kind)

    def check(self, kind):
        model = model_of(kind)
        self.assertTrue(guards.is_plain(LayerGraph(model), tf.constant(X)))
        plain = made_of(model, training=True)
        with mock.patch.object(guards, "is_plain", return_value=False):
            self.assertEqual(plain, made_of(model, training=True))

    @parameterized.parameters(
        (layers.Dropout(0.5),),
        (layers.Masking(),),
        (layers.Lambda(mine),),
        (Mine(2),),
        (layers.Dense(2, activation=mine),),
        (layers.Dense(2, kernel_regularizer=mine),),
        (layers.Dense(2, activation=layers.Dropout(0.5)),),
        (layers.Conv2D(2, 2, data_format="channels_first"),),
        (layers.Dense(2, dtype="float8_from_float32"),),
        (changed("call", mine),),
        (changed("compute_mask", mine),),
        (changed("kept", mine),),
        (keras.Sequential([Mine(2)]),),
        (recomputed(),),
    )
    def test_of_others_it_is_not_known(self, layer):
        model = keras.Sequential([keras.Input([4, 4, 3]), layer])
        self.assertFalse(guards.is_plain(LayerGraph(model), tf.constant(X)))

    def test_nor_of_other_inputs_and_what_is_no_layer(self):
        x = keras.Input([4, 4, 3])
        ragged, dense = tf.ragged.constant([[1.0]]), tf.constant(X)
        for model, given in [
            (keras.Model(x, layers.Dense(2)(x)), [dense, ragged]),
            (keras.Model(x, layers.Dense(2)(x + x)), dense),
            (Model(), dense),
        ]:
            self.assertFalse(guards.is_plain(LayerGraph(model), given))
