"""Shares under which unequal devices take equally long."""

import time
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from chiefs import said
from models import chain, close, inputs, make, placement, targets, two_by_two

import towers
from towers.planning import measure
from towers.planning.measure import Speed


class SharesTest(parameterized.TestCase):
    @parameterized.parameters(
        ([(0, 1), (0, 1)], [1 / 2, 1 / 2], 50),
        ([(0, 1), (0, 3)], [3 / 4, 1 / 4], 75),
        ([(0, 1), (10, 1)], [0.55, 0.45], 55),
        ([(0, 1), (200, 0.1)], [1, 0], 100),  # too slow to start
        ([(0, 1), (0, 1000)], [1, 0], 100),  # for less than a row
        ([(0, 2)], [1], 200),
    )
    def test_all_are_ready_together(self, lines, shares, seconds):
        speeds = [Speed(*line) for line in lines]
        found, at = measure._shares(speeds, 100)
        np.testing.assert_allclose(found, shares, atol=1e-3)
        np.testing.assert_allclose(at, seconds, rtol=2e-3)

    def test_a_line_is_fitted_to_what_steps_take(self):
        clock = [0.0]

        def device(start, per_row):
            def step(x):
                clock[0] += start + per_row * x.shape[0]
                return 0.0

            return step

        lines = [(0.5, 0.01), (0.0, 0.25)]
        with mock.patch.object(time, "perf_counter", lambda: clock[0]):
            speeds = measure._speeds(
                [device(*line) for line in lines], (tf.zeros([8, 1]),), [2, 8]
            )
        found = [(speed.start, speed.per_row) for speed in speeds]
        np.testing.assert_allclose(found, lines, atol=1e-9)


class MeasureWeightsTest(parameterized.TestCase):
    def test_the_placement_says_why_and_nothing_has_changed(self):
        model = make(two_by_two)
        model.compile("sgd", "mse")
        x, y = inputs(model, 8), targets(model, 8)
        model.evaluate(x, y, verbose=0)  # which a loss of each output counts
        counted = model.get_metrics_result()
        before = [v.numpy() for v in model.variables]
        # Two towers on one device, which share what it gets.
        where = towers.Placement(
            ["/CPU:1", "/CPU:1", "/CPU:2"],
            layer_devices={"sum": ["/CPU:3", "/CPU:3", "/CPU:2"]},
        )
        measured = towers.measure_weights(model, where, x, y)
        close([v.numpy() for v in model.variables], before, 0)
        self.assertEqual(model.get_metrics_result(), counted)
        self.assertEqual(measured.weights[0], measured.weights[1])
        self.assertAlmostEqual(sum(measured.weights), 1)
        self.assertRegex(
            str(measured),
            r"(?s)the rows.*\n/CPU:1 and /CPU:3 takes [\d.e+-]+ ms and [\d.e+-]+ "
            r"ms for each 1,000 rows: .*\n/CPU:2 takes ",
        )
        self.assertEqual(
            where, measured.__class__(**{**vars(measured), "weights": None})
        )

    def test_what_is_far_too_slow_gets_no_rows_and_a_line(self):
        speeds = [Speed(0.0, 0.001), Speed(9.0, 0.001)]
        with mock.patch.object(measure, "_speeds", lambda *_: speeds):
            measured = towers.measure_weights(
                make(two_by_two), placement(2), inputs(make(two_by_two), 10)
            )
        self.assertEqual(measured.weights, (1.0, 0.0))
        self.assertIn(
            "/CPU:1 takes 9e+03 ms and 1e+03 ms for each 1,000 rows: no rows, "
            "as the others take 10 ms for all 10",
            str(measured),
        )

    def test_nothing_is_said_of_seeds_that_stay(self):
        model = chain([3], keras.layers.Dropout(0.5), keras.layers.Dense(1))
        before = model.get_weights()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with mock.patch.object(measure, "_ROUNDS", 1):
                rows = np.ones([2, 3]), np.ones([2, 1])
                towers.measure_weights(model, placement(1), *rows)
        self.assertEmpty([str(warning.message) for warning in caught])
        close(model.get_weights(), before, 0)

    def test_too_few_rows_are_refused(self):
        model = make(two_by_two)
        with self.assertRaisesRegex(ValueError, "2 rows for 3 towers"):
            towers.measure_weights(model, placement(3), inputs(model, 2))

    @pytest.mark.rare
    def test_a_worker_whose_core_is_busy_gets_less(self):
        told = said("busy_worker.py")
        for share, expected in zip(told["shares"], told["expected"]):
            self.assertBetween(share, expected / 1.3, expected * 1.3, told)
        self.assertLess(told["over equal"], 1, told)
