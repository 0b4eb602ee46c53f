"""What is public shows itself in a few words, however much it holds."""

import inspect
import tempfile

import keras
import tensorflow as tf
from absl.testing import absltest
from models import placement

import towers
from towers.planning.figures import Figure
from towers.planning.spread import LayerSpread
from towers.report.partitions import Transfer
from towers.report.profile import Op
from towers.tower_graph import Pending

MANY = 5000
NAMES = [f"a_layer_with_a_long_name_{i}" for i in range(MANY)]
DEVICES = [f"/GPU:{i}" for i in range(MANY)]
PINS = dict(zip(NAMES, DEVICES))


def shown():
    """One of each public class, of a model with thousands of layers."""
    nodes = tuple(zip(DEVICES, NAMES, NAMES))
    crossed = tuple(
        Transfer(*("/CPU:0", "/CPU:1", name, tf.float32, (2,), 1))
        for name in NAMES
    )
    ops = tuple(Op(name, name, "/CPU:0", 0.0, 1.0) for name in NAMES)
    alike = Figure("outputs", 0.0, 1.0)
    tower = [towers.Tower(i, d, f"{d}/", NAMES) for i, d in enumerate(DEVICES)]
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    where = towers.Placement(
        DEVICES,
        available="any",
        weights=[1] * MANY,
        layer_devices=PINS,
        reasons=NAMES,
    )
    return [
        where,
        LayerSpread(PINS),
        towers.ExecutionReport(nodes, crossed, (), 8),
        towers.PlacementPlan(nodes, crossed, (), 8),
        towers.Timeline(tuple(DEVICES), ops, (), 0.0, 1.0),
        towers.Comparison(*[alike] * 6, PINS, reason=" ".join(NAMES)),
        tower[0],
        towers.TowerGraph(NAMES, tower, None, Pending([], True), [], [], []),
        towers.TowerModel(model, placement(40)),
        towers.PlacementReport(tempfile.mkdtemp()),
    ]


class ReprTest(absltest.TestCase):
    def test_it_is_no_longer_than_a_screen(self):
        objects = shown()
        for one in objects:
            kind = type(one)
            self.assertLess(len(repr(one)), 2000, kind)
            self.assertIn(kind.__name__, repr(one))
        public = {getattr(towers, name) for name in towers.__all__}
        classes = {x for x in public if inspect.isclass(x)}
        # A cluster has a connection, and an error its message.
        elsewhere = {towers.Cluster, towers.WorkerLost}
        self.assertEqual(classes - set(map(type, objects)), elsewhere)

    def test_it_says_what_it_is(self):
        place = placement(2, [3, 1], layer_devices={"a": "/CPU:1"})
        for words in ("devices=('/CPU:0', '/CPU:1')", "weights=(3.0, 1.0)"):
            self.assertIn(words, repr(place))
        self.assertIn("{'a': '/CPU:1'}", repr(place))
        report = next(x for x in shown() if type(x) is towers.ExecutionReport)
        self.assertRegex(
            repr(report), "5,000 ops on /GPU:0, .*; 40,000 bytes in 5,000 tr"
        )
