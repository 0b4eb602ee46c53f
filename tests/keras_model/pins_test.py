"""Keys of `layer_devices`, and towers that span devices of their own."""

import itertools
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import (
    DEVICES,
    MODELS,
    chain,
    close,
    cnn,
    inputs,
    leaves,
    make,
    placement,
    targets,
)
from models import nested as models_in_models
from same import same_fit

import towers
from towers.keras_model import pins

layers = keras.layers
# Towers, rows and weights.
CASES = [(4, 7, None), (1, 5, None), (3, 2, [1, 2, 1]), (2, 1, [3, 1])]
A, B, C = "/CPU:1", "/CPU:2", ("/CPU:1", "/CPU:2")


def two_deep() -> keras.Model:
    """Layers "body/low/deep", "body/deep", "head/deep" and an addition."""
    low = chain([4], layers.Dense(4, name="deep"), name="low")
    body = chain([4], low, layers.Dense(4, name="deep"), name="body")
    head = chain([4], layers.Dense(4, name="deep"), name="head")
    x = keras.Input([4])
    y = body(x)
    return keras.Model(x, head(y) + y)


def where(layer_devices: dict) -> dict:
    """By path what the keys say of it."""
    paths = pins.layer_paths([two_deep()])
    result = pins.pinned(paths, layer_devices)
    results = {id(layer): pin for layer, pin in result}
    return {
        path: results[id(layer)]
        for path, layer in paths
        if id(layer) in results and not isinstance(layer, layers.InputLayer)
    }


class KeysTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"head": A}, {"head": A, "head/deep": A}),  # holds it, and all
        ({"low": A}, {"body/low": A, "body/low/deep": A}),  # by name
        ({"head/.*": A}, {"head/deep": A}),  # a whole path
        # A path beats a name beats a pattern.
        ({"body/deep": A, "body/d.*": B}, {"body/deep": A}),
        ({"low": A, ".*low": B}, {"body/low": A, "body/low/deep": A}),
        ({"low": A, "body/low": C}, {"body/low": C, "body/low/deep": C}),
        # Its own key beats that of what holds it.
        (
            {"body": A, "body/low/.*": C},
            {"body": A, "body/low": A, "body/low/deep": C, "body/deep": A},
        ),
        # Two that say the same.
        ({"head/.*": A, "h.*/deep": A}, {"head/deep": A}),
    )
    def test_each_means_these_layers(self, layer_devices, expected):
        self.assertEqual(where(layer_devices), expected)

    @parameterized.parameters(
        ({"head/.*": A, "h.*/deep": B}, "different things of 'head/deep'"),
        ({"heat/.*": A}, "no such layer.*nearest are head"),
        ({"hea": A}, "nearest are head"),  # matches no whole path
        ({"head/(": A}, "no such layer"),  # no regular expression
        ({"deep": A}, "could be any of body/deep, body/low/deep, head/deep"),
    )
    def test_others_are_refused(self, layer_devices, message):
        with self.assertRaisesRegex(ValueError, message):
            where(layer_devices)

    def test_a_layer_that_two_hold_is_where_both_say(self):
        shared = layers.Dense(4, name="deep")
        both = [chain([4], shared, name=name) for name in ("a", "b")]
        x = keras.Input([4])
        paths = pins.layer_paths([keras.Model(x, both[1](both[0](x)))])
        with self.assertRaisesRegex(ValueError, "different things of 'a/deep'"):
            pins.pinned(paths, {"a": A, "b": B})
        result = pins.pinned(paths, {"a": A, "b": B, "a/deep": C})
        self.assertEqual([pin for x, pin in result if x is shared], [C])

    def test_what_is_no_layer_can_be_put_somewhere_too(self):
        model = two_deep()
        (name,) = (
            path for path, _ in pins.layer_paths([model]) if "add" in path
        )
        where = placement(2, layer_devices={name: ["/CPU:3", "/CPU:2"]})

        @tf.function
        def run(x):
            return towers.build_towers(model, x, where).outputs

        report = towers.execution_report(run, tf.ones([2, 4]))
        report.assert_runs_on(f"tower_0/{name}", "/CPU:3")
        report.assert_runs_on(f"tower_1/{name}", "/CPU:2")

    @parameterized.parameters(
        (["/CPU:1"], "one for each of the 2 towers"),
        (["/CPU:1", "/CPU:9"], r"layer_devices\['a'\]\[1\]"),
    )
    def test_a_list_has_a_device_for_each_tower(self, devices, message):
        with self.assertRaisesRegex(ValueError, message):
            placement(2, layer_devices={"a": devices})
        pinned = placement(2, layer_devices={"a": ["cpu:1", "cpu:2"]})
        self.assertEqual(pinned.layer_devices, {"a": C})
        self.assertIn("a on /CPU:1, /CPU:2", str(pinned))


