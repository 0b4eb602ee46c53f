"""placement_plan: against what ran, and against what Sessions say."""

import json
import os
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import (
    GPUS,
    chain,
    cnn,
    inputs,
    make,
    on_gpus,
    placement,
    recurrent,
    targets,
)

import towers
from towers.foreign import keras_machine, tf_kernels
from towers.placement.device_names import short

v1 = tf.compat.v1
layers = keras.layers
TWO = {"CPU": 1, "GPU": 2}


def all_kinds():
    """Rows, seeds, masks, statistics, and what GPUs have kernels of cuDNN for."""
    return chain(
        [5],
        layers.Embedding(11, 4, mask_zero=True),
        layers.LSTM(3, return_sequences=True),
        layers.Bidirectional(layers.GRU(3)),
        layers.Dropout(0.5),
        layers.BatchNormalization(),
        layers.BatchNormalization(synchronized=True),
        layers.Dense(2),
        dtype="int32",
    )


def on_cudnn():
    """What an export is to take cuDNN for: else it is one for any machine."""
    return chain([5, 3], layers.LSTM(4, use_cudnn=True), layers.Dense(2))


class Text(layers.Layer):
    def call(self, x):
        return tf.strings.to_number(tf.strings.as_string(x))


def textual():
    return chain([3], Text(name="text"), layers.Dense(2))


def compiled(model, where, optimizer="adam"):
    model = towers.TowerModel(make(model), where)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


class CpuTest(parameterized.TestCase):
    @parameterized.parameters(cnn, all_kinds)
    @pytest.mark.slow(after=1)
    def test_it_agrees_with_what_ran(self, model):
        model = compiled(model, placement(2, parameter_device="/CPU:2"))
        x, y = inputs(model.template, 5), targets(model.template, 5)
        plan = towers.placement_plan(model, x, y, machine={"CPU": 3})
        report = towers.execution_report(model.train_on_batch, x, y)
        planned = {(name, kind): device for device, name, kind in plan.nodes}
        ran = {(name, kind): device for device, name, kind in report.nodes}
        both = set(planned) & set(ran)
        # What a function returns is nobody's.
        both = {key for key in both if not key[0].startswith("Identity")}
        self.assertGreater(len(both), 0.6 * len(ran))
        self.assertEqual(
            {key: planned[key] for key in both}, {key: ran[key] for key in both}
        )
        self.assertEqual(plan.parameter_bytes, report.parameter_bytes)
        self.assertEqual(plan.slot_bytes, report.slot_bytes)
        # TensorFlow's optimizer spares a few of the small ones.
        self.assertGreaterEqual(plan.total_bytes, report.total_bytes)
        self.assertLess(plan.total_bytes, 1.2 * report.total_bytes)

    @parameterized.parameters(
        (3, "`machine` must be", TypeError),
        ({"CPU": -1}, "numbers of devices", ValueError),
        ({"TPU": 1}, "numbers of devices", ValueError),
        ({"CPU": 0, "GPU": 1}, "without a CPU", ValueError),
        ([], "empty list", ValueError),
        ([{"CPU": 1}, {"CPU": -1}], r"`machine\[1\]`.*numbers", ValueError),
        ([{"CPU": 1}, 2], r"`machine\[1\]` must be", TypeError),
    )
    def test_machines_that_cannot_be(self, machine, message, error):
        with self.assertRaisesRegex(error, message):
            towers.placement_plan(lambda: None, machine=machine)

    def test_what_cannot_be_planned(self):
        model = make(cnn)
        here = {"CPU": 1}
        with self.assertRaisesRegex(TypeError, "`fn_or_model`"):
            towers.placement_plan(3, machine=here)
        with self.assertRaisesRegex(TypeError, "step="):
            towers.placement_plan(model.train_on_batch, machine=here)
        with self.assertRaisesRegex(ValueError, "not compiled"):
            towers.placement_plan(model, inputs(model, 2), machine=here)
        with self.assertRaisesRegex(TypeError, "got a Placement"):
            towers.placement_plan(
                *(model, towers.Placement(["/CPU:0"]), inputs(model, 2)),
                step="predict",
                machine=here,
            )
        with self.assertRaisesRegex(ValueError, "`step` is 'fit'"):
            towers.placement_plan(model, machine=here, step="fit")
        far = towers.Placement(
            ["/CPU:0", "/job:worker/task:1/CPU:0"], available="any"
        )
        shape = tf.TensorSpec([4, *model.input_shape[1:]])
        with self.assertRaisesRegex(
            ValueError, "on .*worker.*task:1, but `mac"
        ):
            towers.placement_plan(
                lambda x: towers.build_towers(model, x, far).outputs,
                shape,
                machine=here,
            )
        with self.assertRaisesRegex(ValueError, "tasks 0 to 0 of the job"):
            towers.placement_plan(
                lambda x: towers.build_towers(model, x, far).outputs,
                shape,
                machine=[here],
            )
        with mock.patch.object(tf_kernels, "knows_gpus", lambda: False):
            with self.assertRaisesRegex(RuntimeError, "cannot know"):
                towers.placement_plan(model)


