"""layer_graph: the private names of Keras that it leans on."""

import os
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import cnn, make, placement

import towers


class LayerGraphTest(absltest.TestCase):
    def test_keras_still_has_the_private_names(self):
        layer = keras.layers.BatchNormalization()
        layer.build([None, 3])
        self.assertTrue(callable(layer._moments))
        self.assertTrue(callable(layer._flatten_layers))
        variable = layer.moving_mean
        self.assertIsInstance(variable._value, tf.Variable)
        self.assertIsInstance(variable._value._unique_id, str)
        generator = keras.random.SeedGenerator(0)
        self.assertEqual(generator.state.name, "seed_generator_state")
        masked = keras.layers.Masking()(np.zeros([1, 2, 3], "float32"))
        self.assertEqual(masked._keras_mask.shape, [1, 2])
        context = layer._get_call_context()
        self.assertIs(context.entry_layer, layer)
        self.assertIsNone(getattr(context, "training", None))
        layer._maybe_reset_call_context()

    def test_a_replay_leaves_the_layers_as_they_were(self):
        model = make(cnn)
        before = [set(vars(layer)) for layer in model._flatten_layers()]
        towers.build_towers(model, np.ones([2, 8, 8, 2]), placement(2))
        after = [set(vars(layer)) for layer in model._flatten_layers()]
        self.assertEqual(before, after)

    def test_another_backend_is_refused(self):
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        done = subprocess.run(
            [sys.executable, "-c", "import towers"],
            env=environment,
            capture_output=True,
            text=True,
        )
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("KERAS_BACKEND=tensorflow", done.stderr)


if __name__ == "__main__":
    absltest.main()
