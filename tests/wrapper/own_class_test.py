"""Templates of a class of the user's: its metrics, its loss and its `compile`."""

import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, make, placement

import towers

layers = keras.layers
X, Y = np.eye(6, 4, dtype="float32"), np.ones([6, 2], "float32")


class Counting(keras.Model):
    """Keeps metrics as attributes, each updated in another place."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.rows = keras.metrics.Sum(name="rows")
        self.more = {"steps": keras.metrics.Sum(name="steps")}

    def call(self, x):
        self.rows.update_state(tf.reduce_sum(tf.ones_like(x[:, 0])))
        return self.dense(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.more["steps"].update_state(1.0)
        return super().compute_metrics(x, y, y_pred, sample_weight)


class Listing(Counting):
    """Says which of its metrics are reported, and how they are reset."""

    @property
    def metrics(self):
        return [m for m in super().metrics if m.name != "steps"]

    def reset_metrics(self):
        super().reset_metrics()
        self.more["steps"].reset_state()
        self.rows.update_state(0.5)

    def get_metrics_result(self):
        return {**super().get_metrics_result(), "extra": tf.constant(3.0)}


class Phased(keras.Sequential):
    """A loss that says in which phase it was computed."""

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + (100.0 if training else 0.0)


class Unphased(keras.Sequential):
    """The signature of Keras 3.2."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight) + 1.0


class Anyhow(keras.Sequential):
    """Which Keras tells no phase."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + 10.0 * len(kwargs)


class Compiling(keras.Model):
    """Two optimizers and what else its steps need come by `compile`."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(3, activation="tanh")
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(self.hidden(x))

    def compile(self, first, others, factor, *, loss_fn="mse"):
        super().compile(loss=loss_fn, metrics=["mae"])
        self.first = first
        self.others = {"out": others}
        self.factor = factor
        self.told = keras.metrics.Mean(name="told")

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.factor * self.compute_loss(x, y, y_pred)
        weights = [self.hidden.trainable_weights, self.out.trainable_weights]
        first, out = tape.gradient(loss, weights)
        self.first.apply_gradients(zip(first, weights[0]))
        self.others["out"].apply_gradients(zip(out, weights[1]))
        self.told.update_state(loss)
        return self.compute_metrics(x, y, y_pred)


class Factored(keras.Sequential):
    """What a file does not say how to compile."""

    def compile(self, optimizer="sgd", factor=2.0):
        super().compile(optimizer, "mse")
        self.factor = factor

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.factor * self.compute_loss(x, y, self(x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def logs(model, **kwargs):
    """What fit and evaluate say, in three batches of 2 rows."""
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], **kwargs)
    fitted = model.fit(
        X,
        Y,
        batch_size=2,
        epochs=3,
        validation_data=(X, Y),
        shuffle=False,
        verbose=0,
    )
    evaluated = model.evaluate(X, Y, batch_size=4, return_dict=True, verbose=0)
    names = [metric.name for metric in model.metrics]
    return fitted.history, evaluated, names


def both(model):
    """A plain and a towered model of the same weights."""
    return make(model), towers.TowerModel(make(model), placement(3, [2, 1, 1]))


class MetricsTest(parameterized.TestCase):
    @parameterized.parameters(Counting, Listing)
    @pytest.mark.slow(after=1)
    def test_metrics_that_are_attributes_are_told_and_reset(self, model):
        expected, actual = (logs(m) for m in both(model))
        self.assertEqual(actual[0].keys(), expected[0].keys())
        self.assertIn("rows", expected[0])
        self.assertEqual(actual[2], expected[2])
        close(actual[:2], expected[:2])

    @pytest.mark.rare
    def test_a_metric_that_no_tower_updates_crosses_to_none(self):
        def transfers(keep):
            model = keras.Sequential([keras.Input([4]), layers.Dense(2)])
            if keep:
                model.kept = keras.metrics.Mean()
            model = towers.TowerModel(model, placement(3))
            model.compile("sgd", "mse")
            report = towers.execution_report(model.train_on_batch, X, Y)
            return len(report.transfers)

        self.assertEqual(transfers(keep=True), transfers(keep=False))

    def test_a_wrapper_s_own_metrics_come_with_the_template_s(self):
        class Wrapper(towers.TowerModel):
            def __init__(self, *args):
                super().__init__(*args)
                self.mine = keras.metrics.Mean(name="mine")

        model = Wrapper(Counting(), placement(2))
        names = [metric.name for metric in model.metrics]
        self.assertEqual(names, ["mine", "rows", "steps"])


