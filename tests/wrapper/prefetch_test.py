"""prefetch: the next batch is on its way while a step runs, and none is lost."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain, close, make, placement

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[13, 5]).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, [13])


def dense():
    return chain(
        [5],
        layers.Dense(6, activation="tanh"),
        layers.Dense(3, activation="softmax"),
    )


def dropped():
    softmax = layers.Dense(3, activation="softmax")
    return chain([5], layers.Dense(6), layers.Dropout(0.5), softmax)


GIVEN = {"a": np.tile(X, [1, 8]), "b": X}
PATIENCE = 120  # seconds, for another thread on a busy machine
HALVED = 4 * (40 * 2 + 5 * 4)  # of these, four rows


def rounded_and_exact():
    """Under mixed precision; of one input something takes all."""
    a, b = keras.Input([40], name="a"), keras.Input([5], name="b")
    exact = layers.Dense(3, dtype="float32", name="exact")(b)
    rounded = layers.Dense(3, dtype="mixed_bfloat16", name="of_a")(a)
    rounded += layers.Dense(3, dtype="mixed_bfloat16", name="of_b")(b)
    return keras.Model({"a": a, "b": b}, exact + rounded)


def compiled(model, **kwargs):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        **kwargs,
    )
    return model


def ahead(model, where=None, **kwargs):
    where = where or placement(2)
    return towers.TowerModel(model, where, prefetch=True, **kwargs)


class Anew(keras.callbacks.Callback):
    """Makes Keras's function again, once, while a batch is read ahead."""

    done = False

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1 and not self.done:
            self.done = True
            self.model.make_train_function(force=True)


