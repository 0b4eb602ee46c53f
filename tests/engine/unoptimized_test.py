"""unoptimized: steps that start quickly, as they were built."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from executed import Executed
from models import close, make, placement

import towers
from towers.engine.unoptimized import unoptimized

layers = keras.layers
X = np.random.default_rng(0).normal(size=[5, 4]).astype("float32")
Y = np.ones([5, 3], "float32")


def dense():
    return keras.Sequential(
        [keras.Input([4]), layers.Dense(8, "relu"), layers.Dense(3)]
    )


def fused(executed):
    """Where TensorFlow's optimizer has made one kernel of several ops."""
    return executed.devices("tower_", "^_(Mkl|MklNative)?Fused")


class QuickStartTest(absltest.TestCase):
    def test_a_model_s_steps_are_as_they_were_built(self):
        plain, found = make(dense), {}
        plain.compile("sgd", "mse", run_eagerly=True)
        plain.fit(X, Y, verbose=0)
        for quick in (False, True):
            model = make(dense)
            model = towers.TowerModel(model, placement(2), quick_start=quick)
            model.compile("sgd", "mse")
            found[quick] = Executed(lambda m=model: m.fit(X, Y, verbose=0))
            close(model.get_weights(), plain.get_weights())
        self.assertNotEmpty(fused(found[False]))
        self.assertEmpty(fused(found[True]))
        close(model.predict(X, verbose=0), plain.predict(X, verbose=0))
        close(model.evaluate(X, Y, verbose=0), plain.evaluate(X, Y, verbose=0))

    def test_towers_in_a_function_of_one_s_own(self):
        model = make(dense)

        @tf.function(autograph=False)
        def step(x):
            with tf.GradientTape() as tape:
                graph = towers.build_towers(
                    model, x, placement(3), quick_start=True
                )
                loss = tf.reduce_sum(graph.outputs**2)
            return tape.gradient(loss, model.trainable_variables)

        said = []
        executed = Executed(lambda: said.extend(step(X)))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(X) ** 2)
        close(said, tape.gradient(loss, model.trainable_variables))
        self.assertEmpty(fused(executed))
        called = executed.devices("", "PartitionedCall")  # not inlined
        self.assertEqual(called, {f"/CPU:{i}" for i in range(3)})
        for i in range(3):
            found = executed.devices(f"tower_{i}/", "MatMul")
            self.assertEqual(found, {f"/CPU:{i}"})

    def test_other_calls_are_as_ever(self):
        def option():
            return tf.config.optimizer.get_experimental_options().get(
                "disable_meta_optimizer", False
            )

        with self.assertRaises(KeyError):
            with unoptimized():
                self.assertTrue(option())
                raise KeyError
        self.assertFalse(option())


if __name__ == "__main__":
    absltest.main()
