"""state: what shards say, made that of the batch, by way of machines too."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, placement
from two_machines import in_machines, machine_of

import towers
from towers.engine import dependence
from towers.keras_model.moments import of_all_shards
from towers.verbs.rows import Rows


class PooledTest(parameterized.TestCase):
    @parameterized.parameters([[3, 4]], [[1, 1, 1]], [[0, 5]], [[7]])
    def test_pooled_moments_are_the_batch_s(self, rows):
        x = np.random.default_rng(0).normal(5, 2, [sum(rows), 3])
        shards = np.split(x, np.cumsum(rows)[:-1])
        parts = [
            tf.stack(
                [s.mean(0), s.var(0)] if len(s) else [np.full(3, np.nan)] * 2
            )
            for s in shards
        ]
        mean, variance = of_all_shards(
            parts, Rows(tf.constant(rows), [r == 0 for r in rows]), "/CPU:0"
        )
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, x.var(0), rtol=1e-6)


class SeedTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    def test_a_step_that_finds_no_batch_moves_seeds_on_too(self, n):
        noisy = keras.Sequential(
            [keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.1)]
        )

        @tf.function(autograph=False)
        def step(x):
            graph = towers.build_towers(noisy, x, placement(n), training=True)
            self.assertLen(graph.updates, 2)
            for _, value in graph.updates:
                self.assertFalse(dependence.depends(value, [x]))

        step.get_concrete_function(tf.TensorSpec([None, 3]))


class Said(keras.layers.Layer):
    """State and losses of each rule that machines may go by first."""

    def __init__(self, rule):
        super().__init__(name=f"said_{rule}")
        self.rule = rule
        towers.merge_losses_by(self, rule)

    def build(self, shape):
        self.kept = self.add_weight(
            shape=shape[-1:], initializer="ones", trainable=False, name="kept"
        )
        towers.merge_state_by(self.kept, self.rule)

    def call(self, x):
        ops = keras.ops
        seen = getattr(ops, self.rule)(x, 0)
        if self.rule in ("sum", "mean"):
            seen = seen + self.kept
        self.kept.assign(seen)
        self.add_loss(0.1 * getattr(ops, self.rule)(x))
        return x


def network_of(rules):
    keras.utils.set_random_seed(1)
    each = [keras.layers.Dense(3), *map(Said, rules)]
    return keras.Sequential([keras.Input([3]), *each])


def across(report):
    """What goes from the second machine to the first, counted by kind."""
    return collections.Counter(
        t.holds.split()[0]
        for t in report.transfers
        if (machine_of(t.source), machine_of(t.target)) == ("b", "a")
    )


class MachinesTest(parameterized.TestCase):
    def where(self):
        return towers.Placement(
            ["/CPU:1", "/CPU:2", "/CPU:1", "/CPU:0", "/CPU:3"],
            weights=[2, 1, 0, 1, 1],
            parameter_device="/CPU:0",
            output_device="/CPU:0",
        )

    def test_state_and_losses_cross_once_from_each_machine(self):
        """And they are the plain model's, whoever has no rows."""
        rules = "mean", "max"
        plain, model = network_of(rules), network_of(rules)

        @tf.function(reduce_retracing=True)
        def step(x):
            graph = towers.build_towers(model, x, self.where(), training=True)
            graph.apply_updates()
            return graph.losses

        rng = np.random.default_rng(0)
        with in_machines():
            for rows in (5, 1):
                x = rng.normal(size=[rows, 3]).astype("float32")
                losses = step(x)
                plain(x, training=True)
                close(losses, plain.losses)
            report = towers.execution_report(step, x)
        close(model.get_weights(), plain.get_weights())
        self.assertEqual(across(report), {"state": 2, "outputs": 2})

    @parameterized.parameters(
        (True, "mean", "max"), (False, "sum", "mean", "max", "min")
    )
    @pytest.mark.slow
    def test_what_is_merged_crosses_once_from_each_machine(self, here, *rules):
        """And the numbers are the plain model's, whoever has no rows."""
        plain, model = network_of(rules), network_of(rules)
        model = towers.TowerModel(model, self.where(), loss_on_towers=here)
        rng = np.random.default_rng(0)
        x = rng.normal(size=[11, 3]).astype("float32")
        results = []
        with in_machines():
            for m in (plain, model):
                m.compile(
                    keras.optimizers.SGD(0.01),
                    "mse",
                    weighted_metrics=["mae"],
                    jit_compile=False,
                )
                # The last batch is of one row, and its towers' numbers open.
                fit = m.fit(
                    x, x, batch_size=5, shuffle=False, epochs=2, verbose=0
                )
                results.append((fit.history, m.get_weights()))
            report = towers.execution_report(model.train_on_batch, x, x)
        close(*results)
        # Parts of the compiled loss and metrics, or each tower's outputs.
        others = 1 if here else 3
        self.assertEqual(
            across(report),
            {
                "state": len(rules),
                "outputs": len(rules) + others,
                "gradient": 1,
            },
        )
