"""Training a model that is not built yet, in the ways that Keras does it."""

import os
import tempfile

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from models import Subclassed, close, make, placement

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[7, 4]).astype("float32")
Y = np.random.default_rng(1).normal(size=[7, 2]).astype("float32")


def sequential():
    return keras.Sequential([layers.Dense(3), layers.Dense(2)])


class Predict(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["predicted"] = self.model.predict(X, batch_size=3, verbose=0)
        logs["called"] = self.model(X)


def fitted(model, **kwargs):
    history = model.fit(
        X, Y, batch_size=3, epochs=2, shuffle=False, verbose=0, **kwargs
    )
    return history.history  # batches of 3, 3 and 1


def validated(model):
    return fitted(model, validation_data=(X, Y), callbacks=[Predict()])


def evaluated_first(model):
    return [model.evaluate(X, Y, verbose=0), fitted(model)]


def on_batches(model):
    return [
        model.test_on_batch(X, Y),
        model.train_on_batch(X, Y),
        model.predict_on_batch(X),
        model.train_on_batch(X[:1], Y[:1]),
    ]


class UnbuiltTest(parameterized.TestCase):
    @parameterized.parameters(
        (Subclassed, validated),
        (sequential, evaluated_first),
        (Subclassed, on_batches),
        (sequential, fitted, {"run_eagerly": True}),
    )
    @pytest.mark.rare
    def test_it_is_built_on_the_way(self, model, train, options=None):
        where = placement(3, [2, 1, 1], parameter_device="/CPU:3")
        expected = make(model)
        actual = towers.TowerModel(make(model), where)
        results = []
        for m in (expected, actual):
            sgd = keras.optimizers.SGD(0.05, momentum=0.5)
            m.compile(sgd, "mse", metrics=["mae"], **options or {})
            results.append(train(m))
        close(results[1], results[0])
        close(actual.get_weights(), expected.get_weights())
        depths = [
            [v.path.count("/") for v in m.variables] for m in (actual, expected)
        ]
        self.assertEqual(*depths)  # optimizers go by paths
        for variable in (*actual.variables, *actual.optimizer.variables):
            self.assertEndsWith(variable.value.device, "CPU:3")

    def test_it_is_built_by_its_shape_as_plain_keras_does(self):
        where = placement(2, parameter_device="/CPU:3")
        plain = make(sequential)
        model = towers.TowerModel(make(sequential), where)
        results = []
        for m in (plain, model):
            m.build([None, 4])
            results.append([(v.shape, v.path.count("/")) for v in m.weights])
            self.assertLen(m.weights, 4)
        self.assertEqual(*results)
        for variable in model.weights:
            self.assertEndsWith(variable.value.device, "CPU:3")

    def test_fit_goes_on_with_variables_that_a_callback_moved(self):
        class Move(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                elsewhere = placement(2, parameter_device="/CPU:1")
                towers.TowerModel(self.model.template, elsewhere)
                logs["called"] = self.model(X)

        model = make(sequential)
        model.build([None, 4])
        model = towers.TowerModel(model, placement(2))
        model.compile("sgd", "mse")
        called = fitted(model, callbacks=[Move()])["called"]
        self.assertFalse(np.allclose(called[0], called[1]))
        close(called[1], model.template(X))


class SavingTest(absltest.TestCase):
    def test_what_was_built_on_towers_is_saved_as_the_template(self):
        model = keras.Sequential([keras.layers.Dense(2)])
        towered = towers.TowerModel(model, placement(3), loss_on_towers=True)
        towered.compile("sgd", "mse")
        x = np.ones([4, 3], "float32")
        towered.fit(x, x[:, :2], verbose=0)
        path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
        towered.save_weights(path)
        plain = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        plain.load_weights(path)
        close(plain(x), model(x))
