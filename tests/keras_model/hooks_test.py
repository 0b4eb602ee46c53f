"""hooks: put on layers and taken off again, by private names of Keras."""

import os
import subprocess
import sys
from concurrent import futures

import keras
import numpy as np
from absl.testing import absltest
from keras.src.backend.common import global_state
from models import cnn, make, placement

import towers
from towers.foreign import keras_layers

SHADOWED = (
    "call",
    "assign",
    "activity_regularizer",
    "synchronized",
    "_moments",
    "_get_call_context",
    "_expected_batch_size",
)


class HooksTest(absltest.TestCase):
    def test_keras_still_has_the_private_names(self):
        layer = keras.layers.BatchNormalization()
        self.assertTrue(callable(layer._moments))
        context = layer._get_call_context()
        self.assertIs(context.entry_layer, layer)
        self.assertIsNone(getattr(context, "training", None))
        layer._maybe_reset_call_context()
        rnn = keras.layers.GRU(3, stateful=True)
        rnn.build([4, 5, 2])
        # Keras 3.7 checks nothing yet.
        self.assertIsNotNone(getattr(rnn, "_expected_batch_size", 4))
        self.assertEqual(rnn.states[0].shape, (4, 3))
        keras.config.set_dtype_policy("mixed_bfloat16")
        kept = vars(global_state.GLOBAL_STATE_TRACKER)["dtype_policy"]
        keras.config.set_dtype_policy("float32")
        self.assertIn("mixed_bfloat16", str(kept))

    def test_another_backend_is_refused(self):
        done = subprocess.run(
            [sys.executable, "-c", "import towers"],
            env={
                **os.environ,
                "KERAS_BACKEND": "jax",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
        )
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("KERAS_BACKEND=tensorflow", done.stderr)

    def test_another_thread_is_in_the_same_keras_call(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        call = keras_layers.carried(lambda: keras.config.dtype_policy().name)
        keras.config.set_dtype_policy("float32")
        self.assertEqual(call(), "float32")  # this thread keeps its own
        with futures.ThreadPoolExecutor(1) as thread:
            self.assertEqual(thread.submit(call).result(), "mixed_bfloat16")

    def test_a_replay_leaves_the_layers_as_they_were(self):
        def stateful():
            return keras.Sequential(
                [
                    keras.Input(batch_shape=(2, 5, 3)),
                    keras.layers.GRU(3, stateful=True),
                    keras.layers.BatchNormalization(synchronized=True),
                ]
            )

        for model, x in (
            (make(cnn), np.ones([2, 8, 8, 2])),
            (make(stateful), np.ones([2, 5, 3])),
        ):
            parts = [*model._flatten_layers(), *model.variables]
            parts += getattr(model.layers[0], "states", None) or []
            before = [dict(vars(part)) for part in parts]
            towers.build_towers(model, x, placement(2), training=True)
            for part, was in zip(parts, before):
                for name in SHADOWED:
                    self.assertIs(vars(part).get(name), was.get(name), name)


if __name__ == "__main__":
    absltest.main()
