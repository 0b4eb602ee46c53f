"""Stages on devices, micro-batches that follow on: the plain model's numbers."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from chiefs import said
from models import make
from same import same_fit

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=[13, n]).astype("float32") for n in (16, 3))


def stack() -> keras.Model:
    x = y = keras.Input([16])
    for i in range(2):
        y = y + layers.Dense(16, "tanh", name=f"low_{i}")(y)
    y = layers.Dense(32, "tanh", name="high")(y)
    return keras.Model(x, layers.Dense(3, name="out")(y))


class PipelineTest(parameterized.TestCase):
    @parameterized.parameters(
        (["/CPU:1", "/CPU:2"], 4),
        ([["/CPU:0", "/CPU:1"], ["/CPU:2", "/CPU:3"]], 2),
    )
    @pytest.mark.slow(after=1)
    def test_each_stage_keeps_its_weights_and_trains_them_as_plain(
        self, devices, micro_batches
    ):
        plain, model = make(stack), make(stack)
        placement = towers.pipeline(
            model, devices, micro_batches, optimizer="adam"
        )
        model = towers.TowerModel(model, placement)
        for m in (plain, model):
            m.compile(keras.optimizers.SGD(0.1, momentum=0.5), "mse")
        report = towers.execution_report(model.train_on_batch, X, Y)
        lines = [devices] if isinstance(devices[0], str) else devices
        self.assertLen(placement.devices, micro_batches * len(lines))
        self.assertEqual({*report.parameter_bytes}, {*lines[0]})
        stages = {"low_0": 0, "low_1": 0, "high": 1, "out": 1}
        for i in range(len(placement.devices)):
            line = lines[i // micro_batches]
            for name, stage in stages.items():
                report.assert_runs_on(f"tower_{i}/{name}", line[stage])
        # What crosses: rows, and to other pipelines each weight once, and back.
        rows = 4 * X.nbytes + Y.nbytes  # X comes by way of the loss
        between = report.bytes_between
        if len(lines) == 1:
            self.assertLess(report.total_bytes, rows + 300)
        else:
            for stage, (own, other) in enumerate(zip(*lines)):
                weights = sum(
                    weight.numpy().nbytes
                    for name, k in stages.items()
                    for weight in plain.get_layer(name).weights
                    if k == stage
                )
                for pair in ((own, other), (other, own)):
                    self.assertBetween(
                        between[pair], weights, weights + X.nbytes + 300
                    )
        how = {"optimizer": None, "batch_size": 9, "epochs": 2}
        same_fit((plain, model), X, Y, **how)

    @parameterized.parameters(
        (dict(micro_batches=0), ValueError, "`micro_batches` must be at least"),
        (dict(devices=[["/CPU:0"], ["/CPU:1"] * 2]), ValueError, "as many"),
        (dict(limits=100), ValueError, "does not fit"),
    )
    def test_what_makes_no_sense_is_refused(self, changed, error, message):
        given = {"devices": ["/CPU:0", "/CPU:1"], "micro_batches": 2, **changed}
        with self.assertRaisesRegex(error, message):
            towers.pipeline(make(stack), **given)

    @pytest.mark.slow
    def test_on_workers(self):
        answer = said("pipelines.py")
        self.assertLess(answer["difference of one pipeline"], 1e-5, answer)
        self.assertLess(answer["difference of two pipelines"], 1e-5, answer)
