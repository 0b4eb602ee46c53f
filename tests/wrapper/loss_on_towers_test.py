"""loss_on_towers: fit's numbers without ever gathering an output."""

import inspect

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from executed import Executed
from models import (
    attention,
    chain,
    close,
    cnn,
    inputs,
    make,
    nested,
    placement,
    recurrent,
    subclassed,
    targets,
    two_by_two,
    unrolled,
)
from same import compiled, pair, same_fit

import towers

layers = keras.layers
RNG = np.random.default_rng(0)


def tokens():
    """Masked outputs, with losses of its own."""
    return chain(
        [4],
        layers.Embedding(9, 3, mask_zero=True),
        layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l2"),
        dtype="int32",
    )


def heads():
    x = keras.Input([4])
    hidden = layers.Dense(5, activation="relu")(x)
    return keras.Model(
        x,
        {
            "p": layers.Dense(3, activation="softmax", name="p")(hidden),
            "q": layers.Dense(1, activation="sigmoid", name="q")(hidden),
        },
    )


def unet():
    x = keras.Input([16, 16, 3])
    down = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    deep = layers.Conv2D(8, 3, padding="same")(layers.MaxPooling2D()(down))
    up = layers.Concatenate()([down, layers.UpSampling2D()(deep)])
    return keras.Model(x, layers.Conv2D(20, 1)(up))


def optional():
    x, more = keras.Input([4]), keras.Input([4], optional=True)

    class Sum(layers.Layer):
        def call(self, x, more=None):
            return x if more is None else x + more

    return keras.Model([x, more], layers.Dense(1)(Sum()(x, more)))


def embedding():
    return chain([4], layers.Embedding(9, 2), dtype="int32")


def both(model, where):
    """The plain model, and one with the loss on its towers."""
    return pair(model, where, loss_on_towers=True)


class EqualityTest(parameterized.TestCase):
    @parameterized.parameters(attention, cnn, two_by_two)
    @pytest.mark.rare
    def test_weights_after_fit_are_the_plain_model_s(self, model):
        self.check_fit(model)

    @parameterized.parameters(recurrent, nested, unrolled, subclassed)
    @pytest.mark.rare
    def test_so_of_other_models(self, model):
        self.check_fit(model)

    def check_fit(self, model):
        models = both(model, placement(3, [3, 1, 2]))
        x, y = inputs(models[0], 16), targets(models[0], 16)
        # Batches of 7, 7 and 2 rows: one tower has none.
        same_fit(models, x, y, batch_size=7, epochs=2)

    @parameterized.parameters(
        (keras.losses.Huber(reduction="sum"), ([3, 1, 2], 7), False),
        (
            keras.losses.Huber(reduction="mean_with_sample_weight"),
            (None, 2),
            True,
        ),
    )
    @pytest.mark.rare
    def test_masks_and_sample_weights_count_as_in_the_plain_model(
        self, loss, rows, weighted
    ):
        self.check(loss, rows, weighted)

    @parameterized.product(
        loss=(
            "mse",
            keras.losses.Huber(reduction="sum"),
            keras.losses.Huber(reduction="mean_with_sample_weight"),
        ),
        rows=((None, 5), ([3, 1, 2], 7), (None, 2)),
        weighted=(False, True),
    )
    @pytest.mark.rare
    def test_and_in_all_combinations(self, loss, rows, weighted):
        self.check(loss, rows, weighted)

    def check(self, loss, rows, weighted):
        weights, batch = rows
        models = both(tokens, placement(3, weights))
        x, y = RNG.integers(0, 9, [11, 4]), RNG.normal(size=[11, 4, 2])
        x[:2] = 0  # a batch of 2 rows that are masked altogether
        each = RNG.uniform(size=[11, 4]) if weighted else None
        how = {"metrics": ["mae"], "weighted_metrics": ["mse"]}
        same_fit(
            *(models, x, y),
            loss=loss,
            compiling=how,
            sample_weight=each,
            batch_size=batch,
            epochs=2,
            validation_data=(x, y) if each is None else (x, y, each),
        )

    @pytest.mark.rare
    def test_several_outputs_with_weights_and_metrics(self):
        x = RNG.normal(size=[11, 4]).astype("float32")
        y = {
            "p": RNG.integers(0, 3, [11]),
            "q": RNG.integers(0, 2, [11, 1]),
        }
        weights = {k: RNG.uniform(size=11) for k in "pq"}
        models = both(heads, placement(3))
        for m in models:  # each with metrics of its own
            ranked = keras.metrics.AUC(name="auc")
            overlap = keras.metrics.BinaryIoU(name="iou")
            compiled(
                m,
                {
                    "p": "sparse_categorical_crossentropy",
                    "q": "binary_crossentropy",
                },
                loss_weights={"p": 2.0, "q": 0.5},
                metrics={"p": "accuracy", "q": [ranked, overlap]},
                weighted_metrics={"p": ["accuracy"]},
            )
        how = {"sample_weight": weights, "validation_split": 0.3}
        how |= {"batch_size": 4, "epochs": 3}
        same_fit(models, x, y, optimizer=None, **how)

    def test_run_eagerly_and_models_with_nothing_but_add_loss(self):
        class Penalty(layers.Layer):
            def call(self, x):
                self.add_loss(keras.ops.mean(x**2))
                return x

        def model():
            return chain([4], layers.Dense(2), Penalty())

        x = RNG.normal(size=[5, 4]).astype("float32")
        for eagerly in (False, True):
            models = both(model, placement(3))
            for m in models:
                compiled(m, None)
            models[1].run_eagerly = eagerly
            same_fit(models, x, optimizer=None, batch_size=5)

    @pytest.mark.skipif(
        "optional" not in inspect.signature(keras.Input).parameters,
        reason="optional inputs are of Keras 3.8",
    )
    @parameterized.parameters(([3, 2, 1],), ([1, 1],))
    @pytest.mark.rare(after=1)
    def test_an_input_may_be_left_out(self, weights):
        x, y = RNG.normal(size=[7, 4]), RNG.normal(size=[7, 1])
        models = both(optional, placement(len(weights), weights))
        how = {"compiling": {"metrics": ["mae"]}, "batch_size": 3}
        same_fit(models, [x, None], y, **how)
        how = {"batch_size": 3, "verbose": 0}
        close(*(m.evaluate([x, None], y, **how) for m in models))

    @parameterized.parameters(False, True)
    def test_sparse_gradients_stay_sparse(self, run_eagerly):
        class Spy(keras.optimizers.SGD):
            def update_step(self, gradient, variable, learning_rate):
                kinds.add(type(gradient).__name__)
                super().update_step(gradient, variable, learning_rate)

        models, kinds = both(embedding, placement(3, [3, 2, 1])), set()
        for m in models:
            kinds.clear()
            m.compile(Spy(0.1), "mse", run_eagerly=run_eagerly)
            m.train_on_batch(np.eye(7, 4, dtype="int32"), np.ones([7, 4, 2]))
            self.assertEqual(kinds, {"IndexedSlices"})
        close(*(m.get_weights() for m in models))


