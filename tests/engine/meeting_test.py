"""meeting: towers that talk give the plain model's numbers in training."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import Executed
from models import chain, close, make, placement
from same import pair, plain_step, same_fit, same_step, unknown_rows

import towers

layers = keras.layers
SUMS = {"of": tf.reduce_sum, "inputs": True}


def norm(**kwargs):
    return layers.BatchNormalization(synchronized=True, momentum=0.8, **kwargs)


def resnet():
    """Convolutions with a shortcut and three batch norms."""
    x = keras.Input([6, 6, 3])
    inputs = x
    x = layers.ReLU()(norm()(layers.Conv2D(6, 3, padding="same")(x)))
    short = layers.Conv2D(6, 1, strides=2)(x)
    y = layers.Conv2D(6, 3, strides=2, padding="same")(x)
    x = layers.ReLU()(layers.Add()([short, norm()(y)]))
    return keras.Model(
        inputs, layers.Dense(3)(norm()(layers.GlobalAveragePooling2D()(x)))
    )


def shared():
    """One batch norm called twice, on its own outputs too, and a loop."""
    bn = norm()
    x = keras.Input([4, 3])
    y = bn(layers.SimpleRNN(3, return_sequences=True)(bn(x)))
    return keras.Model(x, layers.Dense(2, activity_regularizer="l2")(y))


def masked():
    tokens = keras.Input([5], dtype="int32")
    x = norm()(layers.Embedding(11, 3, mask_zero=True)(tokens))
    return keras.Model(tokens, layers.Dense(2)(x))


class Contrastive(layers.Layer):
    """Adds the in-batch loss of pairs: the row's own against all others."""

    needs_all_towers = True

    def call(self, pair):
        self.add_loss(towers.all_towers(in_batch_loss, *pair))
        return pair[0]


def in_batch_loss(a, b):
    logits = tf.matmul(a, b, transpose_b=True)
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.range(tf.shape(a)[0]), logits=logits
        )
    )


def contrastive():
    x = keras.Input([4])
    pair = [layers.Dense(3)(x), layers.Dense(3, activation="tanh")(x)]
    return keras.Model(x, Contrastive()(pair))


class Shuffled(layers.Layer):
    """Each row plus the one before it in the batch."""

    needs_all_towers = True

    def call(self, x):
        rolled = towers.all_towers(lambda x: tf.roll(x, 1, 0), x, split=True)
        return x + 2.0 * rolled


def shuffled():
    return chain([4], layers.Dense(3), Shuffled(), layers.Dense(2))


NAMED = [
    (m.__name__, m) for m in (resnet, shared, masked, contrastive, shuffled)
]


def batch(model, rows, seed=0):
    rng = np.random.default_rng(seed)
    x = model.inputs[0]
    shape = (rows, *x.shape[1:])
    if x.dtype == "int32":
        return rng.integers(0, 11, shape).astype("int32")
    return rng.normal(size=shape).astype("float32")


