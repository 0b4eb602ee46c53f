"""compare: towers are told from the plain model, and nothing is changed by it."""

import random
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import NAMED, cnn, inputs, make, placement, targets

import towers
from towers.foreign.keras_layers import raw

layers = keras.layers
X = np.random.default_rng(0).normal(size=[9, 3]).astype("float32")
Y = np.random.default_rng(1).normal(size=[9, 2])


class Centered(layers.Layer):
    """Subtracts the batch's mean."""

    def call(self, x):
        return x - tf.reduce_mean(x, 0)


class CenteredInTraining(layers.Layer):
    def call(self, x, training=False):
        return x - tf.reduce_mean(x, 0) if training else x


class Asking(layers.Layer):
    needs_all_towers = True

    def call(self, x):
        return x - towers.all_towers(lambda x: tf.reduce_mean(x, 0), x)


@tf.custom_gradient
def mixing_backwards(x):
    return tf.identity(x), lambda g: g - tf.reduce_mean(g, 0)


class Drawing(layers.Layer):
    """Draws what no seed decides."""

    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def around(layer, optimizer="sgd"):
    """A compiled model with a layer in its midst."""
    stack = [keras.Input([3]), layers.Dense(4), layer(), layers.Dense(2)]
    model = keras.Sequential(stack)
    if optimizer:
        model.compile(optimizer, "mse")
    return model


class CompareTest(parameterized.TestCase):
    def check(self, model, x, y=None, **options):
        """Compares; nothing of the model is changed by it."""
        variables = [
            *model.variables,
            *(model.optimizer.variables if model.compiled else ()),
        ]
        before = [(raw(v), v.numpy()) for v in variables]
        state = random.getstate(), str(np.random.get_state())
        built = model.compiled and model.optimizer.built
        comparison = towers.compare(
            model, placement(3, [2, 1, 1]), x, y, **options
        )
        for variable, (own, value) in zip(variables, before, strict=True):
            self.assertIs(raw(variable), own)
            np.testing.assert_array_equal(variable.numpy(), value)
        self.assertEqual((random.getstate(), str(np.random.get_state())), state)
        self.assertEqual(model.compiled and model.optimizer.built, built)
        self.assertEqual(comparison.equal, "Not equal" not in str(comparison))
        return comparison

    @parameterized.parameters(
        (Centered, "predictions", "centered", "rows are mixed"),
        (CenteredInTraining, "outputs", "in_training", "rows are mixed"),
        (
            layers.BatchNormalization,
            "outputs",
            "batch_norm",
            "synchronized=True",
        ),
        (
            lambda: layers.Lambda(mixing_backwards),
            *("gradients", "", "No layer's outputs differ.* of the gradients"),
        ),
    )
    @pytest.mark.slow(after=1)
    @pytest.mark.rare(after=2)
    @pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
    def test_a_difference_is_found_and_the_layer_named(
        self, layer, kind, suspect, reason
    ):
        comparison = self.check(around(layer), X, Y)
        self.assertFalse(comparison.equal)
        self.assertIn(kind, repr(comparison))
        self.assertIn("DIFFERENT", comparison._repr_html_())
        first = next(one for one in comparison.figures if not one.equal)
        self.assertEqual(first.kind, kind)
        self.assertIn(suspect, comparison.suspect)
        self.assertRegex(comparison.reason, reason)
        self.assertIn(comparison.reason, str(comparison))

    @parameterized.parameters(
        (lambda: layers.Dropout(0.5), {}),
        (layers.BatchNormalization, {"synchronized": True}),
        (Asking, {}),
    )
    @pytest.mark.rare
    def test_what_is_equal_is_said_to_be(self, layer, options):
        comparison = self.check(around(layer, "adam"), X, Y, **options)
        self.assertTrue(comparison.equal, str(comparison))
        self.assertEqual([*comparison.ops], [f"/CPU:{i}" for i in range(3)])
        self.assertEqual((comparison.suspect, comparison.reason), ("", ""))

    @parameterized.named_parameters(*NAMED)
    @pytest.mark.rare
    def test_every_model_passes(self, model):
        plain = make(model)
        plain.compile(keras.optimizers.SGD(0.1, 0.9), "mse")
        x = inputs(plain, 7)
        comparison = self.check(plain, x, targets(plain, 7))
        self.assertTrue(comparison.equal, str(comparison))

    @pytest.mark.rare
    def test_without_a_loss_it_is_that_of_the_outputs(self):
        for optimizer in (None, "sgd"):
            comparison = self.check(around(layers.ReLU, optimizer), X)
            self.assertTrue(comparison.equal, str(comparison))
            self.assertRegex(
                comparison.notes[0], "mean of the outputs' squares"
            )

    @pytest.mark.rare
    @pytest.mark.filterwarnings("ignore:.*draws random numbers")
    def test_what_is_not_even_equal_to_itself_is_not_called_equal(self):
        comparison = self.check(around(Drawing), X, Y)
        self.assertFalse(comparison.equal)
        self.assertIn("not even equal to itself", comparison.reason)

    @pytest.mark.rare
    def test_a_wrapped_model_is_compared_as_it_is_wrapped(self):
        model = around(layers.BatchNormalization)
        where = placement(2, parameter_device="/CPU:3")
        wrapped = towers.TowerModel(model, where, synchronized=True)
        wrapped.fit(X, Y, verbose=0)  # slots, and a step that is not the first
        comparison = towers.compare(wrapped, where, X, Y)
        self.assertTrue(comparison.equal, str(comparison))
        for variable in (*wrapped.variables, *wrapped.optimizer.variables):
            self.assertEndsWith(raw(variable).device, "CPU:3")

    def test_a_wrapped_model_has_the_loss_that_it_was_compiled_to(self):
        keras.utils.set_random_seed(1)
        model = around(layers.ReLU, None)
        wrapped = towers.TowerModel(model, placement(2))
        wrapped.compile("adam", "mae")
        comparison = towers.compare(wrapped, placement(2), X, Y)
        self.assertTrue(comparison.equal, str(comparison))
        self.assertEqual(comparison.notes, ())  # of no other loss
        self.assertIsNotNone(comparison.weights)

    @parameterized.parameters(
        (lambda: cnn, {}, TypeError, "keras.Model"),
        (lambda: around(layers.ReLU), {"mood": 1}, TypeError, "option mood"),
        (keras.Model, {}, ValueError, "has no `call`"),
        (
            lambda: keras.Sequential([layers.Dense(1)]),
            {},
            ValueError,
            "not built",
        ),
    )
    def test_it_refuses(self, model, options, error, message):
        with self.assertRaisesRegex(error, re.compile(message)):
            towers.compare(model(), placement(2), X, **options)
