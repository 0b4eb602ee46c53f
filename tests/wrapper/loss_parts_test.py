"""loss_parts: parts of a loss that add up to what Keras says of the whole."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from models import close, placement

import towers
from towers.wrapper import loss_parts

layers = keras.layers
RNG = np.random.default_rng(0)


class PartsTest(parameterized.TestCase):
    @parameterized.product(
        reduction=("sum", "sum_over_batch_size", "mean_with_sample_weight"),
        weighted=(False, True),
        rows=(([2, 5]), ([0, 7]), ([1, 1, 5])),
    )
    def test_parts_of_shards_sum_to_the_loss_of_the_batch(
        self, reduction, weighted, rows
    ):
        model = keras.Sequential([keras.Input([4]), layers.Dense(3)])
        model.compile("sgd", keras.losses.Huber(reduction=reduction))
        y, y_pred = tf.constant(RNG.normal(size=[2, 7, 4, 3]), "float32")
        weights = tf.constant(RNG.uniform(size=[7, 4]), "float32")
        weights = weights if weighted else None
        whole = model.compute_loss(None, y, y_pred, weights)
        shards = zip(
            *(
                [None] * len(rows) if v is None else tf.split(v, rows)
                for v in (y, y_pred, weights)
            ),
            strict=True,
        )
        results = [
            tf.add_n(column)
            for column in zip(*[loss_parts.parts(model, *x) for x in shards])
        ]
        self.assertEqual([x.shape for x in results], [[1], [1]])
        close(loss_parts.merged_loss(model, results, y, y_pred), whole)
        close(  # targets and weights tell what is divided by
            loss_parts.merged_loss(
                model, (results[0], None), y, y_pred, weights
            ),
            whole,
        )


class Own(keras.metrics.Metric):
    def update_state(self, y_true, y_pred, sample_weight=None):
        del y_true, y_pred, sample_weight

    def result(self):
        return 0.0


class OwnLoss(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return keras.ops.mean(y_pred)


def scalar(y_true, y_pred):
    return keras.ops.mean(y_pred - y_true)


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"metrics": [Own(name="mine")]}, "metric 'mine' has an `update_st"),
        ({"metrics": [scalar]}, "metric 'scalar' returns a scalar"),
        ({"loss": scalar}, "loss 'scalar' returns a scalar"),
        ({"loss": OwnLoss("odd")}, "loss 'odd' has a `__call__`"),
        (
            {"loss": keras.losses.MeanSquaredError(reduction=None)},
            "reduction=None",
        ),
        ({"loss": None}, "no loss to compute"),
    )
    def test_what_does_not_add_up_is_refused_by_name(self, arguments, message):
        model = keras.Sequential([keras.Input([2]), layers.Dense(1)])
        model = towers.TowerModel(model, placement(2), loss_on_towers=True)
        model.compile("sgd", **{"loss": "mse", **arguments})
        with self.assertRaisesRegex(ValueError, message):
            model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
