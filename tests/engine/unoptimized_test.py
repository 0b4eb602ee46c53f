"""unoptimized: steps that start quickly, as they were built."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from models import chain, close, make, placement
from same import pair, same_fit, same_step

import towers
from towers.engine.unoptimized import unoptimized

layers = keras.layers
X = np.random.default_rng(0).normal(size=[5, 4]).astype("float32")
Y = np.ones([5, 3], "float32")


def dense():
    return chain([4], layers.Dense(8, "relu"), layers.Dense(3))


def fused(executed):
    """Where TensorFlow's optimizer has made one kernel of several ops."""
    return executed.devices("tower_", "^_(Mkl|MklNative)?Fused")


class QuickStartTest(parameterized.TestCase):
    def test_a_model_s_steps_are_as_they_were_built(self):
        models = pair(dense, placement(2), quick_start=False)
        self.assertNotEmpty(fused(same_fit(models, X, Y, look=Executed)))
        models = pair(dense, placement(2), quick_start=True)
        how = {"look": Executed, "predict": True}
        self.assertEmpty(fused(same_fit(models, X, Y, **how)))
        close(*(m.evaluate(X, Y, verbose=0) for m in models))

    @pytest.mark.slow
    def test_half_dtypes_round_as_without_tensorflow_s_optimizers(self):
        def mixed():
            kinds = {"activation": "gelu", "dtype": "mixed_bfloat16"}
            far = layers.Dense(16, **kinds, name="far")
            return chain([4], layers.Dense(16, **kinds), far, layers.Dense(3))

        x = np.random.default_rng(1).normal(size=[40, 4]).astype("float32")
        where = placement(1, layer_devices={"far": "/CPU:2"})
        quick = {"quick_start": True, "prefetch": True}
        how = {"optimizer": keras.optimizers.Adam, "tolerance": 0.0}
        how["compiling"] = {"run_eagerly": False}
        with unoptimized():
            same_fit(pair(mixed, where, **quick), x, x[:, :3], epochs=2, **how)

    def test_towers_in_a_function_of_one_s_own(self):
        how = {"of": tf.reduce_sum, "options": {"quick_start": True}}
        executed = same_step(make(dense), placement(3), X, look=Executed, **how)
        self.assertEmpty(fused(executed))
        called = executed.devices("", "PartitionedCall")  # not inlined
        self.assertEqual(called, {f"/CPU:{i}" for i in range(3)})
        for i in range(3):
            devices = executed.devices(f"tower_{i}/", "MatMul")
            self.assertEqual(devices, {f"/CPU:{i}"})

    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_weights_of_pinned_layers_stay_there(self, synchronized):
        """And their gradients, of towers that meet too."""
        where = placement(2, layer_devices={"far": "/CPU:2"})
        x, y = np.ones([4, 4], "float32"), np.ones([4, 2], "float32")
        model = chain(
            [4],
            layers.Dense(30),
            layers.Dense(40, name="far"),
            layers.BatchNormalization(synchronized=synchronized),
            layers.Dense(2),
        )
        model = towers.TowerModel(model, where, quick_start=True)
        model.compile("sgd", "mse")
        summary = [towers.execution_report(model.train_on_batch, x, y)]
        if synchronized:
            summary += [towers.placement_plan(model, x, y, machine={"CPU": 4})]
        for report in summary:
            report.assert_runs_on("tower_1/far", "/CPU:2")
            shapes = {t.shape for t in report.transfers}
            self.assertIn((2, 40), shapes)
            self.assertNotIn((30, 40), shapes)

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
