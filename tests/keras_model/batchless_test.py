"""Outputs that are no batch: refused where joining would repeat them."""

import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, placement

import towers

layers = keras.layers


@keras.saving.register_keras_serializable()
class Table(layers.Layer):
    """A batch, and a [3, 2] weight."""

    def build(self, _):
        self.kernel = self.add_weight(shape=(3, 2))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel), self.kernel


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = Table()
        self.seen = None

    def call(self, x, training=False):
        self.seen = x
        batch, kernel = self.table(x)
        return {"batch": batch, "kernel": kernel}


def functional():
    x = keras.Input([3])
    batch, kernel = Table()(x)
    return keras.Model(x, {"batch": batch, "kernel": kernel})


def subclassed(**kwargs):
    model = Subclassed(**kwargs)
    model(np.ones([1, 3], "float32"))
    return model


def mixed():
    return subclassed(dtype="mixed_bfloat16")


def x(rows):
    return np.random.default_rng(0).normal(size=[rows, 3]).astype("float32")


THREE = placement(3, [2, 1, 1])
RULES = {"batch": "concat", "kernel": "mean"}
NO_BATCH = "'concat' for output 1, but that is no batch.*'mean', 'sum', 'stack'"


class RefusalTest(parameterized.TestCase):
    @parameterized.product(
        model=[functional, subclassed, mixed],
        # Shards of unequal rows, of none, and of just as many as the weight.
        shards=[(5, [2, 1, 1]), (2, [2, 1, 1]), (9, None), (3, None)],
    )
    def test_a_weight_among_the_outputs_is_refused(self, model, shards):
        rows, weights = shards
        with self.assertRaisesRegex(ValueError, NO_BATCH):
            towers.build_towers(model(), x(rows), placement(3, weights))

    @parameterized.parameters(functional, subclassed)
    def test_also_by_the_wrapper_and_in_an_export(self, model):
        model = model()
        wrapped = towers.TowerModel(model, THREE)
        path = os.path.join(tempfile.mkdtemp(), "model")
        for call in (
            lambda: wrapped(x(12)),
            lambda: wrapped.predict(x(12), verbose=0),
            lambda: wrapped.export(path),
        ):
            with self.assertRaisesRegex(ValueError, NO_BATCH):
                call()
        self.assertFalse(os.path.exists(path))

    def test_in_a_session_s_graph(self):
        model = subclassed()
        with tf.Graph().as_default():
            for batch in (x(9), tf.compat.v1.placeholder("float32", [None, 3])):
                with self.assertRaisesRegex(ValueError, NO_BATCH):
                    towers.build_towers(model, batch, THREE)

    @pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
    def test_a_sum_over_rows_that_keeps_the_axis_is_refused(self):
        inputs = keras.Input([3])
        total = keras.ops.sum(inputs, 0, keepdims=True)
        model = keras.Model(inputs, keras.ops.cast(total, "int32"))
        with self.assertRaisesRegex(ValueError, r"Use 'sum', 'stack' or"):
            towers.build_towers(model, x(4), THREE)

    @parameterized.parameters((2,), (None,))
    def test_what_is_made_of_a_whole_input_is_refused(self, size):
        class Compared(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(2)

            def call(self, inputs):
                plain = self.dense(inputs["whole"])
                rows = self.dense(inputs["rows"] + inputs["whole"][:1])
                return {"found": plain, "rows": rows}

        model = Compared()
        batch = {"rows": x(6), "whole": x(2)}
        expected = model(batch)
        spec = {
            "rows": tf.TensorSpec([None, 3]),
            "whole": tf.TensorSpec([size, 3]),
        }

        def outputs(merge):
            @tf.function(autograph=False, input_signature=[spec])
            def run(batch):
                return towers.build_towers(
                    model, batch, THREE, merge=merge, whole=["whole"]
                ).outputs

            return run({k: tf.constant(v) for k, v in batch.items()})

        with self.assertRaisesRegex(ValueError, "output 0, but that is no ba"):
            outputs("concat")
        actual = outputs({"found": "mean", "rows": "concat"})
        for key, value in expected.items():
            close(actual[key], value)


class Paired(keras.Model):
    """[rows, 2, 3], and what a function makes of it."""

    def __init__(self, function):
        super().__init__()
        self.dense = layers.Dense(3)
        self.function = function

    def call(self, x):
        return self.function(self.dense(tf.stack([x, -x], 1)), self.dense)


def flat(x):
    return tf.reshape(x, [-1, 3])


class OrderTest(absltest.TestCase):
    def test_rows_one_batch_after_the_other_are_refused(self):
        for function in (
            lambda x, dense: dense(tf.concat([x, -x], 0)),
            lambda x, _: tf.tile(x, [2, 1, 1]),
            lambda x, _: flat(tf.transpose(x, [1, 0, 2])),
        ):
            model = towers.TowerModel(Paired(function), placement(2))
            with self.assertRaisesRegex(ValueError, "in another order"):
                model(x(4))

    def test_rows_in_order_are_not(self):
        for function in (
            lambda x, _: flat(x),
            lambda x, _: tf.concat([flat(x[:1]), flat(x[1:])], 0),
            lambda x, dense: tf.split(dense(tf.concat([x, -x], 0)), 2)[1],
        ):
            model = Paired(function)
            wrapped = towers.TowerModel(model, placement(2))
            close(wrapped(x(4)), model(tf.constant(x(4))))


class AcceptedTest(parameterized.TestCase):
    @parameterized.product(
        model=[functional, subclassed],
        kernel=["mean", "sum", "stack", "none"],
    )
    def test_the_rules_that_the_message_names_do(self, model, kernel):
        model = model()
        batch = tf.constant(x(9))
        rules = {**RULES, "kernel": kernel}
        outputs = towers.build_towers(
            model, batch, placement(3), merge=rules
        ).outputs
        expected = model(batch)
        close(outputs["batch"], expected["batch"])
        one = np.asarray(expected["kernel"])
        many = {"mean": one, "sum": 3 * one}.get(kernel, [one] * 3)
        close([np.asarray(outputs["kernel"])], [np.asarray(many)])

    def test_a_weight_among_the_outputs_has_its_gradient(self):
        model, batch = functional(), tf.constant(x(5))

        def gradient(call):
            with tf.GradientTape() as tape:
                y = call()
                loss = tf.reduce_sum(y["batch"] ** 2)
                loss += tf.reduce_sum(y["kernel"] ** 3)
            return tape.gradient(loss, model.trainable_variables)

        wrapped = towers.TowerModel(model, THREE, merge=RULES)
        close(gradient(lambda: wrapped(batch)), gradient(lambda: model(batch)))

    def test_a_tower_fn_and_a_fixed_batch_size_are_left_alone(self):
        def both(model, shard):
            return list(model(shard).values())

        model = functional()
        outputs = towers.build_towers(model, x(9), THREE, tower_fn=both).outputs
        self.assertEqual([y.shape[0] for y in outputs], [9, 9])
        inputs = keras.Input(batch_shape=(6, 3))
        fixed = keras.Model(inputs, layers.Dense(2)(inputs))
        close(towers.build_towers(fixed, x(6), THREE).outputs, fixed(x(6)))
        stateful = keras.Sequential(
            [
                keras.Input(batch_shape=(6, 2, 3)),
                layers.LSTM(2, stateful=True),
            ]
        )
        batch = np.ones([6, 2, 3], "float32")
        outputs = towers.build_towers(stateful, batch, placement(3)).outputs
        close(outputs, stateful(batch))

    def test_what_cannot_be_asked_is_not_judged(self):
        class Strict(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(2)

            def call(self, x):
                if x.shape[0] is None:
                    raise ValueError("This model must know its rows.")
                return self.dense(x)

        model = Strict()
        expected = model(x(6))
        close(towers.build_towers(model, x(6), placement(3)).outputs, expected)

    def test_asking_happens_once_and_leaves_nothing_behind(self):
        rows = []

        class Noted(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(2)
                self.noise = layers.GaussianNoise(1.0)
                self.last = None

            def call(self, x, training=False):
                rows.append(x.shape[0])
                self.last = x
                self.add_loss(keras.ops.sum(x))
                return self.noise(self.dense(x), training=training)

        model = Noted()
        model(x(6))
        before = [v.numpy() for v in model.variables]
        for _ in range(2):
            graph = towers.build_towers(model, x(6), placement(3), True)
            self.assertLen(graph.losses, 1)
            self.assertIn("of one tower", repr(model.last))
        towers.build_towers(model, x(12), placement(3), training=True)
        # Of its outputs once, and of the loss that it adds in each build.
        self.assertEqual(rows.count(None), 1 + 3)
        close([v.numpy() for v in model.variables], before)
