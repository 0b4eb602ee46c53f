"""report: against graphs whose transfers are known by hand."""

import collections
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import cnn, inputs, make, placement, recurrent, targets

import towers
from towers.foreign.patches import patched

FLOAT = 4
X = tf.ones([6, 8])


@tf.function(input_signature=[tf.TensorSpec([None, 8])])
def there_and_back(x):
    with tf.device("/CPU:1"), tf.name_scope("away"):
        y = tf.matmul(x, x, transpose_b=True)  # [rows, rows]
    with tf.device("/CPU:0"), tf.name_scope("home"):
        return tf.matmul(y, x)


@tf.function
def in_a_loop(x):
    def step(i, x):
        with tf.device("/CPU:1"):
            y = tf.matmul(x, x, transpose_b=True)
        with tf.device("/CPU:0"):
            return i + 1, tf.matmul(y, x)

    return tf.while_loop(lambda i, _: i < 3, step, [0, x])[1]


class HandTest(parameterized.TestCase):
    @parameterized.parameters(1, 6, 11)
    def test_there_and_back(self, rows):
        x = tf.ones([rows, 8])
        there_and_back(x)  # a function called before reports too
        report = towers.execution_report(there_and_back, x)
        away, back = report.transfers
        self.assertEqual((away.source, away.target), ("/CPU:0", "/CPU:1"))
        self.assertEqual((back.source, back.target), ("/CPU:1", "/CPU:0"))
        self.assertEqual((away.shape, back.shape), ((rows, 8), (rows, rows)))
        self.assertEqual(away.dtype, tf.float32)
        self.assertIn("away", back.tensor)
        self.assertEqual(
            report.bytes_between,
            {
                ("/CPU:0", "/CPU:1"): FLOAT * rows * 8,
                ("/CPU:1", "/CPU:0"): FLOAT * rows * rows,
            },
        )
        self.assertEqual(report.total_bytes, report.least_bytes)
        for device in ("/CPU:0", "/CPU:1"):
            self.assertEqual(report.ops[device, "MatMul"], 1)

    def test_what_is_the_host_s_is_not_the_tower_s(self):
        @tf.function(autograph=False)
        def run(x):
            with tf.device("/CPU:1"), tf.name_scope("tower_1/"):
                y = tf.matmul(x, x, transpose_b=True)
            with tf.device("/CPU:0"), tf.name_scope("host/tower_1/"):
                return tf.reduce_sum(y)

        report = towers.execution_report(run, X)
        report.assert_runs_on("tower_1", "/CPU:1")
        report.assert_runs_on("host/tower_1", "/CPU:0")
        with self.assertRaises(AssertionError):
            report.assert_runs_on("host/tower_1", "/CPU:1")

    def test_one_device_needs_no_transfer(self):
        twice = tf.function(lambda x: x + x)
        report = towers.execution_report(twice, x=X)  # by keyword
        self.assertEqual((report.transfers, report.least_bytes), ((), 0))
        self.assertIn("0 B in 0 transfers", str(report))

    def test_what_crosses_twice_is_above_the_least(self):
        with tf.device("/CPU:0"):
            weight = tf.Variable(tf.ones([8, 3]))

        @tf.function
        def twice(x):
            total = 0.0
            for _ in range(2):
                with tf.device("/CPU:0"):
                    value = weight.read_value()
                with tf.device("/CPU:1"):
                    total += tf.matmul(x, value)
            return total

        with tf.device("/CPU:1"):
            x = tf.identity(X)
        report = towers.execution_report(twice, x)
        self.assertEqual(report.total_bytes, 2 * FLOAT * 24)
        self.assertEqual(report.least_bytes, FLOAT * 24)
        self.assertIn("; 96 B crossed twice", str(report))
        self.assertEqual(report.parameter_bytes, {"/CPU:0": FLOAT * 24})

    def test_calls_are_counted(self):
        def thrice():
            for _ in range(3):
                there_and_back(X)

        report = towers.execution_report(thrice)
        self.assertEqual([t.times for t in report.transfers], [3, 3])
        self.assertEqual(report.total_bytes, 3 * FLOAT * (48 + 36))
        self.assertEqual(report.least_bytes, report.total_bytes)

    def test_what_crosses_in_a_loop_is_said_to(self):
        with self.assertWarnsRegex(UserWarning, "transfers the size is not"):
            report = towers.execution_report(in_a_loop, X)
        self.assertNotEmpty(report.unknown)
        self.assertEqual({t.times for t in report.unknown}, {None})
        self.assertIn("at each step of a loop", str(report))
        with self.assertRaisesRegex(AssertionError, "size is not known"):
            report.assert_bytes(10**9)

    def test_the_profiler_counts_what_crosses_in_a_loop(self):
        report = towers.execution_report(in_a_loop, X, loops=True)
        self.assertEqual(report.unknown, ())
        counts = collections.Counter(
            (t.dtype.name, t.source, t.bytes) for t in report.transfers
        )
        # There and back in three steps; the condition is asked once more.
        self.assertEqual(
            counts,
            {
                ("float32", "/CPU:0", 3 * FLOAT * 6 * 8): 1,
                ("float32", "/CPU:1", 3 * FLOAT * 6 * 6): 1,
                ("bool", "/CPU:0", 4): 1,
            },
        )

    def test_what_runs_between_functions(self):
        def call():
            y = there_and_back(X)
            with tf.device("/CPU:2"):
                return tf.matmul(y, y, transpose_b=True)

        alone = towers.execution_report(there_and_back, X)
        report = towers.execution_report(call)
        self.assertEqual(report.eager["/CPU:2", "MatMul"], 1)
        self.assertEqual(report.ops, alone.ops)
        self.assertEqual(report.total_bytes, alone.total_bytes)
        self.assertEqual(alone.eager.total(), 0)
        self.assertIn(
            {"device": "/CPU:2", "op": "MatMul", "count": 1},
            report.to_dict()["eager"],
        )

    def test_the_most_memory_where_tensorflow_tells(self):
        self.assertEqual(
            towers.execution_report(there_and_back, X).peak_bytes, {}
        )
        config, asked = tf.config.experimental, []
        gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
        with patched(
            (tf.config, "list_logical_devices", lambda kind=None: [gpu]),
            (config, "reset_memory_stats", asked.append),
            (config, "get_memory_info", lambda d: {"peak": 7 * len(d)}),
        ):
            report = towers.execution_report(there_and_back, X)
        self.assertEqual(report.peak_bytes, {"/GPU:0": 7 * len("GPU:0")})
        self.assertEqual(asked, ["GPU:0"])
        self.assertIn("peak bytes", report._repr_html_())


