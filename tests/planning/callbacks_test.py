"""callbacks: training goes on as it would have, and TensorBoard reads it all."""

import contextlib
import glob
import os
import sys
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import DEVICES, close, cnn, inputs, make, targets

import towers
from towers.planning import callbacks

X = np.random.default_rng(0).normal(size=[20, 5]).astype("float32")
Y = np.random.default_rng(1).normal(size=[20, 2]).astype("float32")


def unsized():
    """Four batches, the last of two rows, of a number that Keras cannot know."""
    return tf.data.Dataset.from_generator(
        lambda: ((X[i : i + 6], Y[i : i + 6]) for i in range(0, 20, 6)),
        output_signature=(
            tf.TensorSpec([None, 5], tf.float32),
            tf.TensorSpec([None, 2], tf.float32),
        ),
    )


class Noise(keras.layers.Layer):
    """Noise that TensorFlow draws, and counts where no variable shows it."""

    def call(self, x, training=None):
        return x + tf.random.normal(tf.shape(x)) if training else x


def everything(watching, where, data, compiled, wrapped):
    """What a `fit` of an unbuilt model leaves, to the last bit."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dropout(0.3),
            *([] if where else [Noise(), keras.layers.BatchNormalization()]),
            keras.layers.Dense(2),
        ]
    )
    if where:
        model = towers.TowerModel(model, where, **wrapped)
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    model.compile(
        keras.optimizers.Adam(rate), "mse", metrics=["mae"], **compiled
    )
    given = {"x": data()} if data else {"x": X, "y": Y, "batch_size": 6}
    history = model.fit(
        **given,
        epochs=2,
        validation_data=(X[:7], Y[:7]) if data else None,
        callbacks=watching,
        verbose=0,
    )
    variables = [
        *model.variables,
        *model.optimizer.variables,
        *model.metrics_variables,
    ]
    values = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
    return history.history, values


@contextlib.contextmanager
def without_tensorboard():
    """As in an install that has TensorFlow, and not what it writes for."""
    gone = {n: None for n in sys.modules if n.split(".")[0] == "tensorboard"}
    with mock.patch.dict(sys.modules, {"tensorboard": None, **gone}):
        yield


def scalars(folder):
    """(tag, step, value) of the scalars in a folder, read without TensorBoard."""
    results = []
    for path in glob.glob(f"{folder}/*tfevents*"):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    results.append((value.tag, event.step, number))
    return results


def trained(given, **compiled):
    model = make(cnn)
    x, y = inputs(model, 20), targets(model, 20)
    model = towers.TowerModel(model, towers.Placement(DEVICES[:2]))
    model.compile("adam", "mse", **compiled)
    fit = {"batch_size": 6, "verbose": 0, "shuffle": False}
    history = model.fit(x, y, callbacks=given, **fit)
    return model, history.history["loss"]


UNEQUAL = towers.Placement(DEVICES[:3], weights=[3, 2, 1])


class PlacementReportTest(parameterized.TestCase):
    @parameterized.parameters(
        # Metrics and slots are made by that very step.
        (None, 1),
        # Another batch is on its way while this one is taken.
        (UNEQUAL, 2, None, {}, {"prefetch": True}),
        (UNEQUAL, 1),
        (UNEQUAL, 3, None, {}, {"prefetch": True, "loss_on_towers": True}),
        # The last of an epoch; one after an end that Keras does not foresee.
        (UNEQUAL, 4, None, {}, {"prefetch": True}),
        (UNEQUAL, 5, unsized, {}, {"prefetch": True}),
        (None, 5, unsized),
        # Several at once, and fewer at the end of an epoch.
        (UNEQUAL, 1, None, {"steps_per_execution": 3}),
        (towers.Placement(DEVICES[:2]), 2, None, {"steps_per_execution": 3}),
    )
    @pytest.mark.rare(after=1)
    @pytest.mark.filterwarnings("ignore:Of .* transfers the size is not known")
    @pytest.mark.filterwarnings("ignore:Your input ran out of data")
    @pytest.mark.rare
    def test_all_is_as_without_it_in_a_plain_install(
        self, where, batch, data=None, compiled=None, wrapped=None
    ):
        given = where, data, compiled or {}, wrapped or {}
        folder = tempfile.mkdtemp()
        seen = towers.PlacementReport(folder, batch, timeline=data is not None)
        with without_tensorboard():
            history, values = everything([seen], *given)
        expected, others = everything([], *given)
        self.assertEqual(history, expected)
        for value, other in zip(values, others, strict=True):
            np.testing.assert_array_equal(value, other)
        results = {tag: answer for tag, *answer in scalars(folder)}
        self.assertEqual(
            results["placement/total_bytes"], [batch, seen.report.total_bytes]
        )

    @pytest.mark.rare
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
        for name in ("report.html", "step.html", "step.json"):
            self.assertTrue(os.path.exists(os.path.join(folder, name)))

    @pytest.mark.rare
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
        nowhere = os.path.join(__file__, "logs")
        with self.assertRaisesRegex(ValueError, "`log_dir`.*nothing can be wr"):
            towers.PlacementReport(nowhere)
        with self.assertWarnsRegex(UserWarning, "runs eagerly"):
            trained(
                [towers.PlacementReport(tempfile.mkdtemp())], run_eagerly=True
            )

    def test_beside_a_profiler_of_somebody_else_s(self):
        seen = towers.PlacementReport(tempfile.mkdtemp())
        other = keras.callbacks.TensorBoard(
            tempfile.mkdtemp(), profile_batch=(2, 3)
        )
        with self.assertWarnsRegex(UserWarning, "when a step .*runs already"):
            model, _ = trained([other, seen])
        close(model.get_weights(), trained([])[0].get_weights())
        seen.report.assert_runs_on("tower_1", DEVICES[1])
        self.assertIsNone(seen.timeline)
        profile = "train/plugins/profile/*/*.xplane.pb"
        self.assertLen(glob.glob(os.path.join(other.log_dir, profile)), 1)

    def test_what_cannot_be_measured_ends_no_fit(self):
        seen = towers.PlacementReport(tempfile.mkdtemp())
        late = towers.PlacementReport(tempfile.mkdtemp(), batch=9)
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        busy = RuntimeError("TensorFlow's profiler runs already")
        with (
            mock.patch.object(callbacks, "execution_report", side_effect=busy),
            self.assertWarns(UserWarning) as caught,
        ):
            model.fit(X, Y, batch_size=6, verbose=0, callbacks=[seen, late])
        messages = [str(w.message) for w in caught.warnings]
        self.assertRegex(
            messages[0], "not tell where .* training goes on: .*prof"
        )
        self.assertRegex(messages[-1], "to report step 9, but there were 4")
        self.assertEqual(model.optimizer.iterations, 4)
        self.assertIsNone(seen.report)
