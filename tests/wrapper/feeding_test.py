"""`fit`, `evaluate` and `predict` with what each tower reads: as if it were joined."""

import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import NAMED, chain, close, inputs, make, targets

import towers

layers = keras.layers
DEVICES = ["/CPU:1", "/CPU:2", "/CPU:3"]
BATCH = [3, 5, 2]  # rows of each tower's batches
ROWS = [7, 8, 7]  # of each tower: 3, 2 and 4 batches, and none is whole at last


def placed(n=3):
    return towers.Placement(DEVICES[-n:], parameter_device="/CPU:0")


def reads(*nests):
    """A dataset for each tower, of rows of its own of these nests.

    Args:
      *nests: functions from a number of rows to arrays, or a nest of them.
    """

    def dataset(tower):
        rows = ROWS[tower.index]
        given = tuple(nest(rows) for nest in nests)
        given = given if len(given) > 1 else given[0]
        data = tf.data.Dataset.from_tensor_slices(given)
        return data.batch(BATCH[tower.index])

    return dataset


def joined(dataset_fn, n=3):
    """A dataset of what all of these towers have at a time, in their order."""
    results = [dataset_fn(towers.Tower(i, "", "", None)) for i in range(n)]
    each = [list(data) for data in results]
    batches = []
    for k in range(max(map(len, each))):
        some = [tf.nest.flatten(own[k]) for own in each if k < len(own)]
        batches.append(
            tf.nest.pack_sequence_as(
                each[0][0],
                [
                    tf.sparse.concat(0, list(column))
                    if isinstance(column[0], tf.SparseTensor)
                    else tf.concat(column, 0)
                    for column in zip(*some)
                ],
            )
        )
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature=results[0].element_spec
    )
    count = tf.data.experimental.assert_cardinality(len(batches))
    return data.apply(count)


def both(dataset_fn, n=3):
    return joined(dataset_fn, n), towers.per_tower(dataset_fn)


def compiled(model, loss="mse", **kwargs):
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        loss,
        weighted_metrics=kwargs.pop("weighted_metrics", None),
        jit_compile=False,
        **kwargs,
    )
    return model


def trained(model, data, validation, test, **kwargs):
    fitted = model.fit(
        data, validation_data=validation, epochs=2, verbose=0, **kwargs
    )
    return [
        model.get_weights(),
        fitted.history,
        model.evaluate(validation, verbose=0),
        model.predict(test, verbose=0),
        int(model.optimizer.iterations),
    ]


def weights(rows):
    return np.random.default_rng(rows).uniform(size=[rows]).astype("float32")


def classifier():
    return chain(
        [4],
        layers.Dense(6, activation="tanh"),
        layers.Dropout(0.3),
        layers.Dense(3),
    )


def features(rows):
    return np.random.default_rng(rows).normal(size=[rows, 4]).astype("float32")


def classes(rows):
    return np.random.default_rng(rows).integers(0, 3, [rows])


CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# How a model is wrapped, and compiled.
WAYS = [
    (2, {"loss_on_towers": "auto"}, {}),
    (3, {}, {"steps_per_execution": 3}),
    (3, {"prefetch": True}, {}),
    (3, {"quick_start": True}, {}),
    (3, {"quick_start": True, "loss_on_towers": True}, {}),
    (3, {}, {"run_eagerly": True}),
]


class OwnStep(keras.Model):
    """Makes something of the inputs besides calling the model."""

    def __init__(self):
        super().__init__()
        self.net = classifier()
        self.size = keras.metrics.Mean(name="size")

    def call(self, x, training=None):
        return self.net(x, training=training)

    def train_step(self, data):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, weights)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.size.update_state(tf.square(x))
        return {"loss": loss, "size": self.size.result()}


