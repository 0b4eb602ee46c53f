"""hints: each is true by a count, and there are no more than three."""

import collections

import tensorflow as tf
from absl.testing import absltest

from towers.report.hints import hints
from towers.report.moved import Moved
from towers.report.partitions import Transfer
from towers.report.parts import Part
from towers.report.report import ExecutionReport
from towers.report.variables import VariableUse

CPUS = [f"/CPU:{i}" for i in range(4)]


def sent(source, target, kind, layer, rows):
    """A transfer of `rows` floats that are one layer's."""
    part = Part(kind, layer, f"{layer}/x", 4 * rows)
    return Transfer(source, target, "x:0", tf.float32, (rows,), 1, (part,))


def report(*transfers, nodes=(), **attributes):
    table = VariableUse("words/x", CPUS[0], 4000, "parameter", "words/x")
    return ExecutionReport(nodes, transfers, (table,), 0, **attributes)


def parameters(rows, back):
    return [
        sent(*ends, kind, "words", count)
        for i in (1, 2)
        for kind, ends, count in (
            ("parameters", (CPUS[0], CPUS[i]), rows),
            ("gradients", (CPUS[i], CPUS[0]), back),
        )
    ]


class HintsTest(absltest.TestCase):
    def test_nothing_to_say(self):
        self.assertEqual(hints(report()), ())
        few = report(sent(*CPUS[:2], "batch", "", 100))
        self.assertEqual(few.hints, ())

    def test_pins_that_make_most_of_it(self):
        (hint,) = report(
            sent(*CPUS[:2], "activations", "a", 100),
            sent(CPUS[1], CPUS[0], "activation gradients", "b", 150),
            sent(*CPUS[1:3], "activations", "c", 20),
            sent(*CPUS[:2], "batch", "", 200),
        ).hints
        self.assertStartsWith(hint, "1.08 kB of 1.88 kB are activations")
        self.assertIn("of 3 layers", hint)
        self.assertIn("1.00 kB of them between /CPU:0 and /CPU:1", hint)
        less = report(
            sent(*CPUS[:2], "activations", "a", 100),
            sent(*CPUS[:2], "batch", "", 100),
        )
        self.assertEqual(less.hints, ())

    def test_a_table_that_crosses_whole(self):
        looks = ((CPUS[1], "tower_1/words/GatherV2", "GatherV2"),)
        (hint,) = report(*parameters(1000, 5), nodes=looks).hints
        self.assertStartsWith(hint, "8.00 kB of 8.04 kB are the whole table")
        self.assertIn('layer_devices={"words": "/CPU:0"}', hint)

    def test_parameters_of_one_device(self):
        (hint,) = report(*parameters(1000, 1000)).hints
        self.assertStartsWith(hint, "16.0 kB of 16.0 kB are parameters and")
        self.assertIn("between /CPU:0 and 2 others", hint)
        self.assertEqual(report(*parameters(9, 9)[:2]).hints, ())

    def test_three_at_most_what_is_wrong_first(self):
        hints = report(
            *parameters(10, 10),
            sent(*CPUS[:2], "activations", "a", 1000),
            moved=(Moved("a", "Exp", "/GPU:0", CPUS[0]),) * 2,
            eager=collections.Counter({(CPUS[0], "Exp"): 7}),
        ).hints
        self.assertLen(hints, 3)
        self.assertIn("2 ops are elsewhere than asked: a (Exp)", hints[0])
        self.assertIn("7 ops ran one by one", hints[2])
