"""departures: what others wait for leaves before a tower starts here."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from executed import Executed
from models import chain, make

import towers
from towers.verbs.departures import departing_first

layers = keras.layers


def dense():
    return chain(
        [4],
        layers.Dense(8, "relu", name="hidden"),
        layers.Dense(3, name="last"),
    )


class DeparturesTest(absltest.TestCase):
    def test_a_tower_beside_the_batch_starts_when_others_can(self):
        where = towers.Placement(
            ["/CPU:1", "/CPU:2"], "/CPU:3", input_device="/CPU:1"
        )
        model = towers.TowerModel(make(dense), where)
        model.compile("sgd", "mse")
        x, y = np.ones([6, 4], "float32"), np.ones([6, 3], "float32")
        executed = Executed(lambda: model.fit(x, y, verbose=0))
        here = {
            name: node
            for device, name, node in executed.nodes
            if device == "/CPU:1"
        }
        (first,) = (
            node
            for name, node in here.items()
            if "tower_0/hidden/" in name and node.op.endswith("FusedMatMul")
        )
        (sent,) = (
            node.input[0].split(":")[0]
            for node in here.values()
            if node.op == "_Send"
            and node.attr["recv_device"].s.endswith(b"CPU:2")
        )
        # The shard of the other is ready next after the tower's own.
        (own,) = (x for x in here[sent].input if x.startswith("^"))
        self.assertIn(own[1:], {x.split(":")[0] for x in first.input})

    def test_where_no_tower_is_nothing_waits(self):
        with tf.Graph().as_default():
            with tf.device("/CPU:0"):
                shards = [tf.ones([2, 3]), tf.zeros([1, 3])]
            where = towers.Placement(["/CPU:1", "/CPU:2"])
            given = departing_first(shards, where)
            self.assertIs(given[0], shards[0])
            self.assertIs(given[1], shards[1])