class TransfersTest(absltest.TestCase):
    @pytest.mark.rare
    def test_no_output_crosses_devices(self):
        model = towers.TowerModel(make(unet), placement(3), loss_on_towers=True)
        model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        x = RNG.normal(size=[7, 16, 16, 3]).astype("float32")
        y = RNG.integers(0, 20, [7, 16, 16])
        model.optimizer.build(model.trainable_variables)
        step = Executed(lambda: model.fit(x, y, batch_size=7, verbose=0))
        for i in range(3):
            self.assertEqual(step.heavy()[f"tower_{i}"], {f"/CPU:{i}"})
        sends = [s for s in step.sends() if s[0] != s[1]]
        # Per other tower the weights, the shards of x and y, and that all towers
        # have said what the loss is divided by go down; what the loss and the
        # metric sum up comes up, and the gradients.
        down = [name for source, _, name in sends if source == "/CPU:0"]
        up = [name for source, _, name in sends if source != "/CPU:0"]
        self.assertLen(down, 2 * (1 + 2 + 1))
        self.assertLen(up, 2 * (1 + 1))
        report = towers.execution_report(
            lambda: model.fit(x, y, batch_size=7, verbose=0)
        )
        self.assertLen(report.transfers, len(sends))
        shards = {x.shape[1:], y.shape[1:]}
        crossed = [t for t in report.transfers if t.shape[1:] in shards]
        self.assertLen(crossed, 2 * 2)
        # What comes up is no larger than all weights; an output is 20 KB a row.
        largest = sum(w.nbytes for w in model.get_weights())
        for t in report.transfers:
            if t.target == "/CPU:0":
                self.assertLessEqual(t.bytes, largest, t.tensor)
            self.assertNotEqual(t.shape[1:], (16, 16, 20))


class RefusalTest(absltest.TestCase):
    def test_steps_that_need_the_outputs_are_refused(self):
        class Mine(towers.TowerModel):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs)

        model = chain([2], layers.Dense(1))
        model = Mine(model, placement(2), loss_on_towers=True)
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(
            ValueError, "Mine of Sequential has its own compute_los"
        ):
            model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
