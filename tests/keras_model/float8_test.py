"""Variables that their gradients overwrite, as Keras trains float8."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain
from same import pair, same_fit

import towers

DEVICES = ["/CPU:0", "/CPU:1", "/CPU:2"]


def dense():
    # A float8 layer rounds the gradient of a bias to bfloat16, in each tower
    # before they are summed; all else is equal to the last bits.
    return chain(
        [6],
        keras.layers.Dense(5, "tanh", use_bias=False),
        keras.layers.Dense(2, use_bias=False),
    )


def einsum():
    return chain(
        [4, 6],
        keras.layers.EinsumDense("abc,cd->abd", (4, 5)),
        keras.layers.Flatten(),
        keras.layers.Dense(2, use_bias=False),
    )


class Topmost(keras.layers.Layer):
    """Keeps the largest gradient from above, whatever its sign."""

    def build(self, shape):
        self.top = self.add_weight(name="top", initializer="zeros")
        self.top.overwrite_with_gradient = True

    def call(self, x):
        @keras.ops.custom_gradient
        def passed(x, top):
            def gradient(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                return upstream, keras.ops.max(upstream)

            return x * 1.0, gradient

        return passed(x, keras.ops.convert_to_tensor(self.top))


class Float8Test(parameterized.TestCase):
    @parameterized.parameters(
        (dense, False, None), (dense, True, 2), (einsum, True, None)
    )
    @pytest.mark.rare(after=1)
    def test_scales_and_histories_are_the_plain_model_s(
        self, make, loss_on_towers, steps
    ):
        def quantized():
            model = make()
            model.quantize("float8")
            return model

        where = towers.Placement(DEVICES, weights=[2, 1, 1])
        models = pair(quantized, where, loss_on_towers=loss_on_towers)
        rng = np.random.default_rng(0)
        x = rng.normal(size=[11, *models[0].inputs[0].shape[1:]])
        y = rng.normal(size=[11, 2])

        def sgd():
            return keras.optimizers.SGD(
                *(0.1, 0.9), gradient_accumulation_steps=steps
            )

        # The last batch is of one row: two towers are empty.
        how = {"optimizer": sgd, "compiling": {"run_eagerly": False}}
        same_fit(models, x, y, batch_size=5, epochs=2, **how)
        plain, towered = (model.weights for model in models)
        self.assertLen(towered, 14)  # two kernels, with six of these each
        for one, other in zip(plain, towered):
            np.testing.assert_allclose(
                other.numpy(), one.numpy(), rtol=1e-5, atol=1e-6
            )

    @parameterized.parameters(1, 2, 5)
    def test_the_maximum_is_of_towers_with_rows(self, rows):
        model = chain([2], Topmost())
        x = tf.reshape(tf.range(1.0, 2 * rows + 1), [rows, 2])

        @tf.function
        def gradient(x):
            placement = towers.Placement(DEVICES, parameter_device="/CPU:1")
            with tf.GradientTape() as tape:
                outputs = towers.build_towers(model, x, placement).outputs
                loss = -tf.reduce_sum(outputs * x)
            return tape.gradient(loss, model.trainable_variables[0].value)

        def largest(x):
            return -float(tf.reduce_min(x))

        open_rows = gradient.get_concrete_function(
            tf.TensorSpec([None, 2], tf.float32)
        )
        self.assertEqual(float(gradient(x)), largest(x))
        self.assertEqual(float(open_rows(x)), largest(x))

    def test_the_maximum_is_of_towers_with_a_gradient(self):
        model = chain([2], Topmost())
        x = tf.reshape(tf.range(1.0, 13), [6, 2])

        @tf.function
        def gradient():
            placement = towers.Placement(DEVICES)
            with tf.GradientTape() as tape:
                graph = towers.build_towers(model, x, placement)
                loss = -tf.reduce_sum(graph.towers[1].outputs * x[2:4])
            return tape.gradient(loss, model.trainable_variables[0].value)

        self.assertEqual(float(gradient()), -5.0)

    def test_a_batch_of_no_rows_leaves_the_value(self):
        model = chain([2], Topmost())
        model.layers[0].top.assign(3.0)

        @tf.function
        def gradient(x):
            with tf.GradientTape() as tape:
                placement = towers.Placement(DEVICES)
                graph = towers.build_towers(model, x, placement)
                loss = tf.reduce_sum(graph.outputs)
            return tape.gradient(loss, model.trainable_variables[0].value)

        self.assertEqual(float(gradient(tf.zeros([0, 2]))), 3.0)