class FeedingTest(parameterized.TestCase):
    @parameterized.parameters(*WAYS)
    @pytest.mark.rare(after=1)
    def test_fit_is_plain_fit_on_the_joined_batches(self, n, wrapped, how):
        results = []
        train = both(reads(features, classes), n)
        validation = both(reads(features, classes, weights), n)
        test = both(reads(features), n)
        for k, wrap in enumerate(
            (lambda x: x, lambda x: towers.TowerModel(x, placed(n), **wrapped))
        ):
            model = compiled(
                wrap(make(classifier)),
                CROSSENTROPY,
                metrics=["accuracy"],
                weighted_metrics=["sparse_categorical_crossentropy"],
                **how,
            )
            sets = train[k], validation[k], test[k]
            results.append(trained(model, *sets, class_weight={0: 2, 2: 0.5}))
        close(*results, 1e-6)
        self.assertEqual(results[0][-1], 2 * (3 if n == 2 else 4))

    @parameterized.named_parameters(*NAMED)
    @pytest.mark.rare
    def test_of_every_kind_of_model(self, factory):
        x = [lambda n: inputs(make(factory), n)]
        xy = [*x, lambda n: targets(make(factory), n)]
        sets = both(reads(*xy)), both(reads(*xy)), both(reads(*x))
        plain, model = make(factory), towers.TowerModel(make(factory), placed())
        close(
            *[
                trained(compiled(network), *[pair[k] for pair in sets])
                for k, network in enumerate((plain, model))
            ],
        )

    @parameterized.parameters(1, 2)
    @pytest.mark.rare(after=1)
    def test_steps_of_ones_own_see_what_is_true(self, executions):
        results = []
        for k in range(2):
            model = make(OwnStep)
            model = model if not k else towers.TowerModel(model, placed())
            compiled(model, CROSSENTROPY, steps_per_execution=executions)
            data = both(reads(features, classes, weights))[k]
            history = model.fit(data, epochs=2, verbose=0).history
            results.append([history, model.get_weights()])
        close(*results, 1e-6)

    @pytest.mark.slow
    def test_one_has_none_and_one_no_end(self):
        def dataset(tower):
            data = reads(features, classes)(tower)
            if tower.index == 0:
                return data.take(0)
            return data.repeat() if tower.index == 1 else data

        data = towers.per_tower(dataset)
        model = compiled(
            towers.TowerModel(make(classifier), placed()), CROSSENTROPY
        )
        model.fit(data, steps_per_epoch=3, epochs=3, verbose=0)
        plain = compiled(make(classifier), CROSSENTROPY)
        first, second = (
            list(reads(features, classes)(towers.Tower(i, "", "", None)))
            for i in (1, 2)
        )
        batches = [
            [np.concatenate(x) for x in zip(first[k % 2], *second[k : k + 1])]
            for k in range(9)
        ]
        for x, y in batches:
            plain.train_on_batch(x, y)
        close(model.get_weights(), plain.get_weights(), 1e-6)

    @pytest.mark.rare
    def test_ragged_sparse_text_and_whole_inputs(self):
        words = tf.constant(["a", "b c", "a b a", "c"])

        def dataset(tower):
            rows = tf.range(ROWS[tower.index]) + tower.index
            text = tf.gather(words, rows % 4)
            ragged = tf.RaggedTensor.from_row_lengths(
                tf.cast(tf.range(tf.reduce_sum(rows % 3)), tf.float32), rows % 3
            )
            sparse = tf.sparse.from_dense(
                tf.one_hot(rows % 5, 5) * tf.cast(rows, tf.float32)[:, None]
            )
            data = tf.data.Dataset.from_tensor_slices(
                (
                    {"text": text, "ragged": ragged, "sparse": sparse},
                    tf.cast(rows, tf.float32)[:, None],
                )
            )
            return data.batch(BATCH[tower.index])

        def network():
            text = keras.Input([], dtype="string", name="text")
            ragged = keras.Input([None], ragged=True, name="ragged")
            sparse = keras.Input([5], sparse=True, name="sparse")
            table = keras.Input([3], name="table")
            vectors = layers.TextVectorization(
                vocabulary=["a", "b", "c"], output_mode="count"
            )(text)
            total = layers.Lambda(
                lambda x: tf.reduce_sum(x, 1, keepdims=True), output_shape=(1,)
            )(ragged)
            stack = [vectors, total, layers.Dense(2)(sparse)]
            both = layers.Concatenate()(stack)
            shifted = layers.Lambda(
                lambda x: x[0] + tf.reduce_sum(x[1]), output_shape=(7,)
            )([both, table])
            given = dict(text=text, ragged=ragged, sparse=sparse, table=table)
            return keras.Model(given, layers.Dense(1)(0.1 * shifted))

        def with_table(x, y):
            return {**x, "table": tf.constant([[1.0, 2, 3]])}, y

        stack = joined(dataset).map(with_table)
        plain = [trained(compiled(make(network)), stack, stack, stack)]
        stack = towers.per_tower(lambda tower: dataset(tower).map(with_table))
        for quick in (False, True):
            model = towers.TowerModel(
                make(network), placed(), whole=["table"], quick_start=quick
            )
            plain.append(trained(compiled(model), stack, stack, stack))
        close(plain[1], plain[0])
        close(plain[2], plain[0])

    @parameterized.parameters(
        ({"loss_on_towers": "auto"}, 0),
        ({"loss_on_towers": "auto", "quick_start": True}, 0),
        # Outputs and targets up, the outputs' gradients down.
        ({}, 3 * 10 * 2000 * 4),
    )
    @pytest.mark.rare(after=1)
    def test_no_input_crosses(self, wrapped, least):
        long = reads(
            lambda n: np.ones([n, 2000, 40], "float32"),
            lambda n: np.ones([n, 2000, 1], "float32"),
        )
        data = towers.per_tower(long)
        net = chain([2000, 40], layers.Dense(1, activation="tanh"))
        model = compiled(towers.TowerModel(net, placed(), **wrapped))

        def fit():
            model.fit(data, steps_per_epoch=1, verbose=0)

        fit()
        report = towers.execution_report(fit)
        self.assertBetween(report.total_bytes, least, least + 2000)

    def test_what_datasets_tell_is_refused_beside_them(self):
        data = towers.per_tower(reads(features, classes))
        model = compiled(
            towers.TowerModel(make(classifier), placed()), CROSSENTROPY
        )
        array = np.ones([3, 4])
        for kwargs, pattern in (
            ({"y": array}, "`y` should not be passed. Instead, the targets"),
            ({"sample_weight": array}, "`sample_weight` should not be passed"),
            ({"batch_size": 3}, "`batch_size` should not be passed"),
            ({"shuffle": True}, "`shuffle=True` was passed, but"),
            ({"validation_split": 0.1}, "`validation_split` is only supported"),
            (
                {"validation_data": (data, array)},
                "per_tower were given to `fit`",
            ),
            (
                {"validation_data": data, "validation_batch_size": 3},
                "`validation_batch_size` should not be passed",
            ),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.fit(data, **kwargs)
        for method in (model.train_on_batch, model.predict_on_batch, model):
            with self.assertRaisesRegex(ValueError, "Give what.*to `fit`"):
                method(data)
        with self.assertRaisesRegex(ValueError, "Give what.*to `fit`"):
            model.fit(data.batches(placed()))
        uneven = towers.per_tower(
            lambda tower: tf.data.Dataset.from_tensors(
                (np.ones([2, 4]), np.ones([2 + tower.index // 2]))
            )
        )
        with self.assertRaisesRegex(ValueError, r"tower 2.*have \[2, 3\] rows"):
            model.fit(uneven, verbose=0)
        other = towers.per_tower(
            lambda tower: tf.data.Dataset.from_tensors(
                np.ones([2, 4 + tower.index])
            )
        )
        with self.assertRaisesRegex(
            ValueError, r"tower 1 .*\(2, 5\).*same axes"
        ):
            model.predict(other)

    @pytest.mark.slow
    def test_a_report_repeats_a_step_and_loses_no_batch(self):
        results = []
        for k in range(2):
            model = make(classifier)
            callbacks = []
            if k:
                model = towers.TowerModel(model, placed(), prefetch=True)
                folder = self.enter_context(tempfile.TemporaryDirectory())
                callbacks = [towers.PlacementReport(folder, batch=2)]
            compiled(model, CROSSENTROPY)
            model.fit(
                both(reads(features, classes))[k],
                epochs=2,
                verbose=0,
                callbacks=callbacks,
            )
            results.append(model.get_weights())
        close(*results, 1e-6)
        self.assertGreater(callbacks[0].report.total_bytes, 0)
