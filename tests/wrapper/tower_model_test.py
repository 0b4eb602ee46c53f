"""TowerModel and to_multi_gpu: Keras's own fit, with the plain numbers."""

import os
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from models import (
    attention,
    chain,
    close,
    cnn,
    inputs,
    make,
    nested,
    placement,
    recurrent,
    subclassed,
    targets,
    two_by_two,
    unrolled,
)
from same import pair, same_fit

import towers

layers = keras.layers


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.5)


HOW = {"optimizer": sgd, "batch_size": 5, "epochs": 2}


def trained(model, x, y, **kwargs):
    """Two epochs of a model in towers."""
    model.compile(sgd(), "mse")
    kwargs = {"batch_size": 5, "epochs": 2, **kwargs}
    model.fit(x, y, shuffle=False, verbose=0, **kwargs)


class FitTest(parameterized.TestCase):
    @parameterized.parameters(cnn, recurrent, two_by_two)
    @pytest.mark.slow(after=2)
    def test_weights_after_fit_are_the_plain_model_s(self, model):
        self.check(model)

    @parameterized.parameters(attention, nested, unrolled, subclassed)
    @pytest.mark.rare
    def test_so_of_other_models(self, model):
        self.check(model)

    def check(self, model):
        models = pair(model, placement(3, [2, 0, 1]))
        x, y = inputs(models[0], 11), targets(models[0], 11)
        same_fit(models, x, y, **HOW)  # batches of 5, 5 and 1

    def test_a_weight_assigned_in_a_call_trains_as_assigned(self):
        def model():
            return chain([4], layers.SpectralNormalization(layers.Dense(3)))

        models = pair(model, placement(3))
        x, y = inputs(models[0], 8), targets(models[0], 8)
        same_fit(models, x, y, **HOW)

    def test_what_an_optimizer_assigns_to_new_slots_goes_as_in_plain_keras(
        self,
    ):
        class Begun(keras.optimizers.SGD):  # as ScheduleFreeAdamW begins
            def build(self, variables):
                super().build(variables)
                for momentum in self.momentums:
                    self.assign(momentum, momentum + 1.0)

        models = pair(lambda: chain([4], layers.Dense(3)), placement(2))
        x, y = inputs(models[0], 8), targets(models[0], 8)
        as_keras_fits = {"run_eagerly": False}  # the plain one, too
        optimizer = lambda: Begun(0.1, 0.5)  # noqa: E731
        same_fit(models, x, y, optimizer=optimizer, compiling=as_keras_fits)

    def test_evaluate_predict_and_train_on_batch(self):
        expected, actual = make(cnn), make(cnn)
        actual = towers.TowerModel(actual, placement(3))
        x, y = inputs(expected, 7), targets(expected, 7)
        for m in (expected, actual):
            m.compile(
                keras.optimizers.SGD(0.1),
                "mse",
                metrics=["mae"],
                run_eagerly=m is expected,
            )
        for call in (
            lambda m: m.train_on_batch(x, y),
            lambda m: m.evaluate(x, y, batch_size=3, verbose=0),
            lambda m: m.predict(x, batch_size=3, verbose=0),
            lambda m: m.predict_on_batch(x),
            lambda m: m(x),
        ):
            close(call(actual), call(expected))

    def test_an_unbuilt_template_is_built_by_fit(self):
        model = keras.Sequential([layers.Dense(3), layers.Dense(1)])
        where = placement(2, parameter_device="/CPU:2")
        actual = towers.TowerModel(model, where)
        trained(actual, np.ones([6, 4], "float32"), np.ones([6, 1], "float32"))
        for variable in (*actual.variables, *actual.optimizer.variables):
            self.assertEndsWith(variable.value.device, "CPU:2")

    def test_mixed_precision_keeps_its_dtypes(self):
        def model():
            return chain(
                [4],
                layers.Dense(
                    *(8, "relu"), dtype="mixed_bfloat16", trainable=False
                ),
                layers.BatchNormalization(dtype="mixed_bfloat16"),
                layers.Dense(2, dtype="float32"),
                dtype="float32",
            )

        models = pair(model, placement(2))
        x, y = np.ones([6, 4], "float32"), np.ones([6, 2], "float32")
        how = {**HOW, "tolerance": 2e-3, "histories": 2e-3}
        same_fit(models, x, y, **how)

    def test_fit_with_dropout_repeats_with_the_seed(self):
        def model():
            return chain([8], layers.Dropout(0.5), layers.Dense(2))

        def weights(seed):
            actual = towers.TowerModel(make(model, seed), placement(3))
            x = inputs(actual.template, 11)
            trained(actual, x, np.ones([11, 2], "float32"), batch_size=8)
            return actual.get_weights()  # batches of 8 and 3

        close(weights(1), weights(1), 0)


