"""sent_kinds: what crosses is called what it is, in reports and in plans."""

import collections
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import (
    DEVICES,
    NAMED,
    chain,
    cnn,
    inputs,
    make,
    placement,
    recurrent,
    targets,
)

import towers
from towers.report.parts import Part, parts_in_words
from towers.report.write_graph import joined

layers = keras.layers
ALWAYS = {"parameters", "gradients", "batch", "outputs", "output gradients"}


def normalised():
    return chain(
        [6],
        layers.Dense(4, name="one"),
        layers.BatchNormalization(name="norm"),
        layers.Dropout(0.5),
        layers.Dense(5, name="two"),
        layers.Dense(2, name="three"),
    )


def compiled(factory, where, optimizer="sgd", **options):
    model = towers.TowerModel(make(factory), where, **options)
    model.compile(optimizer, "mse")
    x = inputs(model.template, 7)
    return model, x, targets(model.template, 7)


def step(factory, where, **options):
    model, x, y = compiled(factory, where, **options)
    return model, towers.execution_report(model.train_on_batch, x, y)


def named(report, kind):
    """Bytes by name of what crossed that is of a kind."""
    results = collections.Counter()
    for transfer in report.transfers:
        for part in transfer.parts:
            if part.kind == kind:
                results[part.name] += part.bytes
    return results


def paths(model):
    """Weights by their paths without the model's own name, and their bytes."""
    own = f"{model.template.name}/"
    return {
        v.path.removeprefix(own): v.numpy().nbytes
        for v in model.template.trainable_variables
    }


class KindsTest(parameterized.TestCase):
    @parameterized.named_parameters(NAMED)
    @pytest.mark.rare(after=1)
    def test_all_of_a_step_has_a_kind(self, factory):
        model, report = step(factory, placement(3))
        self.assertEqual(set(report.by_kind), ALWAYS)
        self.assertEqual(sum(report.by_kind.values()), report.total_bytes)
        weights = paths(model)
        self.assertEqual(
            named(report, "parameters"), {n: 2 * b for n, b in weights.items()}
        )
        self.assertEqual(set(named(report, "gradients")), set(weights))
        for transfer in report.transfers:
            total = sum(part.bytes for part in transfer.parts)
            self.assertEqual(total, transfer.bytes, transfer)

    @parameterized.parameters("adam", "adafactor")
    @pytest.mark.rare
    def test_gradients_are_known_by_what_they_change(self, optimizer):
        optimizer = keras.optimizers.get(optimizer)
        optimizer.global_clipnorm = 1.0
        model, x, y = compiled(normalised, placement(2), optimizer)
        report = towers.execution_report(model.train_on_batch, x, y)
        self.assertEqual(named(report, "gradients"), paths(model))

    def test_activations_of_pinned_layers_and_states(self):
        pins = {"two": DEVICES[2]}
        model, report = step(normalised, placement(2, layer_devices=pins))
        # 7 rows of 4 to the layer and of 5 from it, and back again; the layers
        # are those that made what crossed.
        rows = 2 * 4 * 7 * (4 + 5)
        self.assertEqual(report.pinned_bytes, rows)
        self.assertEqual(report.by_layer["two"]["activations"], 4 * 7 * 5)
        self.assertEqual(
            report.by_layer["two"]["activation gradients"], 4 * 7 * 4
        )
        self.assertIn("norm/moving_mean", str(named(report, "state")))
        self.assertIn("only because layers are pinned", str(report))

    def test_a_fit_with_its_loss_on_towers(self):
        model, x, y = compiled(cnn, placement(2), loss_on_towers=True)
        report = towers.execution_report(
            model.fit, x, y, batch_size=7, verbose=0
        )
        self.assertEqual(named(report, "gradients"), paths(model))
        self.assertNotIn("rest", report.by_kind)
        batch = x[3:].nbytes + y[3:].nbytes
        self.assertEqual(report.by_kind["batch"], batch)
        for name in [n for _, n, _ in report.nodes]:
            self.assertNotStartsWith(name, "StatefulPartitionedCall/")
        for transfer in report.transfers:
            self.assertNotIn("PartitionedCall", transfer.tensor)
        drawn = [node.name for node in joined(report.graphs).node]
        self.assertLen(set(drawn), len(drawn))
        for name in drawn:
            self.assertNotIn("PartitionedCall/", name)

    def test_gradients_that_change_nothing(self):
        model = make(cnn)
        x = tf.constant(inputs(model, 6))

        @tf.function
        def gradients():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = towers.build_towers(model, x, placement(2)).outputs
                loss = tf.reduce_sum(y**2)
            return tape.gradient(loss, [x, *model.trainable_variables])

        report = towers.execution_report(gradients)
        self.assertEqual(set(report.by_kind), {*ALWAYS, "batch gradients"})
        self.assertLen(named(report, "gradients"), 4)
        self.assertEqual(
            named(report, "gradients"), named(report, "parameters")
        )

    def test_halves(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model, report = step(normalised, placement(2))
        finally:
            keras.config.set_dtype_policy("float32")
        self.assertEqual(set(named(report, "parameters")), set(paths(model)))
        self.assertEqual(set(named(report, "gradients")), set(paths(model)))
        self.assertEqual(sum(report.by_kind.values()), report.total_bytes)

    @parameterized.parameters(cnn, recurrent)
    @pytest.mark.rare(after=1)
    def test_a_plan_says_the_same(self, factory):
        model, x, y = compiled(factory, placement(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = towers.placement_plan(model, x, y, machine={"CPU": 2})
        self.assertEqual(sum(plan.by_kind.values()), plan.total_bytes)
        self.assertEqual(named(plan, "parameters"), paths(model))
        self.assertEqual(named(plan, "gradients"), paths(model))

    def test_no_towers(self):
        with tf.device(DEVICES[0]):
            weight = tf.Variable(tf.ones([3, 3]), name="w")

        @tf.function
        def apply(x):
            with tf.device(DEVICES[1]):
                return tf.split(tf.exp(x) @ weight, 3, 1)

        report = towers.execution_report(apply, np.ones([5, 3], "float32"))
        self.assertEqual(report.by_kind, {"rest": 60, "parameters": 36})

    def test_words(self):
        parts = [Part("parameters", "a", f"a/{n}", 4) for n in "bcdef"]
        self.assertEqual(
            parts_in_words(parts), "weights of a/b, a/c, a/d and 2 more"
        )
        self.assertEqual(
            parts_in_words([Part("batch"), *parts[:2], Part("rest")]),
            "batch; weights of a/b, a/c",
        )