class PrefetchTest(parameterized.TestCase):
    def test_no_batch_is_lost_or_taken_twice(self):
        # The last of each four batches has one row, for two towers.
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
        where = placement(2, [3, 1], output_device="/CPU:1")
        found = []
        for model in (
            make(dense),
            ahead(make(dense), where, loss_on_towers=True),
        ):
            history = compiled(model).fit(
                data,
                steps_per_epoch=3,
                epochs=3,
                class_weight={0: 3, 1: 1, 2: 0},
                callbacks=[Anew()] if found else [],
                verbose=0,
            )
            found.append((history.history, model.get_weights()))
        close(*found)

    @pytest.mark.rare
    def test_arrays_weights_and_validation(self):
        found = []
        for model in (make(dense), ahead(make(dense), placement(3))):
            history = compiled(model).fit(
                X,
                Y,
                sample_weight=np.arange(13.0),
                validation_data=(X[:7], Y[:7]),
                batch_size=4,
                epochs=2,
                shuffle=False,
                verbose=0,
            )
            found.append(
                (
                    history.history,
                    model.evaluate(X, Y, batch_size=4, verbose=0),
                    model.train_on_batch(X, Y),
                    model.predict(X, verbose=0),
                    model.get_weights(),
                )
            )
        close(*found)

    @pytest.mark.rare
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
                if k and not begun[k - 1].wait(PATIENCE):
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
                (fetch,) = model.read_ahead.fetches
                _, shards = fetch.outcome.result(PATIENCE)
                seen.append([x.backing_device[-5:] for x in shards])

        data = tf.data.Dataset.from_generator(
            batches,
            output_signature=(
                tf.TensorSpec([4, 5], tf.float32),
                tf.TensorSpec([4], tf.int64),
            ),
        )
        plain = chain([5], Waits(), layers.Dense(3))
        model = compiled(ahead(plain, placement(2)))
        model.fit(data, steps_per_epoch=4, verbose=0)
        self.assertEqual(seen, [["CPU:0", "CPU:1"]] * 6)

    @pytest.mark.filterwarnings("ignore:Your input ran out of data")
    def test_at_an_open_end_a_step_is_begun_as_in_plain_fit(self):
        """There seeds move on, steps are counted, and weights decay."""
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
        data = data.filter(lambda x, y: True)  # of unknown length
        found = []
        for wrapped in (lambda model: model, ahead):
            model = wrapped(make(dropped))
            optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
            model.compile(optimizer, "sparse_categorical_crossentropy")
            history = model.fit(data, epochs=2, verbose=0).history
            found.append((history, model.get_weights()))
            self.assertEqual(int(model.optimizer.iterations), 2 * (3 + 1))
        close(*found)

    def test_a_quick_start_sends_no_more(self):
        data = tf.data.Dataset.from_tensors((X, Y))
        where = placement(2, parameter_device="/CPU:2")
        fit = compiled(ahead(make(dense), where, quick_start=True)).fit
        report = towers.execution_report(fit, data, verbose=0)
        self.assertEqual(report.total_bytes, report.least_bytes)
        # Tower 1's rows, all targets, and how many rows each tower has.
        batch = X[6:].nbytes + Y.nbytes + 2 * 4
        self.assertEqual(report.by_kind["batch"], batch)
        self.assertNotIn("rest", report.by_kind)

    def test_what_towers_cast_crosses_in_half_and_the_rest_whole(self):
        where = placement(2, [3, 1], parameter_device="/CPU:3")
        fit = compiled(ahead(make(rounded_and_exact), where)).fit
        data = tf.data.Dataset.from_tensors((GIVEN, Y))
        report = towers.execution_report(fit, data, verbose=0)
        self.assertEqual(report.by_kind["batch"], HALVED + Y.nbytes)

    @parameterized.parameters(
        ({"quick_start": True}, Y.nbytes + 2 * 4),  # how many rows there are
        ({"loss_on_towers": True}, Y[:4].nbytes),
    )
    @pytest.mark.slow
    def test_what_crosses_in_half_comes_as_if_not_sent_ahead(
        self, kwargs, targets
    ):
        """To the last bit, and to the byte."""
        found, sent = [], []
        where = placement(2, [3, 1], parameter_device="/CPU:3")
        for prefetch in (False, True):
            model = make(rounded_and_exact)
            model = towers.TowerModel(model, where, prefetch=prefetch, **kwargs)
            fit = compiled(model).fit
            data = tf.data.Dataset.from_tensors((GIVEN, Y))
            report = towers.execution_report(fit, data, verbose=0)
            sent.append(report.by_kind)
            # The last batch is of three rows.
            data = tf.data.Dataset.from_tensor_slices((GIVEN, Y)).batch(5)
            fit(data, epochs=2, verbose=0)
            found.append([w.tolist() for w in model.get_weights()])
        self.assertEqual(*found)
        self.assertEqual(*sent)
        self.assertEqual(sent[0]["batch"], HALVED + targets)
        plan = towers.placement_plan(model, GIVEN, Y, machine={"CPU": 4})
        for kind in ("parameters", "gradients"):
            self.assertEqual(plan.by_kind[kind], sent[0][kind])
        # TensorFlow's optimizer spares numbers of rows, but of a quick start.
        more = plan.by_kind["batch"] - HALVED - targets
        self.assertBetween(more, -2 * 4, 6 * 4)

    @pytest.mark.rare
    def test_each_byte_crosses_once(self):
        where = placement(3, weights=[1, 1, 2])
        data = tf.data.Dataset.from_tensors((X, Y))
        model = compiled(ahead(make(dense), where))
        iterator = iter(data.repeat())
        model.make_train_function()
        model.train_function(iterator)  # and one more is there
        found = [
            towers.execution_report(model.train_function, iterator),
            towers.execution_report(model.fit, data),
        ]
        model = compiled(towers.TowerModel(make(dense), where))
        expected = towers.execution_report(model.fit, data)
        for report in found:
            report.assert_bytes(at_most=expected.total_bytes)
            self.assertEqual(report.by_kind, expected.by_kind)
            self.assertLen(report.transfers, len(expected.transfers))

    @pytest.mark.rare
    def test_sparse_inputs_those_for_all_and_what_is_left_out(self):
        rows = keras.Input([5], sparse=True, name="rows")
        table = keras.Input([], name="table")
        outputs = layers.Dense(3, name="dense")(rows) * keras.ops.mean(table)
        plain = keras.Model({"rows": rows, "table": table}, outputs)
        model = keras.models.clone_model(plain)
        model.set_weights(plain.get_weights())
        data = tf.data.Dataset.from_tensor_slices(
            (tf.sparse.from_dense(X), Y, X[:, 0])
        )
        data = data.batch(4).map(
            lambda x, y, w: ({"rows": x, "table": tf.range(7.0)}, y, w)
        )
        model = ahead(model, whole=["table"])
        for each in (compiled(model), compiled(plain)):
            each.make_train_function()
            batches = iter(data)
            for _ in range(4):
                each.train_function(batches)
        self.assertLen(model.read_ahead.fetches, 1)
        close(model.get_weights(), plain.get_weights())

    def test_what_cannot_be_sent_ahead(self):
        with self.assertRaisesRegex(ValueError, "`prefetch` must be True or"):
            towers.TowerModel(make(dense), placement(2), prefetch=2)
        with self.assertRaisesRegex(ValueError, '`on_lost` is "continue"'):
            ahead(make(dense), on_lost="continue")

        class Own(keras.Sequential):
            def test_step(self, data):
                return super().test_step(data)

        for model, problem, kwargs in (
            (make(dense), "run_eagerly=True", {"run_eagerly": True}),
            (make(dense), "execution=2", {"steps_per_execution": 2}),
            (Own([keras.Input([5]), layers.Dense(3)]), "test_step", {}),
        ):
            with self.assertRaisesRegex(ValueError, f"there is .*{problem}"):
                compiled(ahead(model), **kwargs).evaluate(X, Y, verbose=0)
        # What Keras's function says of wrong inputs stands.
        model = compiled(ahead(make(dense)))
        with self.assertLogs("absl", "WARNING"):
            with self.assertRaisesRegex(ValueError, "first axis of rows"):
                model.fit(tf.data.Dataset.from_tensors((1.0, 1)), verbose=0)
