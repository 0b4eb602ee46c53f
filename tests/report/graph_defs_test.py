"""graph_defs: what is in a graph, and what some tensors need of it."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign.tf_nodes import all_nodes, full, library, port, source
from towers.report.graph_defs import COPY_NODES, copied, pruned, walked


@tf.function(autograph=False)
def both(x, y):
    passed = tf.identity_n([tf.sin(x), tf.cos(y)])
    return passed[0]


@tf.function(autograph=False)
def step(x, y):
    with tf.device("/CPU:1"):
        tensor = both(x, y)
    kept, gone = tf.identity_n([tensor * 2.0, tf.exp(y)], name="passed")
    return kept, gone


def graph():
    spec = tf.TensorSpec([2])
    return step.get_concrete_function(spec, spec).graph.as_graph_def()


class GraphDefsTest(absltest.TestCase):
    def test_walked_are_the_functions_that_are_called_on_their_devices(self):
        results = {
            node.op: (device, name) for device, name, node in walked(graph())
        }
        device, name = results["Sin"]
        self.assertEqual(device, "/CPU:1")
        self.assertStartsWith(name, "PartitionedCall/")
        self.assertCountEqual(
            [node.name for _, _, node in walked(graph())],
            [node.name for node in all_nodes(graph())],
        )

    def test_what_nobody_takes_of_a_copy_is_left_out(self):
        whole = graph()
        kept = pruned(whole, ["passed:0"])
        ops = [node.op for node in kept.node]
        self.assertIn("Exp", [node.op for node in whole.node])
        self.assertNotIn("Exp", ops)
        (body,) = library(kept).values()
        (passed,) = (n for n in body.node_def if n.op == "IdentityN")
        stand_in = passed.input[1]
        (nothing,) = (n for n in body.node_def if n.name == source(stand_in))
        self.assertEqual(nothing.op, "Placeholder")
        with tf.Graph().as_default():  # it is a graph still
            tf.graph_util.import_graph_def(kept, name="")

    def test_names_of_tensors_are_taken_apart(self):
        for name, node, k in (
            ("a/b", "a/b", 0),
            ("a:2", "a", 2),
            ("f:output:1", "f", 1),
            ("^a", "a", 0),
        ):
            self.assertEqual((source(name), port(name)), (node, k))
        self.assertEqual([*map(full, ("a", "a:1", "^a"))], ["a:0", "a:1", "^a"])

    def test_a_copy_tells_what_it_is_of(self):
        (node,) = (n for n in graph().node if n.name == "passed")
        self.assertIn(node.op, COPY_NODES)
        self.assertEqual(copied(node, "passed:1"), node.input[1])