class SpanningTest(parameterized.TestCase):
    @parameterized.parameters((cnn, 3, 2, [1, 2, 1]), (models_in_models, 4, 7))
    @pytest.mark.slow
    def test_any_layer_anywhere(self, model, n, rows, weights=None):
        self.check(model, n, rows, weights)

    @parameterized.parameters(*zip(MODELS, itertools.cycle(CASES)))
    @pytest.mark.rare
    def test_so_of_all_models(self, model, case):
        self.check(model, *case)

    def check(self, model, n, rows, weights):
        draw = random.Random(f"{model.__name__} {n}")

        def device():
            return draw.choice(DEVICES)

        plain, towered = make(model), make(model)
        plain.set_weights(towered.get_weights())
        where = {
            path: [device() for _ in range(n)]
            if draw.random() < 0.7
            else device()
            for path in leaves(towered)
            if draw.random() < 0.8
        }
        towered = towers.TowerModel(
            towered,
            placement(
                n, weights, layer_devices=where, parameter_device=device()
            ),
        )
        x, y = inputs(plain, rows), targets(plain, rows)
        for m in (plain, towered):
            m.compile(keras.optimizers.SGD(0.1), "mse")
        report = towers.execution_report(towered.train_on_batch, x, y)
        for i in range(n):
            for path, there in where.items():
                there = there if isinstance(there, str) else there[i]
                report.assert_runs_on(f"tower_{i}/{path}", there)
        self.assertEmpty(report.unknown)  # nothing crosses in a loop
        # Besides a spare row, and the learning rate.
        row = sum(v.nbytes for v in tf.nest.flatten(x)) / rows
        self.assertLessEqual(
            report.total_bytes,
            1.02 * report.least_bytes + n * row + 4 * len(report.variables),
        )
        how = {"optimizer": None, "batch_size": rows, "epochs": 2}
        same_fit((plain, towered), x, y, predict=True, **how)

    @pytest.mark.rare
    def test_weights_go_once_to_each_device_that_needs_them(self):
        """Two pipelines of two towers each; statistics merge at home."""
        seen = []

        def policy(variables):
            seen.extend(variables)
            return ["/CPU:0"] * len(variables)

        def model():
            return chain(
                [8],
                layers.Dense(16, "tanh", name="low"),
                layers.BatchNormalization(synchronized=False, name="norm"),
                layers.Dense(3, name="high"),
            )

        plain = make(model)
        plain.compile("sgd", "mse")
        where = towers.Placement(
            ["/CPU:1", "/CPU:1", "/CPU:2", "/CPU:2"],
            parameter_device=policy,
            layer_devices={
                "norm|high": ["/CPU:3", "/CPU:3", "/CPU:2", "/CPU:2"]
            },
        )
        towered = towers.TowerModel(make(model), where)
        self.assertLen(seen, len(plain.variables))
        towered.compile("sgd", "mse")
        x = np.random.default_rng(0).normal(size=[8, 8]).astype("float32")
        report = towers.execution_report(towered.train_on_batch, x, x[:, :3])
        parcels = {"low": (8 * 16 + 16,), "high": (16 + 16 + 16 * 3 + 3,)}
        needed = {"low": {"/CPU:1", "/CPU:2"}, "high": {"/CPU:2", "/CPU:3"}}
        for name, shape in parcels.items():
            pairs = sorted(
                (t.source, t.target)
                for t in report.transfers
                if t.shape == shape
            )
            down = [("/CPU:0", device) for device in needed[name]]
            up = [(device, "/CPU:0") for device in needed[name]]
            self.assertEqual(pairs, sorted(down + up), name)
        for v in towered.variables:
            self.assertEndsWith(v.value.device, "CPU:0")
        for i, device in enumerate(where.layer_devices["norm|high"]):
            report.assert_runs_on(f"tower_{i}/high", device)
            report.assert_runs_on(f"tower_{i}/norm", device)
        # Statistics are those of the whole batch.
        towered.train_on_batch(x, x[:, :3])
        mean = towered.get_layer("norm").moving_mean.numpy()
        low = np.tanh(x @ plain.get_layer("low").kernel.numpy())
        close(mean, 0.01 * low.mean(0))