class ClusterTest(parameterized.TestCase):
    @parameterized.parameters("/CPU:0", "balanced")
    def test_workers_that_are_not_here(self, home):
        workers = [
            f"/job:worker/task:{i}/CPU:{k}" for i in range(2) for k in (0, 1)
        ]
        where = towers.Placement(
            workers,
            parameter_device=home,
            output_device="/CPU:0",
            available="any",
        )
        model = towers.TowerModel(
            chain([100], *[layers.Dense(100) for _ in range(4)]),
            where,
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        x = np.ones([8, 100], "float32")
        plan = towers.placement_plan(
            model, x, x, machine=[{"CPU": 2}] * 2, strict=True
        )
        self.assertEqual((plan.refused, plan.moved), ((), ()))
        for i, device in enumerate(workers):
            plan.assert_runs_on(f"tower_{i}", device)
        crosses = 2 * (2 if home == "/CPU:0" else 1)  # down and up, by machine
        expected = crosses * 4 * model.count_params() + 3 * x.nbytes
        total = sum(plan.between_machines.values())
        self.assertBetween(total, expected, expected + 2000)
        self.assertEqual(total, plan.least_between_machines)
        held = {"/CPU:0"} if home == "/CPU:0" else set(map(short, workers))
        self.assertEqual(set(plan.parameter_bytes), held)
        self.assertEqual(set(plan.slot_bytes) - {"/CPU:0"}, held - {"/CPU:0"})
        machine, sent, received = plan.busiest_link
        if home == "/CPU:0":
            self.assertEndsWith(machine, "localhost/replica:0/task:0")
            self.assertEqual(sent + received, total)
        self.assertIn(machine, str(plan))
        with self.assertRaisesRegex(RuntimeError, "sees no such device"):
            model.fit(x, x, verbose=0)

    def test_what_says_no_device_is_here_or_beside_its_variable(self):
        model = chain([3], layers.Dense(2))
        far = "/job:worker/replica:0/task:1/device:CPU:0"
        where = towers.Placement([far], parameter_device=far, available="any")
        towers.place_variables(model, where)
        plan = towers.placement_plan(
            lambda x: x * tf.reduce_sum(model.weights[0]),
            tf.ones([2]),
            machine=[{"CPU": 1}] * 2,
        )
        ran = {kind: device for device, _, kind in plan.nodes}
        self.assertEqual(ran["ReadVariableOp"], far)
        self.assertEqual((ran["Sum"], ran["Mul"]), ("/CPU:0", "/CPU:0"))


class GpuTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow was built without kernels for GPUs.")

    @parameterized.named_parameters(
        ("cpu", "/CPU:0"),
        ("gpu", "/GPU:0"),
        ("balanced", towers.balanced(GPUS)),
    )
    @pytest.mark.slow(of=["_cpu", "_gpu"])
    def test_towers_stay_on_their_gpus(self, home):
        where = on_gpus(parameter_device=home, input_device="/GPU:1")
        model = compiled(all_kinds, where)
        x, y = inputs(model.template, 5), targets(model.template, 5)

        def state():
            return [
                keras_machine.rnn._is_gpu_available,
                tf.config.list_logical_devices(),
                tf.Assert,
                model.train_function,
                [layer.supports_jit for layer in model.template.layers],
                model.get_weights(),
            ]

        before = state()
        plan = towers.placement_plan(model, x, y, machine=TWO, strict=True)
        self.assertEqual((plan.refused, plan.moved), ((), ()))
        for i, gpu in enumerate(GPUS):
            plan.assert_runs_on(f"tower_{i}", gpu)
            plan.assert_runs_on(f"host/tower_{i}", "/CPU:0")
            for op in ("CudnnRNNV3", "CudnnRNNBackpropV3"):
                self.assertEqual(plan.ops[gpu, op], 3)
        homes = {"/CPU:0": {"/CPU:0"}, "/GPU:0": {"/GPU:0"}}
        waits = [t for t in plan.transfers if t.tensor.startswith("^")]
        pairs = {(t.source, t.target) for t in waits}
        self.assertLen(waits, len(pairs))  # TensorFlow joins them
        devices = {v.device for v in plan.variables if v.kind != "state"}
        expected = set(GPUS) if callable(home) else homes[home]
        self.assertEqual(devices, expected)
        after = state()
        self.assertEqual(before[:-1], after[:-1])
        np.testing.assert_equal(before[-1], after[-1])
        self.assertIn("/GPU:1", str(plan))
        json.dumps(plan.to_dict())

    def test_what_has_no_kernel_is_refused_or_moved(self):
        model = compiled(textual, on_gpus())
        x, y = np.ones([4, 3], "float32"), np.ones([4, 2], "float32")
        plan = towers.placement_plan(model, x, y, machine=TWO, strict=True)
        self.assertLen(plan.refused, 4)
        self.assertEqual({r.layer for r in plan.refused}, {"text"})
        self.assertEqual(
            {r.kind for r in plan.refused}, {"AsString", "StringToNumber"}
        )
        self.assertIn("no supported kernel for GPU", plan.refused[0].message)
        self.assertIn('layer_devices={"text": "/CPU:0"}', str(plan))
        soft = towers.placement_plan(model, x, y, machine=TWO)
        self.assertEqual(soft.refused, ())
        self.assertEqual(
            {(m.op, m.got) for m in soft.moved},
            {(r.op, "/CPU:0") for r in plan.refused},
        )
        pinned = compiled(textual, on_gpus(layer_devices={"text": "/CPU:0"}))
        plan = towers.placement_plan(pinned, x, y, machine=TWO, strict=True)
        self.assertEqual((plan.refused, plan.moved), ((), ()))

    def test_functions_and_graphs(self):
        v = tf.Variable(tf.ones([4, 3]))

        @tf.function
        def double(x):
            with tf.device("/GPU:1"), tf.name_scope("inner"):
                return x + tf.matmul(x, x)

        def step(x):
            with tf.device("/GPU:0"), tf.name_scope("outer"):
                y = tf.matmul(x, v.read_value(), name="product")
            return double(y)

        plan = towers.placement_plan(step, tf.TensorSpec([3, 4]), machine=TWO)
        plan.assert_runs_on("outer/product", "/GPU:0")
        plan.assert_runs_on("inner", "/GPU:1")
        self.assertEqual(plan.bytes_between["/CPU:0", "/GPU:0"], 4 * (12 + 12))
        self.assertEqual(plan.bytes_between["/GPU:0", "/GPU:1"], 4 * 9)
        self.assertEqual(plan.total_bytes, plan.least_bytes)
        far = towers.placement_plan(
            double, tf.ones([2, 2]), machine={"GPU": 1}, strict=True
        )
        self.assertIn("/device:GPU:1", far.refused[0].message)
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, [None, 3, 3])
            with tf.device("/GPU:1"):
                y = tf.matmul(x, x, name="graph/product")
                tf.strings.as_string(y, name="text")
        plan = towers.placement_plan(graph, y, machine=TWO)
        self.assertEqual(plan.ops["/GPU:1", "BatchMatMulV2"], 1)
        self.assertNotIn(("/CPU:0", "AsString"), plan.ops)
        plan = towers.placement_plan(graph, machine=TWO)
        self.assertEqual([m.op for m in plan.moved], ["text"])

    def test_a_saved_model(self):
        path = os.path.join(tempfile.mkdtemp(), "model")
        where = on_gpus(parameter_device=towers.balanced(GPUS))
        towers.export_towers(make(on_cudnn), path, where)
        plan = towers.placement_plan(path, machine=TWO, strict=True)
        self.assertEqual(plan.refused, ())
        for i, gpu in enumerate(GPUS):
            plan.assert_runs_on(f"tower_{i}", gpu)
            self.assertEqual(plan.ops[gpu, "CudnnRNNV3"], 1)
        self.assertEqual({v.device for v in plan.variables}, set(GPUS))
        towered = towers.TowerModel(make(recurrent), where)
        x = tf.TensorSpec([None, 5, 3])
        same = towers.placement_plan(towered, x, machine=TWO, step="predict")
        self.assertGreater(plan.total_bytes, 0)  # of functions inside it
        self.assertEqual(plan.bytes_between, same.bytes_between)
        self.assertLen(plan.unknown, len(same.unknown))  # those of open rows
        self.assertEqual(
            [t.dtype for t in plan.unknown], [t.dtype for t in same.unknown]
        )
        with self.assertRaisesRegex(ValueError, "serving_default"):
            towers.placement_plan(path, signature="other", machine=TWO)
