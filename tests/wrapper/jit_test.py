"""XLA: one program per tower and direction, on the tower's device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import Executed
from models import chain, close, make, placement

import towers

layers = keras.layers
RNG = np.random.default_rng(0)


def cnn(norm=False):
    norms = [layers.BatchNormalization()] if norm else []
    return chain(
        [6, 6, 1],
        layers.Conv2D(2, 3),
        *norms,
        layers.Flatten(),
        layers.Dense(3),
    )


def transformer(dropout=0.0):
    x = keras.Input([4, 4])
    y = layers.MultiHeadAttention(2, 2, dropout=dropout)(x, x)
    y = layers.LayerNormalization()(layers.Dropout(dropout)(x + y))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))


def halves():
    with_policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    layer = layers.Dense(4, "tanh", dtype=with_policy)
    return chain([4], layer, layers.Dense(3))


def compiled(model, **kwargs):
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True, **kwargs)
    return model


def trained(model, rows=5):
    x = np.random.default_rng(1).normal(size=[rows, *model.input_shape[1:]])
    model.fit(x, np.ones([rows, 3]), verbose=0)
    return model


class EqualityTest(parameterized.TestCase):
    def test_weights_are_those_of_plain_keras_with_xla(self):
        self.check(cnn, 2, 1e-5)

    @parameterized.named_parameters(
        ("norms", lambda: cnn(True), 1, 1e-5),
        ("noise", lambda: transformer(0.3), 1, 1e-5),
        ("halves", halves, 1, 1e-2),
        ("attention", transformer, 3, 1e-5),
    )
    @pytest.mark.slow
    @pytest.mark.rare(of=["noise"])
    def test_and_of_other_models(self, model, n, most):
        self.check(model, n, most)

    def check(self, model, n, most):
        plain = trained(compiled(make(model)))
        towered = compiled(towers.TowerModel(make(model), placement(n)))
        step = Executed(lambda: trained(towered))
        # Of a key's bias the gradient is zero but for rounding.
        close(towered.get_weights(), plain.get_weights(), most)
        programs = [
            device
            for device, name, node in step.nodes
            if node.attr["_XlaMustCompile"].b and "tower_" in name
        ]
        expected = [f"/CPU:{i}" for i in range(n) for _ in "fb"]
        self.assertEqual(sorted(programs), expected)
        for i in range(n):
            inside = step.devices(f"tower_{i}/", "MatMul|Add")
            self.assertEqual(inside, {f"/CPU:{i}"})


class RefusalTest(parameterized.TestCase):
    def refused(self, expected, model, *, fits=False, **kwargs):
        model = make(model)
        with self.assertRaisesRegex(ValueError, expected):
            where = placement(2, **kwargs)
            model = compiled(towers.TowerModel(model, where))
            self.assertTrue(fits, "not when it was compiled")
            trained(model)

    def test_what_xla_cannot_take_by_itself(self):
        def model():
            return chain([4], layers.Dense(3))

        def unable():
            able = model()
            able.layers[-1].supports_jit = False
            return able

        def meeting():
            return keras.Sequential(
                [model(), layers.BatchNormalization(synchronized=True)]
            )

        def recurrent():
            return chain([4, 2], layers.LSTM(3, name="memory"))

        self.refused("'dense.* says supports_jit=False", unable)
        self.refused("'batch_norm.* asks all towers", meeting)
        self.refused(
            "'first' runs on /CPU:3",
            lambda: chain([4], layers.Dense(3, name="first")),
            layer_devices={"first": "/CPU:3"},
        )
        self.refused("cannot train the loop '.*memory", recurrent, fits=True)
        built, unbuilt = make(unable), keras.Sequential()
        unbuilt.add(unable().layers[-1])
        with tf.Graph().as_default() as graph:  # stays as it is
            given = tf.compat.v1.placeholder(tf.float32, [None, 4])
            for one, x in ((built, np.ones([4, 4])), (unbuilt, given)):
                with self.assertRaisesRegex(ValueError, "supports_jit=False"):
                    towers.build_towers(one, x, placement(2), jit_compile=True)
                self.assertLen(graph.get_operations(), 1)

    def test_words(self):
        model = keras.Sequential([keras.Input([1], dtype="string")])
        with self.assertRaisesRegex(ValueError, "numbers only.*string"):
            towers.build_towers(
                model, tf.constant([["a"]]), placement(1), jit_compile=True
            )


class CompileTest(absltest.TestCase):
    def test_a_template_that_was_compiled_so(self):
        for jit in (True, False):
            model = make(cnn)
            model.compile("sgd", "mse", jit_compile=jit)
            towered = towers.TowerModel(model, placement(2))
            self.assertEqual(towered.jit_towers, jit)
            self.assertFalse(towered.jit_compile)  # of the step
            towered.compile("sgd", "mse")
            self.assertFalse(towered.jit_towers)
