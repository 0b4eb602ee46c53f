"""tf_placer: TensorFlow places, for a machine that is not here."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign import tf_kernels, tf_placer


def made():
    with tf.Graph().as_default() as graph:
        with tf.device("/GPU:2"):
            x = tf.zeros([3, 3], name="x")
            y = tf.matmul(x, x, name="y")
        with tf.device("/GPU:7"):
            tf.add(y, y, name="far")
        with tf.device("/GPU:1"):
            tf.strings.as_string(y, name="text")
    return graph


class PlacerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow was built without kernels for GPUs.")

    def place(self, targets, strict, gpus=4):
        machine = {"CPU": 1, "GPU": gpus}
        parts = tf_placer.placed(made(), targets, machine, strict)
        return {
            n.name: n.device.split("device:")[-1] for g in parts for n in g.node
        }

    def test_softly_and_strictly(self):
        found = self.place(["text", "far"], strict=False)
        self.assertEqual(found["y"], "GPU:2")
        self.assertEqual(found["text"], "CPU:0")
        self.assertIn(found["far"], [f"GPU:{i}" for i in range(4)])
        for name in ("text", "far"):
            with self.assertRaises(tf.errors.InvalidArgumentError) as error:
                self.place([name], strict=True)
            self.assertEqual(tf_placer.refused(error.exception), name)
        self.assertEqual(self.place(["y"], strict=True)["y"], "GPU:2")
        # Another machine, of the same process.
        self.assertEqual(self.place(["far"], True, gpus=8)["far"], "GPU:7")


if __name__ == "__main__":
    absltest.main()
