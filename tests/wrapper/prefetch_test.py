"""prefetch: the next batch is on its way while a step runs, and none is lost."""

import threading

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, make, placement

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[13, 5]).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, [13])


def dense():
    return keras.Sequential(
        [
            keras.Input([5]),
            layers.Dense(6, activation="tanh"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def normalized():
    return keras.Sequential(
        [
            keras.Input([5]),
            layers.Dense(6),
            layers.BatchNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def compiled(model, **kwargs):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        **kwargs,
    )
    return model


def ahead(model, where=None, **kwargs):
    where = where or placement(3)
    return towers.TowerModel(model, where, prefetch=True, **kwargs)


def trained(model, *args, **kwargs):
    """History, weights and an evaluation after a fit."""
    history = model.fit(*args, verbose=0, shuffle=False, **kwargs).history
    told = model.evaluate(X, Y, batch_size=5, verbose=0)
    return history, model.get_weights(), told


class Anew(keras.callbacks.Callback):
    """Makes Keras's function again, while a batch is read ahead."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.model.make_train_function(force=True)


class PrefetchTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_as_the_plain_model(self, on_towers):
        many = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
        fits = [
            # The last batch has one row, for three towers.
            ((X, Y), {"batch_size": 4, "sample_weight": np.arange(13.0)}),
            ((many,), {"steps_per_epoch": 3, "class_weight": {0: 3.0, 1: 1.0}}),
        ]
        plain = compiled(make(dense))
        model = ahead(
            make(dense),
            placement(3, [3, 1, 2], output_device="/CPU:1"),
            loss_on_towers=on_towers,
        )
        compiled(model)
        for args, kwargs in fits:
            kwargs = {**kwargs, "epochs": 2, "validation_data": (X[:7], Y[:7])}
            close(
                trained(model, *args, **kwargs), trained(plain, *args, **kwargs)
            )
        close(model.train_on_batch(X, Y), plain.train_on_batch(X, Y))
        close(model.predict(X, verbose=0), plain.predict(X, verbose=0))

    def test_what_was_read_ahead_is_for_whichever_function_is_next(self):
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
        found = []
        for prefetch in (True, False):
            model = towers.TowerModel(
                make(normalized), placement(2), prefetch=prefetch
            )
            compiled(model).fit(
                data, steps_per_epoch=5, callbacks=[Anew()], verbose=0
            )
            found.append(model.get_weights())
        close(*found)

    def test_an_error_comes_at_its_step(self):
        def batches():
            for k in range(4):
                if k == 2:
                    raise ValueError("the third is spoilt")
                yield X[:4] + k, Y[:4]

        data = tf.data.Dataset.from_generator(
            batches,
            output_signature=(
                tf.TensorSpec([None, 5], tf.float32),
                tf.TensorSpec([None], tf.int64),
            ),
        )
        model = compiled(ahead(make(dense)))
        steps = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: steps.append(batch)
        )
        with self.assertRaisesRegex(Exception, "the third is spoilt"):
            model.fit(data, callbacks=[note], verbose=0)
        self.assertEqual(steps, [0, 1])
        plain = compiled(make(dense))
        for k in range(2):
            plain.train_on_batch(X[:4] + k, Y[:4])
        close(model.get_weights(), plain.get_weights())

    def test_it_comes_while_a_step_runs(self):
        begun = [threading.Event() for _ in range(4)]
        seen = []

        def batches():
            for k in range(4):
                if k and not begun[k - 1].wait(20):
                    raise ValueError(f"step {k - 1} has not begun")
                yield np.full([4, 5], k, "float32"), Y[:4]

        class Waits(layers.Layer):
            """Ends a step when the next batch is on its devices."""

            def call(self, x):
                tf.py_function(wait, [x[0, 0]], [])
                return x

        def wait(k):
            begun[int(k)].set()
            if k < 3:
                (errand,) = model.read_ahead.errands
                _, shards = errand.told.result(20)
                seen.append([x.backing_device[-5:] for x in shards])

        data = tf.data.Dataset.from_generator(
            batches,
            output_signature=(
                tf.TensorSpec([4, 5], tf.float32),
                tf.TensorSpec([4], tf.int64),
            ),
        )
        plain = keras.Sequential([keras.Input([5]), Waits(), layers.Dense(3)])
        model = compiled(ahead(plain, placement(2)))
        model.fit(data, steps_per_epoch=4, verbose=0)
        self.assertEqual(seen, [["CPU:0", "CPU:1"]] * 6)

    def test_each_byte_crosses_once(self):
        where = placement(3, weights=[1, 1, 2])  # 16 rows: 4, 4, 8
        data = tf.data.Dataset.from_tensors((X[:1].repeat(16, 0), Y[[0] * 16]))
        reports = []
        for prefetch in (True, False):
            model = compiled(
                towers.TowerModel(make(dense), where, prefetch=prefetch)
            )
            iterator = iter(data.repeat())
            model.make_train_function()
            model.train_function(iterator)  # and one more is there
            reports.append(
                [
                    towers.execution_report(model.train_function, iterator),
                    towers.execution_report(model.fit, data.repeat(2)),
                ]
            )
        for one, other in zip(*reports):
            self.assertEqual(one.total_bytes, other.total_bytes)
