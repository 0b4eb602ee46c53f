"""Layers on devices of their own: where they run, what crosses, the numbers."""

import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import (
    attention,
    chain,
    close,
    cnn,
    inputs,
    leaves,
    make,
    placement,
    recurrent,
    subclassed,
    two_by_two,
    unrolled,
)
from models import nested as models_in_models
from same import pair, same_fit, same_step

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
FLOAT, WORDS, WIDTH = 4, 1000, 32


def words(mask: bool = False, count: int = WORDS) -> keras.Model:
    return chain(
        [16],
        layers.Embedding(count, WIDTH, mask_zero=mask, name="embedding"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(4, name="out"),
        dtype="int32",
    )


def nested() -> keras.Model:
    def part(name: str) -> keras.Model:
        return chain([4], layers.Dense(4, name="deep"), name=name)

    x = keras.Input([4])
    return keras.Model(x, part("head")(part("body")(x)))


class EveryLayerTest(parameterized.TestCase):
    @parameterized.parameters(
        recurrent, cnn, attention, two_by_two, models_in_models
    )
    @pytest.mark.rare
    def test_any_layer_can_be_pinned(self, model):
        self.check(model)

    @parameterized.parameters(unrolled, subclassed)
    @pytest.mark.rare
    def test_so_of_models_of_the_same_kinds(self, model):
        self.check(model)

    def check(self, model):
        plain = make(model)
        x = inputs(plain, 7)

        # Each layer once, with neighbours that are not pinned.
        for k in range(2):
            paths = leaves(plain)[k::2]
            pins = dict.fromkeys(paths, "/CPU:3")
            where = placement(2, layer_devices=pins)
            how = {"of": tf.reduce_sum, "training": None}
            how["look"] = towers.execution_report
            report = same_step(plain, where, x, **how)
            self.assertEmpty(report.unknown)  # nothing crosses in a loop
            for i in range(2):
                strays = [
                    (device, name)
                    for device, name, _ in report.nodes
                    if any(f"tower_{i}/{path}/" in name for path in paths)
                    and device != "/CPU:3"
                ]
                self.assertEmpty(strays)


class EmbeddingTest(parameterized.TestCase):
    @parameterized.parameters(
        (False, "/CPU:0", "sgd", 100_000), (True, "/CPU:3", "adam")
    )
    @pytest.mark.rare  # see row_tables_test
    def test_only_the_rows_looked_up_cross(
        self, mask, parameters, optimizer, count=WORDS
    ):
        self.check(mask, parameters, optimizer, count)

    @parameterized.parameters(
        (False, "/CPU:1", "sgd"),
        (True, "/CPU:0", "adam"),
        (True, "/CPU:3", "sgd"),
        (False, "/CPU:3", "adam"),
    )
    @pytest.mark.rare
    def test_and_wherever_the_parameters_are(self, mask, parameters, optimizer):
        self.check(mask, parameters, optimizer, WORDS)

    def check(self, mask, parameters, optimizer, count):
        where = towers.Placement(
            ["/CPU:1", "/CPU:2"],
            parameter_device=parameters,
            layer_devices={"embedding": "/CPU:0"},
        )
        plain, towered = pair(lambda: words(mask, count), where)
        x = RNG.integers(0, count, [64, 16]).astype("int32")
        y = RNG.normal(size=[64, 4]).astype("float32")
        for m in (plain, towered):
            m.compile(optimizer, "mse", run_eagerly=m is plain)
        report = towers.execution_report(towered.train_on_batch, x, y)
        table, *rest = towered.get_weights()
        rows = 64 * 16 * WIDTH * FLOAT  # there; and their gradients back
        others = sum(w.nbytes for w in rest)
        # The weights to two towers, their gradients back; outputs and their
        # gradients; targets to the loss; ids or masks to the towers.
        least = 4 * others + 3 * y.nbytes + mask * x.nbytes
        self.assertLess(report.total_bytes, 1.1 * (2 * rows) + least)
        self.assertLess(report.total_bytes, table.nbytes + 2 * rows + least)
        for t in report.transfers:
            self.assertNotEqual(t.shape, table.shape)
        for i in range(2):
            report.assert_runs_on(f"tower_{i}/out", f"/CPU:{i + 1}")
        ops = {kind for device, kind in report.ops if device == "/CPU:0"}
        if optimizer == "sgd":  # sparse up to the variable
            self.assertIn("ResourceScatterSub", ops)
        held = report.parameter_bytes["/CPU:0"]
        self.assertGreaterEqual(held, table.nbytes)
        how = {"optimizer": None, "batch_size": 48, "epochs": 2}
        same_fit((plain, towered), x, y, **how)

    def test_the_gradient_is_sparse_in_a_step_of_one_s_own(self):
        model = make(words)
        where = placement(3, layer_devices={"embedding": "/CPU:0"})
        kinds = []

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                graph = towers.build_towers(model, x, where)
                loss = tf.reduce_sum(graph.outputs)
            gradients = tape.gradient(loss, model.trainable_variables)
            kinds.append(type(gradients[0]))
            return gradients

        step(RNG.integers(0, WORDS, [2, 16]))  # an empty tower, too
        self.assertEqual(kinds, [tf.IndexedSlices])

    def test_a_policy_sees_the_other_variables(self):
        seen = []

        def policy(variables):
            seen.extend(v.path for v in variables)
            return ["/CPU:1"] * len(variables)

        where = placement(
            2, parameter_device=policy, layer_devices={"embedding": "/CPU:2"}
        )
        model = towers.TowerModel(make(words), where)
        self.assertLen(seen, 2)
        devices = [v.value.device[-5:] for v in model.variables]
        self.assertEqual(devices, ["CPU:2", "CPU:1", "CPU:1"])


class ModelParallelTest(absltest.TestCase):
    def test_one_tower_over_three_devices(self):
        model = chain(
            [8], *[layers.Dense(8, "tanh", name=f"d{i}") for i in range(3)]
        )
        where = towers.Placement(
            ["/CPU:0"], layer_devices={f"d{i}": f"/CPU:{i}" for i in range(3)}
        )
        model = towers.TowerModel(model, where)
        model.compile(keras.optimizers.SGD(), "mse")
        x = y = RNG.normal(size=[5, 8]).astype("float32")
        report = towers.execution_report(model.train_on_batch, x, y)
        for i in range(3):
            report.assert_runs_on(f"tower_0/d{i}", f"/CPU:{i}")
        # Activations 0 -> 1 -> 2 -> 0, and their gradients back; the learning
        # rate and the step to each other device, in one tensor.
        others = [t.bytes for t in report.transfers if t.shape != x.shape]
        self.assertEqual(sorted(filter(None, others)), [3 * FLOAT] * 2)
        self.assertEqual(report.total_bytes, 6 * x.nbytes + sum(others))
        self.assertEqual(report.total_bytes, report.least_bytes)
        before = [w.copy() for w in model.get_weights()]
        model.fit(x, y, verbose=0)
        self.assertFalse(np.allclose(before[0], model.get_weights()[0]))


class QuantizedTest(parameterized.TestCase):
    @parameterized.parameters("int8", "float8")
    @pytest.mark.slow(after=1)
    def test_a_layer_with_another_call_is_where_it_is_pinned(self, mode):
        model = make(nested)
        model.quantize(mode)
        x = RNG.normal(size=[5, 4]).astype("float32")
        expected = model.predict(x, verbose=0)
        where = placement(2, layer_devices={"body": "/CPU:3"})
        model = towers.TowerModel(model, where)
        report = towers.execution_report(model.predict, x, verbose=0)
        report.assert_runs_on("tower_1/body/deep", "/CPU:3")
        report.assert_runs_on("tower_1/head/deep", "/CPU:1")
        close(model.predict(x, verbose=0), expected)


class ElsewhereTest(absltest.TestCase):
    def test_in_a_session(self):
        model = make(words)
        x = RNG.integers(0, WORDS, [5, 16])
        expected = model(x)
        v1 = tf.compat.v1
        with tf.Graph().as_default():
            where = placement(2, layer_devices={"embedding": "/CPU:3"})
            graph = towers.build_towers(model, tf.constant(x), where)
            self.assertIn("CPU:3", v1.global_variables()[0].device)
            config = v1.ConfigProto(device_count={"CPU": 4})
            with v1.Session(config=config) as session:
                session.run(v1.global_variables_initializer())
                close(session.run(graph.outputs), expected)

    @pytest.mark.rare
    def test_in_a_saved_model(self):
        model = make(words)
        x = RNG.integers(0, WORDS, [5, 16]).astype("int32")
        where = placement(2, layer_devices={"embedding": "/CPU:3"})
        path = os.path.join(tempfile.mkdtemp(), "saved")
        towers.export_towers(model, path, where)
        options = tf.saved_model.LoadOptions(
            experimental_variable_policy="save_variable_devices"
        )
        loaded = tf.saved_model.load(path, options=options)
        close(loaded.serve(x), model(x))
        self.assertEndsWith(loaded.parameters[0].device, "CPU:3")
        report = towers.execution_report(loaded.serve, tf.constant(x))
        report.assert_runs_on("tower_1/embedding", "/CPU:3")


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"embeding": "/CPU:0"}, ValueError, "no such layer.*embedding"),
        ({"embedding": "/CPU:9"}, ValueError, r"layer_devices\['embedding'\]"),
        ({"embedding": "CPU/0"}, ValueError, "no device name"),
        (["embedding"], TypeError, "dict from layers' names"),
    )
    def test_what_does_not_exist_is_refused_by_name(self, pins, kind, message):
        with self.assertRaisesRegex(kind, message):
            where = placement(2, layer_devices=pins)
            towers.TowerModel(make(words), where)

    def test_a_name_that_could_be_two_needs_its_path(self):
        where = placement(2, layer_devices={"deep": "/CPU:3"})
        with self.assertRaisesRegex(ValueError, "body/deep, head/deep"):
            towers.TowerModel(nested(), where)
        for pin in ("body/deep", "body"):
            where = placement(2, layer_devices={pin: "/CPU:3"})
            model = towers.TowerModel(nested(), where)
            x = np.ones([3, 4])
            close(model(x), model.template(x))
            kernel, _, other, _ = model.variables
            self.assertEndsWith(kernel.value.device, "CPU:3")
            self.assertEndsWith(other.value.device, "CPU:0")
