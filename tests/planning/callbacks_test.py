"""callbacks: training goes on as it would have, and TensorBoard reads it all."""

import os
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES, close, cnn, inputs, make, targets

import towers


def trained(callbacks, **compiled):
    model = make(cnn)
    x, y = inputs(model, 20), targets(model, 20)
    model = towers.TowerModel(model, towers.Placement(DEVICES[:2]))
    model.compile("adam", "mse", **compiled)
    fit = {"batch_size": 6, "verbose": 0, "shuffle": False}
    history = model.fit(x, y, callbacks=callbacks, **fit)
    return model, history.history["loss"]


class PlacementReportTest(absltest.TestCase):
    @pytest.mark.slow_after(0)
    def test_training_is_as_without_it(self):
        folder = tempfile.mkdtemp()
        seen = towers.PlacementReport(folder)
        model, loss = trained([seen])
        plain, expected = trained([])
        close(model.get_weights(), plain.get_weights())
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        seen.report.assert_runs_on("tower_1", DEVICES[1])
        self.assertEqual(seen.report.unknown, ())
        tensorboard = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator"
        )
        events = tensorboard.EventAccumulator(
            folder, size_guidance={"tensors": 0}
        ).Reload()
        tags = events.Tags()["tensors"]
        self.assertIn("placement/bytes/CPU:0 to /CPU:1", tags)
        self.assertIn("placement/busy/tower_1", tags)
        self.assertIn("placement/busy/CPU:1", tags)
        (total,) = events.Tensors("placement/total_bytes")
        self.assertEqual(total.step, 2)
        self.assertEqual(
            tf.make_ndarray(total.tensor_proto), seen.report.total_bytes
        )
        self.assertNotEmpty(events.Graph().node)
        for name in ("report.html", "step.json"):
            self.assertTrue(os.path.exists(os.path.join(folder, name)))

    @pytest.mark.slow
    def test_several_steps_at_once(self):
        seen = towers.PlacementReport(tempfile.mkdtemp(), timeline=False)
        with self.assertWarnsRegex(UserWarning, "size is not known"):
            model, _ = trained([seen], steps_per_execution=2)
        plain, _ = trained([], steps_per_execution=2)
        close(model.get_weights(), plain.get_weights())
        self.assertIsNotNone(seen.report)
        self.assertIsNone(seen.timeline)

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "`batch`.*got 0"):
            towers.PlacementReport("logs", batch=0)
        with self.assertWarnsRegex(UserWarning, "runs eagerly"):
            trained(
                [towers.PlacementReport(tempfile.mkdtemp())], run_eagerly=True
            )


if __name__ == "__main__":
    absltest.main()
