"""departures: what others wait for leaves before a tower starts."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from executed import Executed
from models import make

import towers
from towers.verbs.departures import after_departures

layers = keras.layers


def dense():
    return keras.Sequential(
        [keras.Input([4]), layers.Dense(8, "relu"), layers.Dense(3)]
    )


class DeparturesTest(absltest.TestCase):
    def test_a_tower_beside_the_parameters_sends_before_it_computes(self):
        where = towers.Placement(["/CPU:1", "/CPU:2"], "/CPU:1")
        model = towers.TowerModel(make(dense), where)
        model.compile("sgd", "mse")
        x, y = np.ones([6, 4], "float32"), np.ones([6, 3], "float32")
        executed = Executed(lambda: model.fit(x, y, verbose=0))
        here = {
            name: node
            for device, name, node in executed.nodes
            if device == "/CPU:1"
        }
        first = {
            node.input[0].split(":")[0]
            for node in here.values()
            if node.op == "_Send"
            and node.attr["recv_device"].s.endswith(b"CPU:2")
            and "replicate" in node.attr["tensor_name"].s.decode()
        }
        self.assertNotEmpty(first)
        for name, node in here.items():
            if "tower_0" in name and "MatMul" in node.op:
                self.assertContainsSubset(first, before(name, here), name)

    def test_towers_that_send_nothing_wait_for_nothing(self):
        with tf.Graph().as_default():
            with tf.device("/CPU:0"):
                shards = [tf.ones([2, 3]), tf.zeros([1, 3])]
            given = after_departures(shards, [[], []], ["/CPU:1", "/CPU:2"])
            self.assertIs(given[0], shards[0])
            self.assertIs(given[1], shards[1])


def before(name, nodes):
    """Names of all that must be done before a node."""
    found, ahead = set(), [name]
    while ahead:
        for x in nodes[ahead.pop()].input:
            x = x.lstrip("^").split(":")[0]
            if x in nodes and x not in found:
                found.add(x)
                ahead.append(x)
    return found


if __name__ == "__main__":
    absltest.main()
