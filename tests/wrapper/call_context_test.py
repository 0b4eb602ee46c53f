"""Arguments that layers register reach those inside, in towers."""

import unittest

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import towers

PLACEMENT = towers.Placement(["/CPU:0", "/CPU:1", "/CPU:2"], weights=[3, 2, 1])
X = np.arange(6, dtype="float32")[:, None]
MODE = "fast"


class Inner(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self._register_call_context_args(MODE)

    def call(self, x, fast=False):
        return x + keras.ops.where(fast, 1.0, 0.0)


class Outer(keras.Model):
    """Passes on what it does not name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return self.inner(x)


def registered(model):
    model._register_call_context_args(MODE)
    return model


def functional():
    x = keras.Input([1])
    return keras.Model(x, Outer(Inner())(x))


MODELS = {
    "subclassed": lambda: Outer(Inner()),
    "sequential": lambda: keras.Sequential([Outer(Inner())]),
    "functional": functional,
}


@unittest.skipUnless(
    hasattr(keras.Layer, "_register_call_context_args"), "since Keras 3.12"
)
class CallContextTest(parameterized.TestCase):
    @parameterized.named_parameters(*MODELS.items())
    @pytest.mark.slow(after=1)
    def test_a_registered_argument_is_given_in_towers(self, factory):
        plain = registered(factory())
        model = towers.TowerModel(registered(factory()), PLACEMENT)
        host = registered(Outer(towers.TowerModel(factory(), PLACEMENT)))
        for x, mode in ((X, True), (X, False), (X[:1], tf.constant(True))):
            want = plain(x, fast=mode)
            np.testing.assert_array_equal(model(x, fast=mode), want)
            # Passed on by a model around the towers, which trace it.
            np.testing.assert_array_equal(host(x, fast=mode), want)
        by_row = tf.constant(X > 2)
        np.testing.assert_array_equal(
            model(X, fast=by_row), plain(X, fast=by_row)
        )

    def test_rows_that_no_tower_gets_are_refused_by_name(self):
        inner = towers.TowerModel(Outer(Inner()), PLACEMENT)
        host = registered(Outer(inner))
        with self.assertRaisesRegex(ValueError, "'fast' from the call"):
            host(X, fast=tf.constant(X > 2))

    def test_a_model_of_symbols_takes_it(self):
        x = keras.Input([1])
        inner = towers.TowerModel(registered(Outer(Inner())), PLACEMENT)
        model = keras.Model(x, inner(x, fast=True))
        np.testing.assert_array_equal(model(X), X + 1)
