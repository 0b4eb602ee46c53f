"""loss_on_towers: what looks at other rows is refused, of all that Keras has."""

import functools
import inspect

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import placement

import towers
from towers.keras_model.row_losses import adds_up

RNG = np.random.default_rng(0)
SPARSE = ("sparse", "generalized")  # whose targets are numbers of classes
NO_LOSS = ("Loss", "deserialize", "get", "serialize")


def losses():
    """All functions and classes of losses, as what gives a value per row."""
    for name in dir(keras.losses):
        one = getattr(keras.losses, name)
        if name.startswith("_") or name in NO_LOSS or not callable(one):
            continue
        if name == "categorical_generalized_cross_entropy":
            one = functools.partial(one, q=0.5)
        yield name, one().call if inspect.isclass(one) else one, one


def metrics():
    """All classes of metrics, made."""
    needed = {
        "IoU": {"num_classes": 4, "target_class_ids": [1]},
        "OneHotIoU": {"num_classes": 4, "target_class_ids": [1]},
        "BinaryIoU": {},
        "MeanIoU": {"num_classes": 4},
        "OneHotMeanIoU": {"num_classes": 4},
        "MeanMetricWrapper": {"fn": keras.losses.mean_squared_error},
        "SensitivityAtSpecificity": {"specificity": 0.5},
        "SpecificityAtSensitivity": {"sensitivity": 0.5},
        "PrecisionAtRecall": {"recall": 0.5},
        "RecallAtPrecision": {"precision": 0.5},
    }
    for name in dir(keras.metrics):
        one = getattr(keras.metrics, name)
        if inspect.isclass(one) and name != "Metric":
            yield name, functools.partial(one, **needed.get(name, {}))


def batch(name, rows=9):
    """Targets and predictions that a loss of this name can take."""
    if name.lower() == "ctc":
        y = RNG.integers(1, 4, [rows, 2])
        return tf.constant(y), tf.constant(RNG.normal(size=[rows, 6, 4]))
    p = RNG.uniform(0.05, 1.0, [rows, 4])
    p = tf.constant(p / p.sum(1, keepdims=True), "float32")
    classes = RNG.integers(0, 4, [rows])
    if name == "circle" or name == "Circle":
        return tf.constant(classes % 2), p
    if any(part in name.lower() for part in SPARSE):
        return tf.constant(classes), p
    if name in ("IoU", "MeanIoU"):
        return tf.constant(classes), tf.constant(RNG.integers(0, 4, [rows]))
    return tf.one_hot(classes, 4), p


def parts_of(y, y_pred):
    return [(y[:2], y_pred[:2]), (y[2:], y_pred[2:])]


class KerasTest(absltest.TestCase):
    def test_losses_are_refused_just_if_shards_tell_another_value(self):
        results = []
        for name, call, one in losses():
            y, y_pred = batch(name)
            whole = call(y, y_pred)
            if not whole.shape.rank:  # Dice, Tversky: refused by the shape
                self.assertIn(name.lower(), ("dice", "tversky"))
                continue
            each = tf.concat([call(*part) for part in parts_of(y, y_pred)], 0)
            same = np.allclose(each, whole, atol=1e-5)
            answer = adds_up(
                one() if inspect.isclass(one) else one, y_pred.shape.rank
            )
            self.assertIn(answer, (True, None) if same else (False,), name)
            results += [name] if answer is False else []
        self.assertContainsSubset(results, ["Circle", "circle"])

    def test_all_metrics_add_up(self):
        for name, make in metrics():
            y, y_pred = batch(name)
            whole, total = make(), None
            given = [y_pred] if name in ("Mean", "Sum") else [y, y_pred]
            whole.update_state(*given)
            for part in parts_of(y, y_pred):
                shard = make()
                shard.update_state(*part[-len(given) :])
                values = [v.numpy() for v in shard.variables]
                total = values if total is None else map(np.add, total, values)
                total = list(total)
            for one, other in zip(total, whole.variables, strict=True):
                np.testing.assert_allclose(one, other, 1e-4, 1e-5, err_msg=name)
            self.assertIn(adds_up(whole, 2), (True, None), name)


CIRCLE = getattr(keras.losses, "circle", None)


class Heir(keras.losses.Circle):
    pass


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"loss": keras.losses.Circle()}, "loss 'circle' looks"),
        ({"loss": Heir(name="heir")}, "loss 'heir' looks"),
        ({"loss": "circle"}, "loss 'circle' looks"),
        ({"loss": CIRCLE}, "loss 'circle' looks"),
        ({"loss": functools.partial(CIRCLE, gamma=1.0)}, "loss '.*' looks"),
        ({"metrics": [CIRCLE]}, "metric 'circle' looks"),
        (
            {"metrics": [keras.losses.Circle(reduction=None)]},
            "metric 'circle' looks",
        ),
        (
            {"loss": keras.losses.CosineSimilarity(axis=0)},
            "loss 'cosine.*' looks",
        ),
        (
            {"loss": keras.losses.BinaryCrossentropy(axis=-2)},
            "loss 'binary.*' looks",
        ),
        (
            {
                "loss": functools.partial(
                    keras.losses.cosine_similarity, axis=(0,)
                )
            },
            "loss '.*' looks",
        ),
        (
            {"metrics": [keras.metrics.CosineSimilarity(axis=0)]},
            "metric 'cosi.*' looks",
        ),
        ({"metrics": [keras.metrics.BinaryCrossentropy()]}, None),
        ({"loss": lambda y, p: keras.ops.mean(p - y, 0)}, "another number"),
        ({"loss": keras.losses.SparseCategoricalCrossentropy(True)}, None),
    )
    def test_what_looks_at_other_rows_is_refused_by_name(
        self, arguments, message
    ):
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(3)])
        model = towers.TowerModel(model, placement(2), loss_on_towers=True)
        model.compile("sgd", **{"loss": "mse", **arguments})
        x, y = np.ones([4, 2]), np.ones([4, 3])
        if isinstance(
            arguments.get("loss"), keras.losses.SparseCategoricalCrossentropy
        ):
            y = np.ones([4], "int32")
        if message is None:
            model.evaluate(x, y, verbose=0)
            return
        with self.assertRaisesRegex(ValueError, f"{message}.*leave out `loss_"):
            model.evaluate(x, y, verbose=0)
