"""mixed_rows: a layer that makes its outputs of all rows is told of, by name."""

import re
import warnings

import keras
import tensorflow as tf
from absl.testing import absltest
from models import placement

import towers

layers, ops = keras.layers, keras.ops

MIXING = {
    "along": lambda x: ops.cumsum(x, 0),
    "by_a_product": lambda x: x * ops.einsum("nd,nd->d", x, x),
    "backwards": lambda x: x[::-1],
    "by_places": lambda x: x + ops.take(x, [0], 0),
    "centred": lambda x: x - ops.mean(x, 0),
    "counts": lambda x: x * ops.cast(ops.count_nonzero(x > 0), "float32"),
    "covariance": lambda x: x @ (ops.transpose(x) @ x),
    "deviation": lambda x: x / (1.0 + ops.std(x, 0)),
    "differences": lambda x: ops.pad(x[1:] - x[:-1], [[0, 1], [0, 0]]),
    "first": lambda x: x - x[0],
    "flipped": lambda x: x + ops.flip(x, 0),
    "largest": lambda x: x / ops.max(ops.abs(x)),
    "likeness": lambda x: ops.softmax(x @ ops.transpose(x)) @ x,
    "product": lambda x: x * ops.tensordot(x, x, 2),
    "rolled": lambda x: x - ops.roll(x, 1, 0),
    "scaled": lambda x: ops.tanh(x / ops.cast(ops.shape(x)[0], x.dtype)),
    "shares": lambda x: ops.reshape(
        ops.softmax(ops.reshape(x, [-1, 2, 3]), 0), [-1, 6]
    ),
    "sorted": lambda x: ops.sort(x, 0),
}
ROW_BY_ROW = {
    "attention": lambda x: ops.matmul(x[..., None], x[:, None])[:, 0],
    "axes": lambda x: ops.transpose(ops.transpose(x) - ops.mean(x, -1)),
    "by_row": lambda x: ops.einsum("nd,nd->n", x, x)[:, None] * x,
    "counted_in_a_row": lambda x: (
        x / ops.cast(ops.size(x) / ops.shape(x)[0], "float32")
    ),
    "each": lambda x: tf.vectorized_map(lambda row: row * 2, x),
    "in_two": lambda x: ops.concatenate([x[:1] * 2, x[1:] * 2], 0),
    "numbered": lambda x: (
        ops.take_along_axis(x, ops.zeros([ops.shape(x)[0], 1], "int32"), 1)
        * x[0:, ::-1]
    ),
    "parts": lambda x: ops.reshape(
        ops.cumsum(ops.reshape(x, [-1, 3]), 1), [-1, 6]
    ),
    "shaped": lambda x: x + tf.zeros_like(x[0]),
    "scaled_twice": lambda x: (
        ops.tanh(x) * (n := ops.cast(ops.shape(x)[0], x.dtype)) / n
    ),
    "softmax": ops.softmax,
    "sorted_in_a_row": lambda x: ops.flip(ops.roll(ops.sort(x, 1), 1, 1), 1),
    "two_views": lambda x: ops.concatenate([x, 2 * x], 0)[: ops.shape(x)[0]],
}


class Of(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


class Asks(layers.Layer):
    needs_all_towers = True

    def call(self, x):
        self.add_loss(ops.mean(x))  # is judged by itself
        return x - towers.all_towers(lambda x: ops.mean(x, 0), x)


class MixedRowsTest(absltest.TestCase):
    def test_what_mixes_rows_is_named_and_nothing_else(self):
        x = keras.Input([6])
        hidden = layers.BatchNormalization()(Asks()(layers.Dense(6)(x)))
        several = [
            Of(function, name=name)(hidden)
            for name, function in {**MIXING, **ROW_BY_ROW}.items()
        ]
        bare = x - ops.mean(x, 0, keepdims=True)
        model = keras.Model(x, [*several, bare], name="model")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = towers.TowerModel(model, placement(3))
            call = tf.function(lambda x: model(x, training=True))
            call.get_concrete_function(tf.TensorSpec([None, 6]))  # as in fit
        messages = [
            re.match("'(.*)' makes its outputs", str(w.message)) for w in caught
        ]
        self.assertCountEqual(
            [match[1] for match in messages if match], [*MIXING, "model"]
        )
