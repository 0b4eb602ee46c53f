"""relays: they are the devices of towers, and share what they carry."""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close
from two_machines import between_machines, in_machines

import towers
from towers.keras_model import tower
from towers.keras_model.halves import Halves
from towers.verbs.relays import Relays

CHIEF = "/CPU:0"
FIRST, SECOND = (
    [f"/job:worker/replica:0/task:{i}/device:GPU:{k}" for k in range(3)]
    for i in range(2)
)


class RelaysTest(absltest.TestCase):
    def test_one_per_machine_that_is_another(self):
        relays = Relays()
        for home, places, expected in (
            (CHIEF, FIRST[:2] + SECOND[:2], FIRST[:1] * 2 + SECOND[:1] * 2),
            (FIRST[2], FIRST[:2] + SECOND[:2], FIRST[:2] + SECOND[1:2] * 2),
            # One that is alone, or this process's own: as they are.
            (CHIEF, [CHIEF, "/CPU:1", SECOND[2]], [CHIEF, "/CPU:1", SECOND[2]]),
            (CHIEF, [SECOND[2]] * 2, [SECOND[2]] * 2),
            (FIRST[0], [CHIEF, "/CPU:1"], [CHIEF] * 2),
        ):
            self.assertEqual(relays.ways(home, places, 10), expected)

    def test_no_device_carries_all(self):
        relays, carried = Relays(), dict.fromkeys(FIRST, 0)
        for size in (9, 5, 5, 4, 4):
            first, *others = relays.ways(CHIEF, FIRST, size)
            self.assertEqual(others, [first] * 2)
            carried[first] += size
        self.assertEqual(list(carried.values()), [9, 9, 9])


class Product(keras.Model):
    """Of rows with a matrix that is no batch."""

    def call(self, inputs):
        return inputs["rows"] @ inputs["matrix"]


class Means(keras.Model):
    """Adds what is computed of all rows, and is large."""

    needs_all_towers = True

    def call(self, inputs):
        def product(rows):
            return tf.einsum("bi,bj->ij", rows, rows)

        rows = inputs["rows"]
        return rows @ towers.all_towers(product, rows) @ inputs["matrix"]


class BetweenTest(parameterized.TestCase):
    def test_what_towers_cast_crosses_in_half(self):
        """And all that a tape makes of it is what it was, to the last bit."""
        where = towers.Placement(["/CPU:1", "/CPU:2", "/CPU:1", CHIEF])
        rng = np.random.default_rng(0)
        batch = {
            "rows": tf.constant(rng.normal(size=[4, 9]), tf.float32),
            "matrix": tf.constant(rng.normal(size=[9, 9]), tf.float32),
        }
        result = Product(dtype="mixed_bfloat16")

        def run():
            @tf.function
            def step(batch):
                with tf.GradientTape() as tape:
                    tape.watch(batch)
                    graph = towers.build_towers(
                        result, batch, where, whole=["matrix"]
                    )
                    loss = tf.reduce_mean(graph.outputs**2)
                return graph.outputs, tape.gradient(loss, batch)

            report = towers.execution_report(step, batch)
            return step(batch), between_machines(report)

        with in_machines():
            narrow, sent = run()
            with mock.patch.object(tower, "halves_of", lambda *_: Halves()):
                wide, before = run()
        for x, y in zip(*map(tf.nest.flatten, (narrow, wide)), strict=True):
            np.testing.assert_array_equal(x, y)
        less = {way: size - sent[way] for way, size in before.items()}
        # Three rows and the matrix; gradients come as they are.
        expected = {("a", "b"): 2 * (3 * 9 + 9 * 9), ("b", "a"): 0}
        self.assertEqual(less, expected)

    @parameterized.parameters((Product, 1), (Means, 2))
    @pytest.mark.slow(after=1)
    def test_what_is_whole_crosses_once_there_and_back(self, layer, matrices):
        n = 200
        # A relay's tower has no rows.
        where = towers.Placement(
            [CHIEF, "/CPU:3", "/CPU:1", "/CPU:2"], weights=[1, 1, 0, 2]
        )
        rng = np.random.default_rng(0)
        batch = {
            "rows": rng.normal(size=[4, n]).astype("float32"),
            "matrix": rng.normal(size=[n, n]).astype("float32"),
        }
        result = layer()

        def step_of(call):
            @tf.function
            def step(batch):
                with tf.GradientTape() as tape:
                    tape.watch(batch)
                    loss = tf.reduce_mean(call(batch) ** 2)
                return loss, tape.gradient(loss, batch)

            return step

        def in_towers(batch):
            graph = towers.build_towers(result, batch, where, whole=["matrix"])
            return graph.outputs

        step = step_of(in_towers)
        with in_machines():
            batch = tf.nest.map_structure(tf.constant, batch)
            close(step(batch), step_of(result)(batch))
            report = towers.execution_report(step, batch)
        crossed = between_machines(report)
        size = 4 * n * n
        for way, bytes_sent in crossed.items():
            self.assertBetween(bytes_sent / size, matrices, matrices + 0.1, way)
        self.assertBetween(report.total_bytes / report.least_bytes, 1, 1.01)
