"""Warnings and errors of Keras's own: once, and not hidden by towers'."""

import warnings

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from models import placement

import towers

X, Y = np.ones([4, 3], "float32"), np.ones([4, 1], "float32")


def model(names):
    inputs = {name: keras.Input([3], name=name) for name in names}
    x = sum(inputs.values())
    if len(names) == 1:
        (inputs,) = inputs.values()
    return keras.Model(inputs, keras.layers.Dense(1)(x))


class KerasTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_a_warning_comes_once_and_at_each_trace(self, on_towers):
        towered = towers.TowerModel(
            model("ab"), placement(3), loss_on_towers=on_towers
        )
        for m in (model("ab"), towered):
            m.compile("sgd", "mse")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                m.fit([X, X], Y, verbose=0)
                m.evaluate([X, X], Y, verbose=0)
            messages = [w for w in caught if "structure" in str(w.message)]
            self.assertLen(messages, 2)
            self.assertEndsWith(messages[0].filename, "functional.py")

    @parameterized.parameters(False, True)
    def test_an_input_that_is_missing_is_named(self, on_towers):
        for names, x in (("a", [None]), ("ab", {"a": X, "b": None})):
            plain = model(names)
            towered = towers.TowerModel(
                model(names), placement(2), loss_on_towers=on_towers
            )
            for m in (plain, towered):
                m.compile("sgd", "mse")
            for call in (
                lambda m, x=x: m.fit(x, Y, verbose=0),
                lambda m, x=x: m(x),
            ):
                with self.assertRaises(Exception) as expected:
                    call(plain)
                message = f"The input '{names[-1]}' is not optional"
                if keras.__version__.startswith("3.7."):
                    self.skipTest("Keras 3.7 says something else.")
                self.assertIn(message, str(expected.exception))
                with self.assertRaisesRegex(ValueError, message):
                    call(towered)