class EqualityTest(parameterized.TestCase):
    @parameterized.named_parameters(NAMED)
    @pytest.mark.slow(of=["resnet", "shared", "masked"])
    def test_a_step_is_the_plain_model_s(self, model):
        # Of two rows one tower has none.
        self.check(model, placement(3, [2, 1, 1]), 2, 7)
        if model is shuffled:
            self.check(model, placement(2), 5, rows_known=True)

    @parameterized.product(
        model=[m for _, m in NAMED],
        case=[
            (1, 3, None, False),
            (2, 7, [3, 1], True),
            (4, 3, None, True),
            (4, 3, [1, 0, 2, 1], False),
        ],
    )
    @pytest.mark.rare
    def test_and_in_any_number_of_towers(self, model, case):
        n, rows, weights, is_known = case
        self.check(model, placement(n, weights), rows, rows_known=is_known)

    def check(self, model, where, *rows, rows_known=False):
        model = make(model)
        batches = [batch(model, n) for n in rows]
        spec = None if rows_known else unknown_rows(batches[0])
        same_step(model, where, *batches, spec=spec, tolerance=1e-4, **SUMS)

    def test_fit_is_the_plain_model_s(self):
        self.check_fit(3, on_towers=True)

    @pytest.mark.rare
    def test_fit_with_the_loss_on_gathered_outputs(self):
        self.check_fit(2, on_towers=False)

    def check_fit(self, n, on_towers):
        models = pair(resnet, placement(n), loss_on_towers=on_towers)
        x = batch(models[0], 16)  # the last batch has two rows
        y = np.random.default_rng(1).normal(size=[16, 3])
        how = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}
        same_fit(models, x, y, batch_size=7, tolerance=1e-4, **how)

    def test_a_session_trains_as_the_plain_model_does(self):
        v1 = tf.compat.v1
        plain, model = make(resnet), make(resnet)
        x = batch(plain, 5)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(plain(x, training=True)))
        variables = plain.trainable_variables
        for v, g in zip(variables, tape.gradient(loss, variables)):
            v.assign_sub(0.1 * g)
        with tf.Graph().as_default():
            fed = v1.placeholder(tf.float32, [None, 6, 6, 3])
            graph = towers.build_towers(model, fed, placement(3), training=True)
            loss = tf.reduce_mean(tf.square(graph.outputs))
            updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
            with tf.control_dependencies(updates):
                train = v1.train.GradientDescentOptimizer(0.1).minimize(loss)
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                session.run(train, {fed: x})
                graph.copy_to_model(session)
        close(model.get_weights(), plain.get_weights())

    def test_the_tape_may_be_outside(self):
        model = make(resnet)
        x = batch(model, 5)
        _, _, expected = plain_step(make(resnet), of=tf.reduce_sum)(x)
        call = tf.function(
            lambda x: (
                towers.build_towers(
                    model, x, placement(2), training=True
                ).outputs
            )
        )
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(call(x)))
        close(tape.gradient(loss, model.trainable_variables), expected)

    def test_a_persistent_tape_may_ask_twice(self):
        model, x = make(shuffled), tf.ones([5, 4])

        @tf.function
        def run(x):
            with tf.GradientTape(persistent=True) as tape:
                y = towers.build_towers(model, x, placement(3)).outputs
                one, two = tf.reduce_sum(y), tf.reduce_sum(y[:1] ** 2)
            variables = model.trainable_variables
            return tape.gradient(one, variables), tape.gradient(two, variables)

        with tf.GradientTape(persistent=True) as tape:
            y = model(x)
            one, two = tf.reduce_sum(y), tf.reduce_sum(y[:1] ** 2)
        for actual, loss in zip(run(x), (one, two)):
            close(actual, tape.gradient(loss, model.trainable_variables))


class PlacementTest(absltest.TestCase):
    def test_few_vectors_cross_and_each_tower_stays(self):
        sends = []
        for synchronized in (False, True):
            model = make(resnet)
            norms = [x for x in model.layers if "batch_norm" in x.name]
            for layer in norms:
                layer.synchronized = synchronized

            @tf.function
            def step(x, model=model):
                with tf.GradientTape() as tape:
                    graph = towers.build_towers(model, x, placement(3), True)
                    loss = tf.reduce_mean(graph.outputs**2)
                graph.apply_updates()
                return tape.gradient(loss, model.trainable_variables)

            x = batch(model, 7)
            executed = Executed(lambda step=step, x=x: step(x))
            sends.append(executed.sends())
            for tower, devices in executed.heavy().items():
                self.assertEqual(devices, {f"/CPU:{tower[-1]}"}, tower)
            self.assertLen(executed.heavy(), 3)
        # For each of two remote towers and each layer the moments up and down,
        # and the gradients of both; where those of all layers went up at once.
        extra = len(sends[1]) - len(sends[0])
        self.assertEqual(extra, 2 * (4 * len(norms) - 1))