class AttributesTest(absltest.TestCase):
    def test_what_is_set_on_the_wrapper_is_set_on_the_template(self):
        class Scaled(keras.Model):
            scale, merge = 1.0, None

            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(2)
                self.shift = 0.0
                self.merge = layers.Add()

            def call(self, x):
                x = self.dense(x)
                return self.merge([x * self.scale, x * 0.0 + self.shift])

        expected, actual = both(Scaled)
        for model in (expected, actual):
            model.scale, model.shift = 3.0, 1.0
            model.compile("sgd", "mse")
            model.fit(X, Y, verbose=0)
        close(actual(X), expected(X))
        self.assertIsInstance(actual.template.merge, layers.Add)
        self.assertEqual(actual.merge, "concat")
        self.assertFalse(actual.template.compiled)

    def test_a_subclass_of_the_wrapper_keeps_its_own(self):
        class Wrapper(towers.TowerModel):
            def __init__(self, *args):
                super().__init__(*args)
                self.mine = 3

            def call(self, inputs, training=None, mask=None):
                return 2.0 * super().call(inputs, training=training, mask=mask)

        template = Counting()
        model = Wrapper(template, placement(2))
        self.assertFalse(hasattr(template, "mine"))
        close(model(X), 2.0 * template(X))


class ComputeLossTest(parameterized.TestCase):
    @parameterized.parameters(Phased, Unphased, Anyhow)
    @pytest.mark.rare
    def test_it_is_told_the_phase_as_keras_tells_it(self, model):
        def template():
            return model([keras.Input([4]), layers.Dense(2)])

        expected, actual = (logs(m) for m in both(template))
        close(actual[:2], expected[:2])


class CompileTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_a_compile_of_its_own_is_its_own(self, before):
        where = placement(3, [2, 1, 1], parameter_device="/CPU:3")
        results, entries = [], []
        for towered in (False, True):
            model = template = make(Compiling)
            if towered and not before:
                model = towers.TowerModel(model, where)
            model.compile(
                keras.optimizers.SGD(0.1, momentum=0.5),
                others=keras.optimizers.Adam(0.1),
                factor=2.0,
                loss_fn="mae",
            )
            if towered and before:
                model = towers.TowerModel(model, where)
            fitted = model.fit(
                X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0
            )
            entries += [fitted.history, model.evaluate(X, Y, verbose=0)]
            results.append(template)
        close(entries[2:], entries[:2])
        kept = [
            [*m.variables, *m.first.variables, *m.others["out"].variables]
            for m in results
        ]
        close(*([v.numpy() for v in variables] for variables in kept[::-1]))
        for variable in kept[1]:
            self.assertEndsWith(variable.value.device, "CPU:3", variable.path)
        self.assertFalse(model.optimizer.built)  # Keras's, which no one uses
        file = os.path.join(tempfile.mkdtemp(), "model")
        file = tf.train.Checkpoint(model=model).save(file)
        status = tf.train.Checkpoint(model=results[0]).restore(file)
        status.assert_consumed()

    def test_a_loaded_one_is_compiled_in_its_own_way(self):
        saved = Factored([keras.Input([4]), layers.Dense(2)])
        saved.compile()
        file = os.path.join(tempfile.mkdtemp(), "model.keras")
        saved.save(file)
        results = []
        for where in (None, placement(2), placement(3, [3, 2, 1])):
            with self.assertWarnsRegex(UserWarning, "is custom"):
                model = keras.saving.load_model(
                    file, custom_objects={"Factored": Factored}
                )
            if where is not None:
                model = towers.TowerModel(model, where)
            with self.assertRaisesRegex(AttributeError, "'factor'"):
                model.fit(X, Y, verbose=0)  # which Keras calls compiled
            model.compile(keras.optimizers.SGD(0.1), factor=3.0)
            fitted = model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
            results.append([fitted.history, model.get_weights()])
        for actual in results[1:]:
            close(actual, results[0])