class PlacedTest(parameterized.TestCase):
    def test_a_fit_step_ran_where_it_was_put(self):
        model = make(cnn)
        x, y = inputs(model, 9), targets(model, 9)
        actual = towers.TowerModel(model, placement(3))
        actual.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(9)

        executed = Executed(lambda: actual.fit(data, verbose=0))
        self.assertEqual(
            executed.heavy(), {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
        )
        # To each other tower: all weights, the shard, the outputs' gradient.
        # From each: outputs, and all gradients.
        self.assertLen(executed.sends(), 2 * (3 + 2))

    @pytest.mark.slow
    def test_sixty_small_variables_cross_in_a_few_tensors(self):
        model = make(lambda: chain([4], *[layers.Dense(4) for _ in range(30)]))
        devices = [f"/CPU:{i}" for i in range(3)]
        where = placement(3, parameter_device=towers.balanced(devices))
        actual = towers.TowerModel(model, where)
        actual.compile("adam", "mse")
        x, y = inputs(model, 7), np.ones([7, 4])
        report = towers.execution_report(actual.train_on_batch, x, y)
        for device in devices:
            met = [
                t for t in report.transfers if device in (t.source, t.target)
            ]
            self.assertLessEqual(len(met), 24)
        self.assertLessEqual(report.total_bytes, 1.02 * report.least_bytes)

    def test_all_statistics_of_a_tower_cross_at_once(self):
        model = make(
            lambda: chain(
                [8, 8, 2],
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.BatchNormalization(center=False, scale=False),
                layers.Flatten(),
                layers.Dense(3),
            )
        )
        actual = towers.TowerModel(model, placement(3))
        actual.compile("sgd", "mse")
        x, y = inputs(model, 7), targets(model, 7)
        report = towers.execution_report(actual.train_on_batch, x, y)
        # Down: weights, shard, output gradient. Up: gradients, output, and the
        # moments of both layers.
        self.assertLen(report.transfers, 2 * (3 + 3))

    @parameterized.parameters(False, True)
    def test_a_step_is_traced_once(self, on_towers):
        calls = []

        class Noted(layers.Layer):
            def call(self, x):
                calls.append(tf.executing_eagerly())
                return x * 2.0

        model = chain([2], Noted(), layers.Dense(1))
        actual = towers.TowerModel(
            model, placement(2), loss_on_towers=on_towers
        )
        actual.compile("sgd", "mse", metrics=["mae"])
        calls.clear()
        x, y = np.ones([4, 2]), np.ones([4, 1])
        actual.fit(x, y, verbose=0)
        self.assertLen(calls, 2)  # in each tower

    def test_variables_slots_and_arithmetic_are_on_the_parameter_device(self):
        with tf.device("/CPU:3"):
            model = make(cnn)
        values = model.get_weights()
        where = placement(2, parameter_device="/CPU:1")
        actual = towers.TowerModel(model, where)
        close(actual.get_weights(), values, 0)
        actual.compile(keras.optimizers.Adam(weight_decay=0.1), "mse")
        x, y = inputs(model, 4), targets(model, 4)
        executed = Executed(lambda: actual.fit(x, y, verbose=0))
        for variable in (*actual.variables, *actual.optimizer.variables):
            self.assertEndsWith(variable.value.device, "CPU:1")
        self.assertEqual(executed.devices(r"adam\w*/", "Mul|Sqrt"), {"/CPU:1"})

    @pytest.mark.rare
    def test_parameters_on_a_third_device_cost_no_more(self):
        self.check(cnn, 2)

    @parameterized.product(model=(cnn, recurrent), n=(1, 3))
    @pytest.mark.rare
    def test_and_of_any_number_of_towers(self, model, n):
        self.check(model, n)

    def check(self, model, n):
        counts = []
        for order in ("0123", "3120"):
            # Towers on devices 1, 2 and the last, parameters on the first.
            names = [f"/CPU:{i}" for i in order]
            where = towers.Placement(
                names[1 : 1 + n], parameter_device=names[0]
            )
            actual = towers.TowerModel(make(model), where)
            actual.compile("adam", "mse", metrics=["mae"])
            x, y = inputs(actual.template, 7), targets(actual.template, 7)
            report = towers.execution_report(actual.train_on_batch, x, y)
            counts.append(len(report.transfers))
            self.assertLessEqual(report.total_bytes, 1.02 * report.least_bytes)
        # The targets, that come from the host.
        self.assertLessEqual(counts[1], counts[0] + 1)

    def test_a_compiled_template_hands_on_its_optimizer(self):
        expected, model = make(cnn), make(cnn)
        x, y = inputs(model, 6), targets(model, 6)
        for m in (expected, model):
            m.compile(
                keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"]
            )
            m.fit(x, y, batch_size=3, verbose=0, shuffle=False)
        optimizer = model.optimizer
        where = placement(2, parameter_device="/CPU:1")
        actual = towers.TowerModel(model, where)
        self.assertIs(actual.optimizer, optimizer)
        for m in (expected, actual):
            history = m.fit(x, y, batch_size=3, verbose=0, shuffle=False)
            self.assertIn("mae", history.history)
        close(actual.get_weights(), expected.get_weights())
        close(
            [v.numpy() for v in actual.optimizer.variables],
            [v.numpy() for v in expected.optimizer.variables],
        )

    @parameterized.parameters("template", "wrapper", "lent")
    def test_and_metrics_that_forget_what_the_other_counted(self, first):
        plain = chain([2], layers.Dense(1))
        metrics = ["mae", keras.metrics.MeanAbsoluteError(name="too")]
        if first != "lent":
            plain.compile("sgd", "mse", metrics=metrics)
        model = towers.TowerModel(plain, placement(2, output_device="/CPU:1"))
        if first == "lent":
            model.compile("sgd", "mse", metrics=metrics)
        x, y = inputs(plain, 4), targets(plain, 4)
        one, other = (plain, model) if first == "template" else (model, plain)
        one.evaluate(0 * x, y, verbose=0)
        model.get_compile_config()  # which compiles the template, if need be
        expected = [np.abs(plain(x) - y).mean()] * 2
        close(other.evaluate(x, y, verbose=0)[1:], expected)
        close(one.evaluate(x, y, verbose=0)[1:], expected)

    @parameterized.parameters(
        (["mse", ["mae", "mse"]],),
        (("mse", ["mae"]),),
        ({"a": "mse", "b": ["mae"]},),
    )
    @pytest.mark.slow(after=1)
    def test_and_its_nest_of_losses(self, loss):
        x, y = np.ones([6, 2]), [np.zeros([6, 1]), np.ones([6, 1])]
        histories = []
        for where in (None, placement(2), placement(3, [3, 2, 1])):
            keras.utils.set_random_seed(0)
            given = keras.Input([2])
            outputs = [layers.Dense(1, name=name)(given) for name in "ab"]
            model = keras.Model(given, outputs)
            model.compile("sgd", loss)
            if where:
                model = towers.TowerModel(model, where)
                model.compile("sgd", loss)  # by position, as many do
            fit = model.fit(x, y, batch_size=5, epochs=2, verbose=0)
            histories.append(fit.history)
        for history in histories[1:]:
            self.assertEqual(list(history), list(histories[0]))
            for name in history:
                close(history[name], histories[0][name])

    def test_another_wrapper_does_not_leave_the_first_behind(self):
        model = make(cnn)
        x, y = inputs(model, 4), targets(model, 4)
        first = towers.TowerModel(model, placement(2))
        trained(first, x, y)
        first(x)
        towers.TowerModel(model, placement(2, parameter_device="/CPU:1"))
        before = model.get_weights()
        close(first(x), model(x))
        first.fit(x, y, verbose=0)
        self.assertFalse(np.allclose(before[0], model.get_weights()[0]))


class FaceTest(parameterized.TestCase):
    def test_it_looks_like_the_template(self):
        model = make(cnn)
        actual = towers.TowerModel(model, placement(2))
        self.assertEqual(
            [w.path for w in actual.weights], [w.path for w in model.weights]
        )
        self.assertIs(
            actual.get_layer(model.layers[-1].name),
            model.layers[-1],
        )
        lines = []
        actual.summary(print_fn=lambda line, **_: lines.append(line))
        self.assertIn("tower_1 on /CPU:1", lines[-1])
        self.assertIn("Total params", "".join(lines))

    def test_it_saves_the_plain_model(self):
        model = make(cnn)
        x, y = inputs(model, 4), targets(model, 4)
        actual = towers.TowerModel(model, placement(2))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "m.keras")
            best = keras.callbacks.ModelCheckpoint(path)
            trained(actual, x, y, callbacks=[best])
            plain = keras.models.load_model(path)
            weights = os.path.join(folder, "m.weights.h5")
            actual.save_weights(weights)
            other = make(cnn, seed=1)
            other.load_weights(weights)
        close(plain.predict(x, verbose=0), actual.predict(x, verbose=0))
        self.assertEqual(int(plain.optimizer.iterations), 2)
        close(other.get_weights(), actual.get_weights(), 0)

    def test_jit_never_undoes_the_placement(self):
        actual = towers.TowerModel(make(cnn), placement(2))
        actual.compile("sgd", "mse", jit_compile=True)
        self.assertFalse(actual.jit_compile)
        actual.jit_compile = True
        self.assertFalse(actual.jit_compile)

    def test_a_strategy_is_refused(self):
        model = make(cnn)
        with tf.distribute.OneDeviceStrategy("/CPU:0").scope():
            with self.assertRaisesRegex(RuntimeError, "tf.distribute"):
                towers.TowerModel(model, placement(2))

    def test_an_own_step_that_never_calls_the_model_is_refused(self):
        class Own(keras.Sequential):
            def train_step(self, data):
                return {}

        actual = towers.TowerModel(
            Own([keras.Input([2]), layers.Dense(1)]), placement(2)
        )
        actual.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "train_step"):
            actual.fit(np.ones([2, 2]), np.ones([2, 1]), verbose=0)

    @parameterized.named_parameters(
        ("model", 3, 2, TypeError, "keras.Model"),
        ("zero", None, 0, ValueError, "`n_gpus` must be at least 1"),
        ("text", None, "4", TypeError, "`n_gpus` must be a whole number"),
        ("bool", None, True, TypeError, "`n_gpus`"),
        ("many", None, 64, ValueError, "`n_gpus`.*Placement.cpus"),
    )
    def test_to_multi_gpu_refuses(self, model, n, error, message):
        model = make(cnn) if model is None else model
        with self.assertRaisesRegex(error, message):
            towers.to_multi_gpu(model, n_gpus=n)

    @parameterized.parameters(
        ({"gpus": 64}, ValueError, "`gpus` asks.*Placement.cpus"),
        ({"gpus": 2, "n_gpus": 2}, TypeError, "Leave one out"),
        ({}, TypeError, "`n_gpus` must be a whole number"),
    )
    def test_gpus_is_another_name(self, given, error, message):
        with self.assertRaisesRegex(error, message):
            towers.to_multi_gpu(make(cnn), **given)

    def test_devices_or_a_number_stand_for_a_placement(self):
        model = towers.TowerModel(make(cnn), ["/CPU:1", "/CPU:0"])
        self.assertEqual(
            model.placement, towers.Placement(["/CPU:1", "/CPU:0"])
        )
        gpus = mock.Mock(return_value=placement(2))
        with mock.patch.object(towers.Placement, "gpus", gpus):
            model = towers.TowerModel(make(cnn), 2)
        self.assertEqual(model.placement, placement(2))
        gpus.assert_called_with(2)
        for wrong in (True, [], ["/CPU:9"]):
            with self.assertRaises((TypeError, ValueError)):
                towers.TowerModel(make(cnn), wrong)

    def test_an_unknown_rule_is_refused_at_once(self):
        with self.assertRaisesRegex(ValueError, "unknown rule 'avg'"):
            towers.TowerModel(make(cnn), placement(2), merge={"a": "avg"})

    def test_towers_within_towers_are_refused_by_name(self):
        inner = towers.TowerModel(make(cnn), placement(2), name="inner")
        outer = keras.Sequential([inner, keras.layers.Dense(1)])
        self.assertEqual(outer(inputs(inner.template, 5)).shape, (5, 1))
        late = keras.Sequential()
        late.add(inner)
        for call in (
            lambda model: towers.TowerModel(model, placement(2)),
            lambda model: towers.build_towers(
                model, inputs(inner.template, 5), placement(2)
            ),
            lambda model: towers.export_towers(model, "nowhere", placement(2)),
        ):
            for model in (outer, late):
                with self.assertRaisesRegex(TypeError, "'inner'.* `template`"):
                    call(model)

    def test_no_placement_is_refused(self):
        with self.assertRaisesRegex(TypeError, "towers.Placement"):
            towers.TowerModel(make(cnn), "/CPU:0")