class RefusalTest(absltest.TestCase):
    def build(self, model, rows=4, **kwargs):
        x = np.ones([rows, 4], "float32")
        return towers.build_towers(model, x, placement(2), **kwargs)

    def test_what_is_not_declared(self):
        model = make(shuffled)
        model.layers[1].needs_all_towers = False
        with self.assertRaisesRegex(RuntimeError, "needs_all_towers = True"):
            self.build(model)

    def test_different_calls(self):
        results = []

        def uneven(model, x):
            results.append(x)
            if len(results) == 1:
                return towers.all_towers(tf.reduce_sum, x)
            return tf.reduce_sum(x)

        def swapped(model, x):
            results.append(x)
            function = tf.reduce_sum if len(results) == 1 else tf.reduce_max
            return towers.all_towers(function, x)

        for function, message in (
            (uneven, "equally often, but tower 1 has finished"),
            (swapped, "tower 1 calls it in 'tower_1/?' where tower 0"),
        ):
            results.clear()
            function.needs_all_towers = True
            with self.assertRaisesRegex(ValueError, message):
                self.build(
                    {"m": make(shuffled)}, merge="sum", tower_fn=function
                )
        self.assertNoThreads()

    def test_a_call_in_a_loop(self):
        def looped(model, x):
            return tf.while_loop(
                lambda i: i < 2.0,
                lambda i: i + towers.all_towers(tf.reduce_sum, x),
                [0.0],
            )[0]

        looped.needs_all_towers = True
        with self.assertRaisesRegex(ValueError, "a loop, a tf.cond"):
            self.build({"m": make(shuffled)}, merge="sum", tower_fn=looped)
        self.assertNoThreads()

    def test_a_scalar_cannot_be_joined(self):
        def scalar(model, x):
            return towers.all_towers(tf.reduce_sum, tf.reduce_sum(x))

        scalar.needs_all_towers = True
        with self.assertRaisesRegex(ValueError, r"x\[tf.newaxis\]"):
            self.build({"m": make(shuffled)}, merge="sum", tower_fn=scalar)
        self.assertNoThreads()

    def test_results_that_cannot_be_dealt_out(self):
        def halved(model, x):
            return towers.all_towers(lambda x: x[::2], x, split=True)

        def summed(model, x):
            return towers.all_towers(tf.reduce_sum, x, split=True)

        for function in (halved, summed):
            function.needs_all_towers = True
            with self.assertRaisesRegex(Exception, "leave out split=True"):
                self.build({"m": make(shuffled)}, tower_fn=function)

    def test_errors_of_a_layer_are_its_own(self):
        def broken(model, x):
            towers.all_towers(tf.reduce_sum, x)
            raise KeyError("mine")

        broken.needs_all_towers = True
        with self.assertRaisesRegex(KeyError, "mine"):
            self.build({"m": make(shuffled)}, tower_fn=broken)
        self.assertNoThreads()

    def test_a_variable_of_no_model(self):
        foreign = tf.Variable(2.0, name="foreign")

        def reads(model, x):
            return towers.all_towers(tf.reduce_sum, x) * foreign

        reads.needs_all_towers = True
        with self.assertRaisesRegex(ValueError, "foreign"):
            self.build({"m": make(shuffled)}, merge="sum", tower_fn=reads)

    def test_second_order(self):
        model = make(shuffled)

        @tf.function
        def run(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = towers.build_towers(model, x, placement(2)).outputs
                    loss = tf.reduce_sum(y**3)
                penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            return outer.gradient(penalty, x)

        with self.assertRaisesRegex(RuntimeError, "differentiated again"):
            run(tf.ones([4, 4]))

    def test_a_gradient_taken_inside_a_tower(self):
        model = make(resnet)

        def alone(model, x):
            weight = model["m"].trainable_variables[0].value
            with tf.GradientTape() as tape:
                tape.watch(weight)
                loss = tf.reduce_sum(model["m"](x, training=True) ** 2)
            return tape.gradient(loss, weight)

        with self.assertRaisesRegex(RuntimeError, "gathered outputs"):
            towers.build_towers(
                {"m": model},
                batch(model, 4),
                placement(2),
                merge="sum",
                tower_fn=alone,
            )
        self.assertNoThreads()

    def assertNoThreads(self):
        alive = [t for t in threading.enumerate() if "_main" in t.name]
        self.assertEmpty(alive)


class PhaseTest(absltest.TestCase):
    def test_layers_of_an_outer_call_hear_its_phase(self):
        inner = make(resnet)

        class Outer(keras.Model):
            def call(self, x, training=None):
                graph = towers.build_towers(inner, x, placement(2))
                return graph.outputs

        x = batch(inner, 5)
        run = tf.function(Outer(), autograph=False)
        close(run(x, training=True), make(resnet)(x, training=True))
        close(run(x, training=False), make(resnet)(x, training=False))

    def test_outside_of_towers_it_is_the_function(self):
        result = towers.all_towers(lambda a, b: a - b, 3.0, 1.0)
        self.assertEqual(result, 2.0)
