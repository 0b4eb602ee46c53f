"""tf_placer: TensorFlow places, for a machine that is not here."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_kernels, tf_placer


def graph_of_ops():
    with tf.Graph().as_default() as graph:
        with tf.device("/GPU:2"):
            x = tf.zeros([3, 3], name="x")
            tf.matmul(x, x, name="y")
    return graph


class PlacerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow was built without kernels for GPUs.")

    def place(self, graph, target, strict, gpus=4):
        machines = {tf_placer.JOB: {"CPU": 1, "GPU": gpus}}
        placed = tf_placer.placed(
            graph.as_graph_def(), [target], machines, strict
        )
        return {n.name: n.device.split("device:")[-1] for n in placed.node}

    def test_softly_and_strictly(self):
        graph = graph_of_ops()
        self.assertEqual(self.place(graph, "y", strict=True)["y"], "GPU:2")
        with graph.as_default(), tf.device("/GPU:1"):
            tf.strings.as_string(graph.get_tensor_by_name("y:0"), name="text")
        result = self.place(graph, "text", strict=False)
        self.assertEqual((result["y"], result["text"]), ("GPU:2", "CPU:0"))
        with self.assertRaises(tf.errors.InvalidArgumentError) as error:
            self.place(graph, "text", strict=True)
        self.assertEqual(tf_placer.refused(error.exception), "text")

    def test_another_machine_of_the_same_process(self):
        graph = graph_of_ops()
        with self.assertRaises(tf.errors.InvalidArgumentError) as error:
            self.place(graph, "y", strict=True, gpus=2)
        self.assertEqual(tf_placer.refused(error.exception), "y")
        self.assertEqual(self.place(graph, "y", False, gpus=1)["y"], "GPU:0")
        self.assertEqual(self.place(graph, "y", False, gpus=0)["y"], "CPU:0")
