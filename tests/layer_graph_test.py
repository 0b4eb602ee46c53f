"""layer_graph: the private names of Keras that it leans on."""

import os
import subprocess
import sys
from concurrent import futures

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from keras.src.backend.common import global_state
from models import cnn, make, placement

import towers
from towers import layer_graph


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
        rnn = keras.layers.GRU(3, stateful=True)
        rnn.build([4, 5, 2])
        self.assertIsNotNone(rnn._expected_batch_size)
        self.assertEqual(rnn.states[0].shape, (4, 3))
        keras.config.set_dtype_policy("mixed_bfloat16")
        self.assertIn(
            "mixed_bfloat16",
            str(vars(global_state.GLOBAL_STATE_TRACKER)["dtype_policy"]),
        )
        keras.config.set_dtype_policy("float32")

    def test_another_thread_is_in_the_same_keras_call(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        call = layer_graph.carried(lambda: keras.config.dtype_policy().name)
        keras.config.set_dtype_policy("float32")
        self.assertEqual(call(), "float32")  # this thread keeps its own
        with futures.ThreadPoolExecutor(1) as thread:
            self.assertEqual(thread.submit(call).result(), "mixed_bfloat16")

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
