"""Consecutive layers on each device: balanced, seldom cut, as it was said."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import DEVICES, Subclassed, chain, subclassed

import towers
from towers.planning import steps

layers = keras.layers


def two_branches() -> keras.Model:
    """Of which Keras lists the layers in turn."""
    x = keras.Input([32])
    branches = []
    for _ in range(2):
        y = x
        for _ in range(4):
            y = layers.Dense(32, "tanh")(y)
        branches.append(y)
    return keras.Model(x, layers.Dense(10)(branches[0] + branches[1]))


def transformer(blocks: int = 4) -> keras.Model:
    tokens = keras.Input([6], dtype="int32")
    y = layers.Embedding(50, 16)(tokens)
    for _ in range(blocks):
        y = layers.LayerNormalization()(
            y + layers.MultiHeadAttention(2, 8)(y, y)
        )
        hidden = layers.Dense(32, "gelu")(y)
        y = layers.LayerNormalization()(y + layers.Dense(16)(hidden))
    return keras.Model(tokens, layers.Dense(50)(y))


def residual() -> keras.Model:
    """Blocks that a cut would go through twice."""
    x = y = keras.Input([16])
    for i in range(4):
        inner = layers.Dense(16, "relu", name=f"{i}_in")(y)
        inner = layers.Dense(16, name=f"{i}_out")(inner)
        y = layers.Add(name=f"{i}_sum")([y, inner])
    return keras.Model(x, y)


def resnet() -> keras.Model:
    return keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))


def held(layer: keras.Layer) -> int:
    return sum(4 * math.prod(v.shape) for v in layer.trainable_variables)


def best_of_all(model: keras.Model, n: int) -> int:
    """The largest stage of the best contiguous cut, found by trying all."""
    sizes = [held(layer) for layer in model.layers if held(layer)]
    before = [0, *itertools.accumulate(sizes)]
    return min(
        max(before[b] - before[a] for a, b in zip(cuts, cuts[1:]))
        for inner in itertools.combinations(range(1, len(sizes)), n - 1)
        for cuts in [(0, *inner, len(sizes))]
    )


class SpreadTest(parameterized.TestCase):
    @parameterized.product(model=[two_branches, transformer], n=[2, 3, 4])
    def test_the_largest_stage_is_as_small_as_can_be(self, model, n):
        self.check(model(), n)

    @pytest.mark.rare
    def test_so_it_is_of_a_resnet(self):
        model = resnet()
        for n in (2, 3, 4):
            self.check(model, n)

    def check(self, model, n):
        spread = towers.spread_layers(model, DEVICES[:n], verbose=False)
        sizes = [stage.parameter_bytes for stage in spread.stages]
        self.assertEqual(sum(sizes), held(model))
        self.assertLessEqual(max(sizes), 1.05 * best_of_all(model, n))
        received = sum(stage.received for stage in spread.stages)
        self.assertLessEqual(received, 2 * (n - 1))

    def test_no_residual_block_is_cut_where_another_cut_is_as_good(self):
        spread = towers.spread_layers(residual(), DEVICES, verbose=False)
        for k, stage in enumerate(spread.stages):
            self.assertEqual(stage.paths, (f"{k}_in", f"{k}_out", f"{k}_sum"))
            self.assertEqual(stage.received, int(k > 0))

    def test_one_branch_comes_after_the_other(self):
        first, second = towers.spread_layers(
            two_branches(), DEVICES[:2], verbose=False
        ).stages
        self.assertEqual((first.received, second.received), (0, 1))

    def test_devices_hold_what_was_said(self):
        model = transformer(1)
        model.compile("adam", "mse")
        spread = towers.spread_layers(
            model, DEVICES[1:3], batch_size=3, verbose=False
        )
        where = towers.Placement(["/CPU:1"] * 2, layer_devices=spread)
        towered = towers.TowerModel(model, where)
        rng = np.random.default_rng(0)
        x = rng.integers(0, 50, [3, 6])
        report = towers.execution_report(
            towered.train_on_batch, x, rng.normal(size=[3, 6, 50])
        )
        for stage in spread.stages:
            self.assertEqual(
                report.parameter_bytes[stage.device], stage.parameter_bytes
            )
            self.assertEqual(report.slot_bytes[stage.device], stage.slot_bytes)
            self.assertGreater(stage.activation_bytes, 3 * 6 * 16 * 4)
            for path in stage.paths:
                report.assert_runs_on(f"tower_1/{path}", stage.device)
        # Each micro-batch crosses once, and its gradient back.
        crossed = [t.shape for t in report.transfers if t.shape[1:] == (6, 16)]
        self.assertCountEqual(crossed, [(1, 6, 16), (2, 6, 16)] * 2)

    def test_it_says_what_each_device_gets(self):
        spread = towers.spread_layers(residual(), DEVICES[:2], verbose=False)
        self.assertRegex(
            str(spread), r"/CPU:0: 4,352 bytes in 6 layers, 0_in to 1_sum"
        )

    def test_layers_of_a_class_of_one_s_own_go_by_their_calls(self):
        class Backwards(Subclassed):
            def call(self, x):
                return self.hidden(self.out(x))

        model = Backwards()
        model(np.zeros([1, 4], "float32"))
        result = steps.steps_of(model, None)
        self.assertEqual(
            [step.layer for step in result.steps], [model.out, model.hidden]
        )
        self.assertEqual([value[:2] for value in result.values], [(0, {1})])

    def test_results_of_a_custom_gradient_go_to_who_takes_them(self):
        @tf.custom_gradient
        def both(x, y):
            return (x * 2.0, y * 3.0), lambda a, b: (a * 2.0, b * 3.0)

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.each = [layers.Dense(3) for _ in range(4)]

            def call(self, x):
                u, v = both(self.each[0](x), self.each[1](x))
                return self.each[2](u), self.each[3](v)

        model = Model()
        model(np.ones([2, 3], "float32"))
        result = steps.steps_of(model, 4).values
        takers = {copy: taken for copy, taken, _ in result}
        self.assertEqual(takers, {0: {2}, 1: {3}})

    def test_limits_are_kept_or_the_model_is_refused(self):
        first, second = towers.spread_layers(
            residual(), DEVICES[:2], {"/CPU:0": 3000}, verbose=False
        ).stages
        self.assertEqual((first.bytes, second.bytes), (2176, 6528))
        with self.assertRaisesRegex(
            ValueError, "8,704 bytes in all.*4,352 on one of 2.*CPU:0 4,000"
        ):
            towers.spread_layers(residual(), DEVICES[:2], 4000)

    def test_a_layer_that_exceeds_each_limit_is_cut(self):
        def model():
            return chain(
                [6],
                layers.Embedding(1000, 8, name="words"),
                layers.Flatten(name="flat"),
                layers.Dense(16, name="small"),
                layers.Dense(600, name="large"),
                layers.Dense(2, name="last"),
                dtype="int32",
            )

        spread = towers.spread_layers(model(), DEVICES, 30_000)
        self.assertEqual(spread["words"], towers.row_wise(DEVICES))
        self.assertEqual(spread["large"], towers.column_wise(DEVICES))
        self.assertIn("large in pieces on /CPU:0, /CPU:1, ", str(spread))
        self.assertIn(spread["small"], DEVICES)
        total = sum(stage.bytes for stage in spread.stages)
        self.assertEqual(total, held(network := model()))
        for stage in spread.stages:
            self.assertLess(stage.bytes, 30_000)
        where = towers.Placement(["/CPU:0"], layer_devices=spread)
        towers.place_variables(network, where)
        for stage in spread.stages:
            there = [
                v
                for v in network.weights
                if v.value.device.endswith(stage.device[1:])
            ]
            self.assertEqual(
                stage.bytes, sum(4 * math.prod(v.shape) for v in there)
            )
        with self.assertRaisesRegex(
            ValueError, "80,744 bytes .*CPU:1 20,000, also with words, large in"
        ):
            towers.spread_layers(model(), DEVICES[:2], 20_000)

    @parameterized.parameters(
        (dict(devices=[]), ValueError, "at least one device"),
        (dict(devices=["/CPU:9"]), ValueError, r"devices\[0\]"),
        (dict(limits=[1]), ValueError, "one number of bytes for each of the 2"),
        (dict(limits="1 GB"), TypeError, "numbers of bytes"),
        (dict(limits={"/CPU:3": 1}), ValueError, "`limits` names /CPU:3"),
        (dict(model=layers.Dense(2)), TypeError, "keras.Model"),
        (dict(model=keras.Sequential([layers.Dense(2)])), ValueError, "built"),
    )
    def test_what_makes_no_sense_is_refused(self, changed, error, message):
        given = {"model": None, "devices": DEVICES[:2], **changed}
        given["model"] = given["model"] or subclassed()
        with self.assertRaisesRegex(error, message):
            towers.spread_layers(**given)
