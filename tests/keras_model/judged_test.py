"""judged: a metric that a layer updates is updated once for a batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import placement
from warned import messages

import towers

ops, metrics = keras.ops, keras.metrics
X = np.random.default_rng(0).normal(size=[7, 3]).astype("float32")


def truth(x):
    return ops.cast(x > 0, "float32")


# A metric, and what it is updated with.
UPDATES = {
    "mean": (metrics.Mean, lambda x: [ops.mean(x)]),
    "mean_of_sum": (metrics.Mean, lambda x: [ops.sum(x)]),
    "mean_of_features": (metrics.Mean, lambda x: [ops.mean(x, 0)]),
    "mean_of_rows": (metrics.Mean, lambda x: [ops.mean(x**2, -1)]),
    "mean_of_weighted_rows": (metrics.Mean, lambda x: [x[:, 0], x[:, 1] > 0]),
    "mean_with_a_weight": (metrics.Mean, lambda x: [ops.mean(x), 2.0]),
    "sum": (metrics.Sum, lambda x: [ops.sum(x)]),
    "sum_of_mean": (metrics.Sum, lambda x: [ops.mean(x)]),
    "sum_of_one": (metrics.Sum, lambda x: [1.0]),
    "sum_of_rows": (metrics.Sum, lambda x: [x.shape[0] or ops.shape(x)[0]]),
    "error": (metrics.RootMeanSquaredError, lambda x: [x, 2 * x]),
    "accuracy": (metrics.CategoricalAccuracy, lambda x: [truth(x), x]),
    "auc": (metrics.AUC, lambda x: [truth(x), ops.sigmoid(x)]),
    "recall": (
        lambda: metrics.Recall(top_k=2),
        lambda x: [truth(x), ops.sigmoid(x)],
    ),
    "overlap": (
        lambda: metrics.MeanIoU(3),
        lambda x: [ops.argmax(x, -1), ops.argmax(-x, -1)],
    ),
    "fit": (metrics.R2Score, lambda x: [truth(x), x]),
}


class Tracks(keras.layers.Layer):
    def __init__(self, updates, **kwargs):
        super().__init__(**kwargs)
        self.kept = {name: make() for name, (make, _) in updates.items()}
        self.updates = {name: what for name, (_, what) in updates.items()}

    def call(self, x):
        for name, metric in self.kept.items():
            metric.update_state(*self.updates[name](x))
        return x


class Pooled(keras.Model):
    """Makes one of a ragged row's values."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.mean = keras.metrics.Mean(name="mean")
        self.sum = keras.metrics.Sum(name="sum")

    def call(self, x):
        outputs = self.dense(tf.reduce_mean(x * x, 1) + tf.reduce_max(x, 1))
        self.mean.update_state(outputs)
        self.sum.update_state(tf.reduce_sum(x, 1))
        self.add_loss(tf.reduce_mean(outputs))
        return outputs


def tracking(updates):
    keras.utils.set_random_seed(1)
    layer = Tracks(updates, name="tracks")
    return keras.Sequential([keras.Input([3]), layer, keras.layers.Dense(2)])


RULE = "merge_state_by"


class MetricsTest(parameterized.TestCase):
    def check(self, actual, expected):
        for name in actual.layers[0].kept:
            ours, theirs = (
                [v.numpy() for v in copy.layers[0].kept[name].variables]
                for copy in (actual, expected)
            )
            for a, e in zip(ours, theirs):
                np.testing.assert_allclose(
                    a, e, rtol=1e-5, atol=1e-5, err_msg=name
                )

    @pytest.mark.slow
    def test_one_update_is_one_of_any_number_of_towers(self):
        """With a small last batch, which leaves a tower without rows."""
        plain, template = tracking(UPDATES), tracking(UPDATES)
        towered = towers.TowerModel(template, placement(3, [3, 2, 1]))
        for model in (plain, towered):
            model.compile(loss="mse")
        plain.evaluate(X, X[:, :2], batch_size=5, verbose=0)
        self.assertEmpty(
            messages(
                lambda: towered.evaluate(X, X[:, :2], batch_size=5, verbose=0),
                RULE,
            )
        )
        self.check(template, plain)

    def test_so_it_is_of_known_rows(self):
        few = {k: x for k, x in UPDATES.items() if "mean" in k or "sum" in k}
        plain, towered = tracking(few), tracking(few)
        plain(X)
        where = placement(2)
        self.assertEmpty(
            messages(
                lambda: towers.build_towers(towered, X, where).apply_updates(),
                RULE,
            )
        )
        self.check(towered, plain)

    @parameterized.parameters((2, None), (3, [3, 2, 1]))
    @pytest.mark.rare
    def test_rows_may_be_ragged(self, n, w):
        counts = [1, 3, 2, 5, 1, 4, 1, 2]
        values = np.sin(np.arange(38, dtype="float32")).reshape([19, 2])
        x = tf.RaggedTensor.from_row_lengths(values, counts)
        data = tf.data.Dataset.from_tensor_slices((x, np.ones([8, 1])))
        seen = []
        for wrapped in (False, True):
            keras.utils.set_random_seed(1)
            model = Pooled()
            if wrapped:
                model = towers.TowerModel(model, placement(n, w))
            model.compile("sgd", "mse")
            seen.append(model.fit(data.batch(6), verbose=0).history)
        self.assertEqual(*map(list, seen))
        for name, value in seen[0].items():
            np.testing.assert_allclose(seen[1][name], value, 1e-5)

    def test_what_does_not_add_up_is_named_once(self):
        model = tracking({"peak": (metrics.Mean, lambda x: [ops.max(x)])})
        names = messages(
            lambda: [
                towers.build_towers(model, X, placement(2)).apply_updates()
                for _ in range(2)
            ],
            RULE,
        )
        self.assertLen(names, 1)
        self.assertIn("mean/total'", names[0])
        self.assertNotIn("mean/count'", names[0])
        total, count = (
            float(v) for v in model.layers[0].kept["peak"].variables
        )
        self.assertEqual(count, 2.0)  # of two updates
        each = [3 / 7 * X[:3].max(), 4 / 7 * X[3:].max()]
        self.assertAlmostEqual(total, 2 * float(sum(each)), places=5)

    def test_nor_does_what_looks_at_other_rows(self):
        along = lambda: metrics.CosineSimilarity(axis=0)  # noqa: E731
        model = tracking({"along": (along, lambda x: [x, x**2])})
        names = messages(
            lambda: towers.build_towers(model, X, placement(2)).apply_updates(),
            RULE,
        )
        self.assertLen(names, 1)
        self.assertIn("cosine_similarity/total'", names[0])

    def test_a_model_without_losses_is_asked_nothing_more(self):
        """And one with them once, where rows are known."""

        class Counts(keras.layers.Layer):
            calls = seen = 0

            def call(self, x):
                Counts.calls += 1
                self.seen += 1
                if self.name == "adds":
                    self.add_loss(ops.mean(x))
                return x

        calls = []
        for name in ("counts", "adds"):
            layer = Counts(name=name)
            model = keras.Sequential([keras.Input([3]), layer])
            Counts.calls = layer.seen = 0
            towers.build_towers(model, X[:6], placement(3), tower_fn=called)
            calls.append(Counts.calls)
            self.assertEqual(layer.seen, calls[0])  # of towers alone
        self.assertEqual(calls[1], calls[0] + 1)


def called(model, x):
    return model(x)
