"""keras_machine: Keras goes by the device that it is on, not by the machine."""

import os
import re
import tempfile

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import GPUS, chain, on_gpus, placement

import towers
from towers.engine.host import on_host
from towers.foreign import keras_machine
from towers.foreign.patches import patched

layers = keras.layers


def ops_of(model, where, x):
    """The ops of a training step's forward and backward pass, never run."""

    def step(x):
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, x, where, training=True)
            loss = tf.reduce_sum(graph.outputs)
        return tape.gradient(loss, model.trainable_variables)

    traced = tf.function(step, autograph=False).get_concrete_function(x)
    return traced.graph.get_operations()


def cudnn(ops):
    return [
        (op.device[-5:], op.type) for op in ops if op.type.startswith("Cudnn")
    ]


def depthwise():
    return chain(
        [2, 6, 6],
        layers.DepthwiseConv2D(3, data_format="channels_first"),
        layers.Flatten(data_format="channels_first"),
    )


X = tf.TensorSpec([None, 5, 3])


class MachineTest(parameterized.TestCase):
    @parameterized.parameters(layers.LSTM, layers.GRU)
    @pytest.mark.slow(after=1)
    def test_recurrent_layers_go_by_their_tower(self, kind):
        model = chain([5, 3], kind(4))
        both = [
            (gpu[1:], op)
            for gpu in GPUS
            for op in ("CudnnRNNBackpropV3", "CudnnRNNV3")
        ]
        result = cudnn(ops_of(model, on_gpus(), X))
        self.assertEqual(sorted(result), sorted(both))
        self.assertTrue(model.layers[0].supports_jit)
        # A machine that has GPUs; the towers are on its CPUs.
        has = (keras_machine.rnn, "_is_gpu_available", lambda: True)
        with patched(has):
            self.assertEqual(cudnn(ops_of(model, placement(2), X)), [])

    def test_pinned_layers_go_by_their_pin(self):
        model = chain(
            [5, 3],
            layers.LSTM(4, return_sequences=True, name="far"),
            layers.LSTM(4, name="near"),
        )
        ops = ops_of(model, on_gpus(layer_devices={"far": "/CPU:0"}), X)
        names = [op.name for op in ops if op.type == "CudnnRNNV3"]
        self.assertEqual(
            names, [f"tower_{i}/near/CudnnRNNV3" for i in range(2)]
        )
        pins = {"far": "/GPU:1", "near": "/GPU:1"}
        here = towers.Placement(
            ["/CPU:0", "/CPU:1"], layer_devices=pins, available="any"
        )
        result = {device for device, _ in cudnn(ops_of(model, here, X))}
        self.assertEqual(result, {"GPU:1"})

    def test_exports_go_by_the_device_named(self):
        path = os.path.join(tempfile.mkdtemp(), "model")
        x = keras.Input([5, 3])
        model = keras.Model(x, layers.LSTM(4, use_cudnn=True)(x))
        towers.export_towers(model, path, on_gpus())
        loaded = tf.saved_model.load(path)
        ops = loaded.serve.concrete_functions[0].graph.get_operations()
        self.assertLen(cudnn(ops), 2)

    def test_convolutions_go_by_their_tower(self):
        if not hasattr(keras_machine.nn, "_cpu_only"):
            self.skipTest("This Keras asks no device for its data format.")
        x = tf.TensorSpec([None, 2, 6, 6])

        def formats(where):
            return {
                op.get_attr("data_format")
                for op in ops_of(depthwise(), where, x)
                if op.type == "DepthwiseConv2dNative"
            }

        self.assertEqual(formats(on_gpus()), {b"NCHW"})
        with patched((keras_machine.nn, "_cpu_only", lambda: False)):
            self.assertEqual(formats(placement(2)), {b"NHWC"})

    def test_seeds_and_assertions_are_the_host_s(self):
        model = chain(
            [5],
            layers.Embedding(11, 4, mask_zero=True),
            layers.LSTM(4),
            layers.Dropout(0.5),
            dtype="int32",
        )
        ops = ops_of(model, on_gpus(), tf.TensorSpec([None, 5], tf.int32))
        asserts = [op for op in ops if op.type == "Assert"]
        self.assertLen(asserts, 2)
        drawn = [op for op in ops if op.type == "StatelessRandomGetKeyCounter"]
        self.assertLen(drawn, 2)
        strings = [
            op for op in ops if any(x.dtype == tf.string for x in op.outputs)
        ]
        for op in [*asserts, *strings, *(op.inputs[0].op for op in drawn)]:
            self.assertIn("CPU:0", op.device, op.name)
            self.assertRegex(op.name, "^host/tower_")
        # All else that is a tower's is on its GPU.
        for op in ops:
            if op.name.startswith("tower_") and op.type != "NoOp":
                self.assertIn("GPU", op.device, op.name)

    def test_keras_is_left_as_it_was(self):
        names = [
            (keras_machine.rnn, "_is_gpu_available"),
            (keras_machine.random, "draw_seed"),
            (keras_machine.random, "_cast_seed"),
            (keras_machine.control_flow_assert, "Assert"),
            (tf, "Assert"),
            (tf.debugging, "Assert"),
        ]
        before = [getattr(*name) for name in names]
        with (
            keras_machine.asks_device(lambda: "/GPU:0", on_host),
            keras_machine.asks_device(lambda: "/CPU:0", on_host),
        ):
            for name, old in zip(names, before):
                self.assertIsNot(getattr(*name), old)
        self.assertEqual([getattr(*name) for name in names], before)

    def test_an_assertion_shows_what_it_did(self):
        """What it prints is cut off before it is sent, not changed."""

        def failing(where):
            @tf.function(autograph=False)
            def run(x):
                here = (lambda: where, lambda _: tf.device("/CPU:0"))
                with keras_machine.asks_device(*here):
                    tf.debugging.assert_less(x, 0.0, message="Too much.")
                return x

            with self.assertRaisesRegex(
                tf.errors.InvalidArgumentError, "Too much.*"
            ) as error:
                run(tf.reshape(tf.range(1.0, 21.0), [4, 5]))
            answer = error.exception.message.split("assertion failed: ")[-1]
            return re.findall(r"1 [ \d.]+", answer)

        self.assertEqual(failing("/GPU:0"), failing(None))
        self.assertEqual(failing(None), ["1 2 3..."])