class MirroredTest(absltest.TestCase):
    @pytest.mark.slow
    def test_bytes_of_collectives_are_said_to_be_missing(self):
        with tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]).scope():
            model = make(cnn)
            model.compile("sgd", "mse")
        x, y = inputs(model, 4), targets(model, 4)
        with self.assertWarnsRegex(UserWarning, "Collective.* not in total"):
            towers.execution_report(
                lambda: model.fit(x, y, batch_size=4, verbose=0)
            )


class AssertionsTest(absltest.TestCase):
    def test_a_tower_is_meant_in_all_calls(self):
        @tf.function(autograph=False)
        def run(x):
            for name, device in (("tower_1", 1), ("tower_1_1", 2)):
                with tf.device(f"/CPU:{device}"), tf.name_scope(f"{name}/a/"):
                    x = tf.matmul(x, x, transpose_b=True)
            return x

        report = towers.execution_report(run, X)
        report.assert_runs_on("tower_1_1/a", "/CPU:2")
        for scope in ("tower_1", "tower_1/a"):
            with self.assertRaisesRegex(AssertionError, "1 of 2.*/CPU:1"):
                report.assert_runs_on(scope, "/CPU:1")

    def test_the_offenders_are_printed(self):
        report = towers.execution_report(there_and_back, X)
        report.assert_runs_on("away", "cpu:1")
        report.assert_runs_on("home", "/job:localhost/device:CPU:0")
        with self.assertRaisesRegex(
            AssertionError, r"(?s)away' ran elsewhere than on /CPU:0.*MatMul"
        ):
            report.assert_runs_on("away", "/CPU:0")
        with self.assertRaisesRegex(AssertionError, "No op .* 'awa'"):
            report.assert_runs_on("awa", "/CPU:0")
        report.assert_bytes(FLOAT * 84)
        with self.assertRaisesRegex(
            AssertionError, r"(?s)at most 335 .* got 336.*192 bytes.*144 bytes"
        ):
            report.assert_bytes(335)

    def test_plain_data_for_programs(self):
        report = towers.execution_report(there_and_back, X)
        data = json.loads(json.dumps(report.to_dict()))
        self.assertEqual(data["total_bytes"], FLOAT * 84)
        self.assertEqual(data["transfers"][0]["shape"], [6, 8])
        self.assertIn(
            {"device": "/CPU:1", "op": "MatMul", "count": 1}, data["ops"]
        )

    def test_no_function_and_calls_in_graphs_are_refused(self):
        with self.assertRaisesRegex(TypeError, "train_on_batch"):
            towers.execution_report(3)
        with self.assertRaisesRegex(RuntimeError, "eager call"):
            tf.function(lambda: towers.execution_report(there_and_back, X))()


