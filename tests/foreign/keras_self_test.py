"""TemplateSelf: what Keras keeps in a model that it compiles and trains."""

import inspect

import keras
import numpy as np
from absl.testing import absltest

from towers.foreign import keras_self

layers = keras.layers


class NamesTest(absltest.TestCase):
    def test_what_compile_leaves_in_a_model(self):
        model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
        before = dict(vars(model))
        model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
        changed = {
            name
            for name, value in vars(model).items()
            if before.get(name, ()) is not value
        }
        changed -= {"_jit_compile"}  # False, if Keras has asked before
        self.assertLessEqual(changed, set(keras_self._OF_COMPILE))

    def test_what_training_leaves_in_a_model(self):
        class Mine(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(2)

            def call(self, x):
                return self.dense(x)

            def train_step(self, data):
                names.extend(vars(self))
                return super().train_step(data)

        names = []
        model, (x, y) = Mine(), (np.ones([4, 3]), np.ones([4, 2]))
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(x, y, validation_data=(x, y), verbose=0)
        names = {*names, *vars(model)}
        others = {x for x in names if not keras_self.is_kept_by_keras(x)}
        self.assertEqual(others, {"dense"})

    def test_classes_of_keras_are_not_the_user_s(self):
        class Mine(keras.Sequential):
            def add(self, layer):
                super().add(layer)

        inputs = keras.Input([3])
        functional = keras.Model(inputs, layers.Dense(2)(inputs))
        for model in (functional, keras.Sequential([inputs])):
            self.assertFalse(keras_self.is_own(type(model)))
            for name in ("call", "add", "get_config", "operations"):
                own = keras_self.own_attribute(model, name)
                self.assertTrue(keras_self.is_absent(own), name)
        self.assertTrue(keras_self.is_own(Mine))
        own = keras_self.own_attribute(Mine(), "add")
        self.assertIs(own, inspect.getattr_static(Mine, "add"))
