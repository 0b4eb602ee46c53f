"""Where a TowerModel's batches and state are, and devices that are absent."""

from unittest import mock

import keras
import numpy as np
from absl.testing import parameterized
from models import cnn, inputs, make, placement, targets

import towers
from towers.foreign import keras_compile

X, Y = np.ones([7, 100], "float32"), np.ones([7, 3], "float32")


def wide(where, **options):
    model = keras.Sequential([keras.Input([100]), keras.layers.Dense(3)])
    return towers.TowerModel(model, where, **options)


class DevicesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("train_on_batch", {}), ("test_on_batch", {"quick_start": True})
    )
    def test_a_batch_goes_straight_to_where_it_is_split(self, method, options):
        where = placement(2, parameter_device="/CPU:1", input_device="/CPU:2")
        model = wide(where, **options)
        model.compile("sgd", "mse")
        for rows in (5, 7):  # so that it may be of any number
            getattr(model, method)(X[:rows], Y[:rows])
        report = towers.execution_report(getattr(model, method), X, Y)
        batch = [t for t in report.transfers if t.shape == X.shape]
        self.assertEqual(batch, [])

    def test_metrics_live_where_the_outputs_are(self):
        where = placement(2, parameter_device="/CPU:1", output_device="/CPU:2")
        model = towers.TowerModel(make(cnn), where)
        model.compile("adam", "mse", metrics=[keras.metrics.MeanSquaredError()])
        result = keras_compile.metric_variables(model)
        self.assertNotEmpty(result)
        model.train_on_batch(
            inputs(model.template, 5), targets(model.template, 5)
        )
        for v in [*result, *keras_compile.metric_variables(model)]:
            self.assertIn("CPU:2", v.value.device, v.path)
        for v in [*model.variables, *model.optimizer.variables]:
            self.assertIn("CPU:1", v.value.device, v.path)

    @parameterized.parameters("host", "first", "balanced")
    def test_what_crosses_by_where_the_parameters_are(self, choice):
        """As the docstring of `to_multi_gpu` has it."""
        devices = ["/CPU:1", "/CPU:2", "/CPU:3"]
        n, each = 3, 300 * 300 * 4
        layers = [keras.layers.Dense(300, use_bias=False) for _ in range(n)]
        model = keras.Sequential([keras.Input([300]), *layers])
        homes = {
            "host": "/CPU:0",
            "first": devices[0],
            "balanced": towers.balanced(devices),
        }
        where = towers.Placement(devices, parameter_device=homes[choice])
        model = towers.TowerModel(model, where)
        model.compile("sgd", "mse")
        x = np.ones([6, 300], "float32")
        report = towers.execution_report(model.train_on_batch, x, x)
        sent = dict.fromkeys(["/CPU:0", *devices], 0)
        received = dict(sent)
        for t in report.transfers:
            if t.shape == (300, 300):
                sent[t.source] += t.bytes
                received[t.target] += t.bytes
        p = n * each
        expected = {
            "host": [n * p, p, p, p],
            "first": [0, (n - 1) * p, p, p],
            "balanced": [0, *[2 * p * (n - 1) // n] * n],
        }
        self.assertEqual(list(sent.values()), expected[choice])
        self.assertEqual(list(received.values()), expected[choice])

    def test_to_multi_gpu_keeps_parameters_on_the_host(self):
        def gpus(n, parameter_device):
            return placement(n, parameter_device=parameter_device)

        with mock.patch.object(towers.Placement, "gpus", gpus):
            for given, home in ((None, "/CPU:0"), ("/CPU:2", "/CPU:2")):
                model = towers.to_multi_gpu(
                    make(cnn), n_gpus=2, parameter_device=given
                )
                self.assertEqual(model.placement.parameter_device, home)

    def test_training_stops_where_devices_are_absent(self):
        for where in (
            towers.Placement(["/GPU:0", "/CPU:0"], available="any"),
            towers.Placement(
                ["/CPU:0"],
                parameter_device=towers.balanced(["/CPU:0", "/GPU:3"]),
                available="any",
            ),
        ):
            model = wide(where)
            model.compile("adam", "mse")
            with self.assertRaisesRegex(RuntimeError, r"/GPU:\d.*template"):
                model.fit(X, Y, verbose=0)
            with self.assertRaisesRegex(RuntimeError, r"/GPU:\d.*template"):
                model.train_on_batch(X, Y)
            plain = model.template(X)
            np.testing.assert_allclose(
                model.predict(X, verbose=0), plain, rtol=1e-5, atol=1e-6
            )