class ModelTest(parameterized.TestCase):
    @parameterized.parameters((cnn, "fit"), (recurrent, "batch"))
    @pytest.mark.slow(after=1)
    def test_a_training_step_moves_each_byte_once(self, model, how):
        model = towers.TowerModel(make(model), placement(3))
        model.compile("adam", "mse")
        x, y = inputs(model.template, 7), targets(model.template, 7)
        if how == "fit":
            model.fit(x, y, batch_size=7, verbose=0)
        before = [w.copy() for w in model.get_weights()]

        def fit():
            model.fit(x, y, batch_size=7, verbose=0)

        report = (
            towers.execution_report(fit)
            if how == "fit"
            else towers.execution_report(model.train_on_batch, x, y)
        )
        for now, then in zip(model.get_weights(), before):
            np.testing.assert_array_equal(now, then)
        if how == "batch":  # slots that were made meanwhile
            for variable in model.optimizer.variables[2:]:
                np.testing.assert_array_equal(variable, 0 * variable)
        weights = sum(w.nbytes for w in before)
        # Per other tower: the weights down, their gradients up; its rows of x,
        # of outputs and of their gradients. Tower 0 has 2 of the 7 rows.
        rows = x.nbytes + 2 * y.nbytes
        expected = 2 * 2 * weights + rows * 5 // 7
        self.assertEqual(report.total_bytes, expected)
        self.assertEqual(report.least_bytes, expected)
        self.assertEqual(report.parameter_bytes, {"/CPU:0": weights})
        scalars = 8 + 4  # Adam's step count and learning rate
        self.assertEqual(report.slot_bytes, {"/CPU:0": 2 * weights + scalars})
        for i in range(3):
            report.assert_runs_on(f"tower_{i}", f"/CPU:{i}")

    def test_an_iterator_from_before_is_said_to_hide_the_rows(self):
        model = towers.TowerModel(make(cnn), placement(2))
        model.compile("sgd", "mse")
        x, y = inputs(model.template, 7), targets(model.template, 7)
        model.make_train_function()
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(7).repeat()
        with self.assertWarns(UserWarning):
            report = towers.execution_report(model.train_function, iter(data))
        self.assertLen(report.unknown, 3)  # x, outputs, their gradients

    def test_batches_of_two_sizes_are_known_where_towers_see_the_same(self):
        model = towers.TowerModel(make(cnn), placement(2, [1, 0]))
        model.compile("sgd", "mse")
        x, y = inputs(model.template, 7), targets(model.template, 7)
        with warnings.catch_warnings(record=True) as caught:
            towers.execution_report(
                lambda: model.fit(x, y, batch_size=4, verbose=0)
            )
        self.assertEmpty([w for w in caught if "size is not" in str(w.message)])
