"""keras_layers: the private names of Keras, and what is told by them."""

import os
import subprocess
import sys
from concurrent import futures

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from keras.src.backend.common import global_state

from towers.foreign import keras_layers


class KerasLayersTest(absltest.TestCase):
    def test_keras_still_attaches_masks(self):
        masked = keras.layers.Masking()(np.zeros([1, 2, 3], "float32"))
        self.assertEqual(keras_layers.get_mask(masked).shape, [1, 2])

    def test_keras_still_has_the_private_names(self):
        layer = keras.layers.BatchNormalization()
        layer.build([None, 3])
        self.assertTrue(callable(layer._flatten_layers))
        model = keras.Model()
        model.compile(metrics=["mae"])
        model.seen = keras.metrics.Mean()
        self.assertEqual(model._metrics, [model.seen])
        variable = layer.moving_mean
        self.assertIsInstance(variable._value, tf.Variable)
        self.assertIsInstance(variable._value._unique_id, str)
        generator = keras.random.SeedGenerator(0)
        self.assertEqual(generator.state.name, "seed_generator_state")
        model = keras.Sequential([keras.layers.Dense(2), layer])
        self.assertEqual(keras_layers.children(model), model.layers)
        self.assertLen(keras_layers.all_layers([model, model]), 3)
        self.assertFalse(keras_layers.is_built(model))
        self.assertFalse(keras_layers.made_by_strategy(variable._value))

    def test_keras_still_has_what_hooks_replace(self):
        layer = keras.layers.BatchNormalization()
        self.assertTrue(callable(getattr(layer, keras_layers.MOMENTS)))
        context = getattr(layer, keras_layers.CALL_CONTEXT)()
        self.assertIs(context.entry_layer, layer)
        self.assertIsNone(getattr(context, "training", None))
        layer._maybe_reset_call_context()
        rnn = keras.layers.GRU(3, stateful=True)
        rnn.build([4, 5, 2])
        # Keras 3.7 checks nothing yet.
        self.assertIsNotNone(getattr(rnn, keras_layers.EXPECTED_ROWS, 4))
        self.assertEqual(rnn.states[0].shape, (4, 3))
        keras.config.set_dtype_policy("mixed_bfloat16")
        kept = vars(global_state.GLOBAL_STATE_TRACKER)["dtype_policy"]
        keras.config.set_dtype_policy("float32")
        self.assertIn("mixed_bfloat16", str(kept))

    def test_keras_still_has_the_scopes_that_are_open(self):
        self.assertIsNone(keras_layers.scope_here())
        variable = keras.Variable([1.0])
        with keras.StatelessScope([(variable, [2.0])]) as scope:
            self.assertIs(keras_layers.scope_here(), scope)
            self.assertEqual(list(scope.state_mapping), [id(variable)])
            self.assertFalse(keras_layers.in_symbols())
            with keras_layers.out_of_scope():
                self.assertEqual(variable.numpy(), [1.0])
            self.assertEqual(variable.numpy(), [2.0])

        class Asked(keras.layers.Layer):
            def call(layer, x):
                self.assertTrue(keras_layers.in_symbols())
                with keras_layers.out_of_scope():
                    self.assertIsNotNone(keras_layers.scope_here())
                return x

        Asked()(keras.Input([3]))

    def test_paths_begin_where_a_layer_is_called(self):
        class Outer(keras.layers.Layer):
            def call(self, x):
                with keras_layers.out_of(self):
                    results.append(keras.Variable(0.0, name="inner"))
                results.append(keras.Variable(0.0, name="own"))
                return x

        class Around(keras.layers.Layer):
            def __init__(self):
                super().__init__(name="around")
                self.outer = Outer(name="outer")

            def call(self, x):
                return self.outer(x)

        results: list[keras.Variable] = []
        Around()(np.ones([2]))
        paths = [variable.path for variable in results]
        self.assertEqual(paths, ["around/inner", "around/outer/own"])

    def test_another_backend_is_refused(self):
        done = subprocess.run(
            [sys.executable, "-c", "import towers.foreign"],
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

    def test_the_phase_is_that_of_the_call_under_way(self):
        seen = []

        class Asks(keras.layers.Layer):
            def call(self, x):
                seen.append(keras_layers.phase_here())
                return x

        model = keras.Sequential([Asks()])
        for training in (True, False):
            model(tf.ones([1, 1]), training=training)
        self.assertEqual(seen[-2:], [True, False])
        self.assertIsNone(keras_layers.phase_here())

    def test_keras_still_knows_whose_a_loss_is(self):
        one, other = keras.layers.Dense(1), keras.layers.Dense(1)
        with keras.StatelessScope(collect_losses=True):
            loss = tf.constant(1.0)
            one.add_loss(loss)
        self.assertTrue(keras_layers.has_added(one, loss))
        self.assertFalse(keras_layers.has_added(other, loss))

    def test_losses_take_the_logits_that_are_attached(self):
        logits = tf.constant([[200.0, -200.0]])
        probabilities = tf.nn.softmax(logits)
        keras_layers.set_notes(
            probabilities, [{"logits": logits, "mask": None}]
        )
        loss = keras.losses.categorical_crossentropy(
            [[0.0, 1.0]], probabilities
        )
        self.assertAlmostEqual(float(loss[0]), 400.0, places=3)

    def test_keras_still_passes_on_the_arguments_of_a_call(self):
        seen = {}

        class Noting(keras.layers.Layer):
            def call(self, x):
                seen.update(keras_layers.context_values(self))
                return x

        layer, wrapper = Noting(), Noting()
        layer(tf.ones([1]))
        self.assertEqual(seen, {})
        if not hasattr(keras.Layer, "_register_call_context_args"):
            self.skipTest("It is there since Keras 3.10.")
        layer = Noting()
        layer._register_call_context_args("fast")
        keras_layers.take_context(wrapper, layer)
        self.assertEqual(keras_layers.context_arguments(wrapper), {"fast"})
        wrapper(tf.ones([1]), fast=True)
        self.assertEqual(seen, {"fast": True})
        attention = keras.layers.MultiHeadAttention(1, 1)
        names = ("query_mask", "attention_mask", "mask")
        stack = [keras_layers.is_mask_of_argument(attention, n) for n in names]
        self.assertEqual(stack, [True, False, False])

    def test_logits_are_found_in_a_graph(self):
        @tf.function
        def run(x):
            for function in (tf.nn.softmax, tf.nn.sigmoid):
                y = function(x)
                (note,) = keras_layers.get_notes(y)
                self.assertIs(note["logits"], x)
            return keras_layers.activation(x)

        self.assertIsNone(run(tf.ones([2, 3])))
