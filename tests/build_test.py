"""build_towers: the plain model's numbers, each op on its tower."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import Executed
from models import (
    NAMED,
    attention,
    chain,
    close,
    cnn,
    inputs,
    make,
    nested,
    placement,
    recurrent,
    two_by_two,
)
from same import plain_step, same_step, towered_step, unknown_rows

import towers

layers = keras.layers


# Models with one input and one output.
ONE_BY_ONE = (cnn, recurrent)


class EqualityTest(parameterized.TestCase):
    @parameterized.named_parameters(NAMED)
    @pytest.mark.slow(of=["unrolled", "two_by_two"])
    def test_a_step_is_the_plain_model_s_and_on_its_towers(self, model):
        one_by_one, model = model in ONE_BY_ONE, make(model)
        x = inputs(model, 7)
        executed = same_step(model, placement(3), x, look=Executed)
        # The model's loss has no heavy op of its own.
        self.assertEqual(
            executed.heavy(), {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
        )
        if one_by_one:
            # Down: parameters, shard, output gradient. Up: output, gradients.
            self.assertLen(executed.sends(), 2 * (3 + 2))

    @parameterized.named_parameters(NAMED)
    @pytest.mark.slow(of=["recurrent", "unrolled", "attention", "two_by_two"])
    def test_any_number_of_rows_gives_the_plain_model_s_numbers(self, model):
        model = make(model)
        # In one or two of three towers.
        batches = [inputs(model, rows) for rows in (1, 3, 7)]
        spec = unknown_rows(batches[0])
        same_step(model, placement(3, [1, 0, 2]), *batches, spec=spec)

    def test_one_tower_gives_the_plain_model_s_numbers(self):
        for model in (make(cnn), make(two_by_two)):
            x = inputs(model, 3)
            same_step(model, placement(1), x, spec=unknown_rows(x))

    @parameterized.parameters(recurrent, attention, two_by_two)
    @pytest.mark.slow(after=1)
    def test_the_tape_may_be_outside(self, model):
        model = make(model)
        x = inputs(model, 5)
        _, _, expected = plain_step(model)(x)

        @tf.function
        def forward(x):
            graph = towers.build_towers(model, x, placement(2), training=True)
            each = [
                tf.reduce_mean(y**2) for y in tf.nest.flatten(graph.outputs)
            ]
            return tf.add_n([*each, *graph.losses])

        @tf.function
        def enclosing(x):
            with tf.GradientTape() as tape:
                loss = forward(x)
            return [
                tf.convert_to_tensor(g)
                for g in tape.gradient(loss, model.trainable_variables)
            ]

        with tf.GradientTape() as tape:
            loss = forward(x)
        eager = tape.gradient(loss, model.trainable_variables)
        close([tf.convert_to_tensor(g) for g in eager], expected)
        close(enclosing(x), expected)

    def test_eager_calls_build_a_graph(self):
        model = make(cnn)
        x = inputs(model, 5)
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, x, placement(2))
            loss = tf.reduce_mean(tf.square(graph.outputs))
        close(graph.outputs, model(x))
        gradients = tape.gradient(loss, model.trainable_variables)
        close(gradients, plain_step(model)(x)[2])
        self.assertEqual(graph.rows.numpy().tolist(), [2, 3])

    def test_embedding_gradients_stay_sparse(self):
        model = make(attention)

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                graph = towers.build_towers(model, x, placement(2))
                loss = tf.reduce_mean(graph.outputs**2)
            gradient = tape.gradient(loss, model.trainable_variables[0])
            self.assertIsInstance(gradient, tf.IndexedSlices)
            return gradient.indices

        self.assertLen(run(inputs(model, 4)), 24)

    def test_second_order(self):
        model = make(nested)
        x = tf.constant(inputs(model, 5))

        def penalty(call):
            @tf.function
            def run():
                with tf.GradientTape() as outer:
                    with tf.GradientTape() as inner:
                        inner.watch(x)
                        y = call(x)
                    slope = inner.gradient(y, x)
                    loss = tf.reduce_mean(tf.square(slope))
                # The last bias does not move the slope.
                return outer.gradient(loss, model.trainable_variables[:-1])

            return run()

        where = placement(2)
        close(
            penalty(lambda x: towers.build_towers(model, x, where).outputs),
            penalty(model),
        )

    def test_masks_come_with_the_outputs(self):
        model = make(attention)
        x = inputs(model, 5)
        graph = towers.build_towers(model, x, placement(2))
        np.testing.assert_array_equal(
            graph.outputs._keras_mask, model(x)._keras_mask
        )
        constant = layers.Lambda(lambda x: x, mask=tf.ones([5, 3]))
        model = chain([3], constant)
        with self.assertRaisesRegex(ValueError, "is a constant.*compute_mask"):
            towers.build_towers(model, tf.ones([2, 3]), placement(2))


class PlacedTest(absltest.TestCase):
    def test_layers_are_named_below_their_tower(self):
        model = make(nested)
        step = towered_step(model, placement(2))
        executed = Executed(lambda: step(inputs(model, 4)))
        name = r"tower_1/inner/deep/.*MatMul"
        self.assertEqual(executed.devices(name, "MatMul"), {"/CPU:1"})


class StateTest(parameterized.TestCase):
    @parameterized.parameters(
        (1, 9, True), (3, 2, True), (4, 9, False), (4, 2, False)
    )
    def test_batch_norm_sees_the_whole_batch(self, n, rows, shared):
        def model():
            norm = layers.BatchNormalization(momentum=0.9)
            x = keras.Input([3])
            y = norm(x)
            # A second call sees other values, independent of the first.
            z = norm(x * 3 + 1) if shared else y
            return keras.Model(x, y + z)

        x = np.random.default_rng(0).normal(2, 3, [rows, 3]).astype("float32")
        expected, actual = make(model), make(model)
        expected(x, training=True)
        graph = towers.build_towers(actual, x, placement(n), training=True)
        self.assertTrue(np.isfinite(graph.outputs).all())
        graph.apply_updates()
        close(actual.get_weights(), expected.get_weights())

    def test_a_masked_batch_norm_counts_what_it_saw(self):
        def model():
            return chain(
                [4, 2],
                layers.Masking(),
                layers.BatchNormalization(momentum=0.5),
            )

        x = np.random.default_rng(0).normal(size=[5, 4, 2]).astype("float32")
        x[0, 1:] = 0
        x[3, :2] = 0
        expected, actual = make(model), make(model)
        expected(x, training=True)
        graph = towers.build_towers(actual, x, placement(3), training=True)
        graph.apply_updates()
        close(actual.get_weights(), expected.get_weights(), 1e-4)

    def test_any_number_of_towers_draws_what_the_plain_model_draws(self):
        def model():
            return chain([64], layers.Dropout(0.5))

        x, plain = np.ones([4, 64], "float32"), make(model)
        steps = [plain(x, training=True) for _ in range(2)]
        for n in (1, 2, 3):
            here = make(model)
            for expected in steps:
                graph = towers.build_towers(here, x, placement(n), True)
                graph.apply_updates()
                np.testing.assert_array_equal(graph.outputs, expected)
            close(here.get_weights(), plain.get_weights(), 0)

    def test_a_layer_s_counter_advances_once(self):
        class Counting(layers.Layer):
            def build(self, shape):
                self.steps = self.add_weight(
                    shape=(),
                    dtype="int32",
                    initializer="zeros",
                    trainable=False,
                )

            def call(self, x):
                self.steps.assign_add(1)
                return x

        model = chain([2], Counting())
        graph = towers.build_towers(model, np.ones([3, 2]), placement(4), True)
        graph.apply_updates()
        self.assertEqual(model.layers[0].steps.numpy(), 1)

    def test_losses_are_the_plain_model_s(self):
        x = keras.Input([3])
        y = layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l1")(
            x
        )
        model = keras.Model(x, y)
        rows = np.random.default_rng(0).normal(size=[7, 3]).astype("float32")
        model(rows)
        expected = model.losses
        self.assertLen(expected, 2)
        graph = towers.build_towers(model, rows, placement(3))
        close(graph.losses, expected)


def gradient(loss_of, x, model):
    with tf.GradientTape() as tape:
        loss = loss_of(x)
    gradients = tape.gradient(
        loss, model.trainable_variables, unconnected_gradients="zero"
    )
    return [tf.convert_to_tensor(g) for g in gradients]


def through_functions(loss_of, x, model):
    inner = tf.function(loss_of)
    return gradient(tf.function(lambda x: 2.0 * inner(x)), x, model)


def through_a_condition(loss_of, x, model):
    some = tf.shape(x)[0] > 1

    def loss(x):
        return tf.cond(some, lambda: loss_of(x), lambda: 0.0)

    return gradient(loss, x, model)


def through_a_loop(loss_of, x, model):
    def loss(x):
        return tf.while_loop(
            lambda i, total: i < 3,
            lambda i, total: (i + 1, total + loss_of(x)),
            [0, 0.0],
        )[1]

    return gradient(loss, x, model)


def over_micro_batches(loss_of, x, model):
    def body(i, totals):
        some = gradient(loss_of, x[2 * i : 2 * i + 2], model)
        return i + 1, [t + g for t, g in zip(totals, some)]

    zeros = [tf.zeros(v.shape) for v in model.trainable_variables]
    return tf.while_loop(lambda i, _: i < 3, body, (0, zeros))[1]


def of_second_order(loss_of, x, model):
    def slope(x):
        first = gradient(loss_of, x, model)
        return tf.add_n([tf.reduce_sum(g**2) for g in first])

    return gradient(slope, x, model)


def of_second_order_through_a_function(loss_of, x, model):
    return of_second_order(tf.function(loss_of), x, model)


NESTINGS = (
    through_functions,
    through_a_condition,
    through_a_loop,
    over_micro_batches,
    of_second_order,
    of_second_order_through_a_function,
)


def short_recurrent() -> keras.Model:
    return chain([3, 2], layers.SimpleRNN(2), layers.Dense(1))


class NestingTest(parameterized.TestCase):
    @parameterized.parameters(
        (attention, through_functions),
        (short_recurrent, through_a_condition),
        (cnn, through_a_loop),
        (cnn, over_micro_batches),
        (cnn, of_second_order),
        (nested, of_second_order_through_a_function),
    )
    @pytest.mark.slow(of=["towers2", "towers3", "towers5"])
    def test_gradients_are_right_and_on_the_towers(self, model, nesting):
        self.check(model, nesting, 2)

    @parameterized.parameters(
        *((recurrent, nesting) for nesting in NESTINGS[:4]),
        *((short_recurrent, nesting) for nesting in NESTINGS[4:]),
        *((attention, nesting) for nesting in NESTINGS[1:3]),
    )
    @pytest.mark.slow
    @pytest.mark.rare(of=["too1", "too3", "too4", "too5", "too6", "too7"])
    def test_gradients_of_loops_are_right_too(self, model, nesting):
        self.check(model, nesting, 2 if "recurrent" in model.__name__ else 3)

    def check(self, model, nesting, n):
        model = make(model)
        x = tf.constant(inputs(model, 5))
        spec = tf.TensorSpec([None, *x.shape[1:]], x.dtype)

        def plain(x):
            return tf.reduce_mean(model(x, training=True) ** 2)

        def towered(x):
            graph = towers.build_towers(model, x, placement(n), training=True)
            return tf.reduce_mean(graph.outputs**2)

        @tf.function(input_signature=[spec])
        def actual(x):
            return nesting(towered, x, model)

        gradients = []
        step = Executed(lambda: gradients.extend(actual(x)))
        close(gradients, nesting(plain, x, model))
        if "second_order" in nesting.__name__:
            return  # what an outer tape makes of the backward pass has no home
        for i in range(n):
            heavy = step.devices(f"tower_{i}/", "Conv|MatMul|MaxPool")
            self.assertEqual(heavy, {f"/CPU:{i}"})


class TowerFunctionTest(parameterized.TestCase):
    def test_a_function_per_tower(self):
        model = make(cnn)
        x = inputs(model, 5)
        y = np.random.default_rng(0).normal(size=[5, 3]).astype("float32")

        def loss(model, shard):
            x, y = shard
            return tf.reduce_mean(tf.square(model(x) - y))

        graph = towers.build_towers(
            model, (x, y), placement(3), merge="mean", tower_fn=loss
        )
        close(graph.outputs, np.mean((model(x) - y) ** 2))

    @parameterized.parameters(
        (1, "captured"),
        (1, "whole"),
        (3, "captured"),
        (3, "stopped"),
        (3, "whole"),
    )
    def test_a_gradient_outside_is_refused_not_lost(self, n, how):
        model, scale = make(cnn), tf.Variable(2.0)
        x = inputs(model, 4)

        @tf.function(autograph=False)
        def run(x):
            with tf.GradientTape() as tape:
                double = 2.0 * scale
                if how == "stopped":
                    double = tf.stop_gradient(double)
                graph = towers.build_towers(
                    model,
                    {"x": x, "scale": double},
                    placement(n),
                    tower_fn=lambda model, given: (
                        model(given["x"])
                        * (given["scale"] if how == "whole" else double)
                    ),
                    whole=["scale"],
                )
                loss = tf.reduce_sum(graph.outputs)
            return tape.gradient(loss, [scale, *model.trainable_variables])

        if how == "captured":
            with self.assertRaisesRegex(ValueError, "from outside.*`whole`"):
                run(x)
            return
        slope, *_ = run(x)
        if how == "stopped":
            self.assertIsNone(slope)
        else:
            close(slope, 2.0 * tf.reduce_sum(model(x)))

    def test_the_phase_is_that_of_calls_which_name_none(self):
        class Coder(keras.Model):
            def __init__(self):
                super().__init__()
                self.code = layers.Dense(3)
                self.drop = layers.Dropout(0.5)

            def call(self, x, training=False):
                return self.encode(x)

            def encode(self, x):
                return self.drop(self.code(x))

        model, x = Coder(), np.ones([4, 2], "float32")
        model(x)
        for tower_fn, training, changed in (
            (lambda m, shard: m(shard), True, 1),
            (lambda m, shard: m.encode(shard), True, 1),
            (lambda m, shard: m(shard, training=False), True, 0),
            (lambda m, shard: m(shard, training=True), None, 1),
            (lambda m, shard: m(shard), None, 0),
        ):
            graph = towers.build_towers(
                model, x, placement(2), training, tower_fn=tower_fn
            )
            self.assertLen(graph.updates, changed)  # the seed of the dropout

    def test_two_models_train_each_with_their_own_loss(self):
        """A GAN: gradients of one loss by one model's variables only."""
        generator = chain([2], layers.Dense(3, name="make"), name="generator")
        critic = chain([3], layers.Dense(1, name="judge"), name="critic")
        rng = np.random.default_rng(0)
        z = rng.normal(size=[7, 2]).astype("float32")
        real = rng.normal(size=[7, 3]).astype("float32")

        def losses(models, shard):
            z, real = shard
            fake = models["critic"](models["generator"](z))
            truth = models["critic"](real)
            return {
                "generator": tf.reduce_mean(tf.square(fake - 1)),
                "critic": tf.reduce_mean(tf.square(truth - 1) + fake**2),
            }

        models = {"generator": generator, "critic": critic}

        @tf.function
        def plain(z, real):
            values = losses(models, (z, real))
            return values, [
                tf.gradients(
                    values[k], [v.value for v in m.trainable_variables]
                )
                for k, m in models.items()
            ]

        @tf.function
        def towered(z, real):
            with tf.GradientTape(persistent=True) as tape:
                graph = towers.build_towers(
                    models,
                    (z, real),
                    placement(3),
                    merge="mean",
                    tower_fn=losses,
                    layer_outputs=["critic/judge", "generator"],
                )
            gradients = [
                tape.gradient(graph.outputs[k], m.trainable_variables)
                for k, m in models.items()
            ]
            return graph.outputs, gradients, graph.towers[0].layer_outputs

        values, gradients, seen = towered(z, real)
        close((values, gradients), plain(z, real))
        close(seen["generator"], generator(z[:2]))
        self.assertLen(seen["critic/judge"], 2)  # called twice

    def test_metrics_add_up_over_towers(self):
        model = make(cnn)
        x, y = inputs(model, 7), np.arange(7) % 3
        mean, iou = keras.metrics.Mean(), keras.metrics.MeanIoU(3)

        def measure(parts, shard):
            x, y = shard
            outputs = parts[0](x)
            parts[1].update_state(outputs)
            parts[2].update_state(y, tf.argmax(outputs, 1))
            return tf.reduce_sum(outputs)

        graph = towers.build_towers(
            [model, mean, iou],
            (x, y),
            placement(3, [2, 1, 1]),
            merge="sum",
            tower_fn=measure,
        )
        graph.apply_updates()
        outputs = model(x)
        close(graph.outputs, tf.reduce_sum(outputs))
        close(mean.result(), tf.reduce_mean(outputs))
        expected = keras.metrics.MeanIoU(3)
        expected.update_state(y, tf.argmax(outputs, 1))
        np.testing.assert_array_equal(iou.total_cm, expected.total_cm)

    def test_a_penalty_on_gradients_inside_the_tower(self):
        model = chain([4], layers.Dense(5, "tanh"), layers.Dense(1))
        x = np.random.default_rng(0).normal(size=[5, 4]).astype("float32")

        def penalty(model, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = model(x)
            slopes = tape.gradient(outputs, x)
            return tf.reduce_mean((tf.norm(slopes, axis=1) - 1) ** 2)

        @tf.function
        def run(loss_of):
            with tf.GradientTape() as tape:
                loss = loss_of()
            weights = model.trainable_variables[:3]
            return loss, tape.gradient(loss, weights)

        def towered():
            return towers.build_towers(
                model, x, placement(3), merge="mean", tower_fn=penalty
            ).outputs

        expected = run(lambda: penalty(model, tf.constant(x)))
        step = Executed(lambda: run(towered))
        close(run(towered), expected)
        for i in range(3):
            self.assertEqual(step.heavy()[f"tower_{i}"], {f"/CPU:{i}"})


class RefusalTest(parameterized.TestCase):
    def test_tower_functions_that_cannot_work_are_refused(self):
        model, other = make(cnn), make(cnn)
        x = np.ones([4, 8, 8, 2], "float32")
        variable = tf.Variable(2.0, name="scale")
        calls = []

        def differs(model, shard):
            calls.append(1)
            return [model(shard)] * len(calls)

        def sometimes(model, shard):
            calls.append(1)
            return None if len(calls) % 2 else model(shard)

        for tower_fn, message in (
            (differs, "one structure; tower 1 differs"),
            (sometimes, "None is not in the same places"),
            (lambda m, x: layers.Dense(2)(m(x)), "'dense.*/kernel' is created"),
            (lambda m, x: tf.Variable(1.0) * m(x), "created inside a tower"),
            (lambda m, x: other(x), "reads 'sequential.*kernel', a trainable"),
            (lambda m, x: variable * m(x), "reads the trainable.*scale"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                with tf.GradientTape() as tape:
                    graph = towers.build_towers(
                        model, x, placement(2), tower_fn=tower_fn
                    )
                tape.gradient(graph.outputs, model.trainable_variables)

    def test_bad_arguments_are_refused(self):
        model, x = make(cnn), np.ones([2, 8, 8, 2], "float32")
        where = placement(2)
        drop = chain([8, 8, 2], layers.Dropout(0.5))
        for call, error, message in (
            (lambda: towers.build_towers(1, x, where), TypeError, "keras.Mod"),
            (lambda: towers.build_towers(model, x, 2), TypeError, "Placement"),
            (
                lambda: towers.build_towers(model, x, where, merge="max"),
                ValueError,
                "unknown rule",
            ),
            (
                lambda: towers.build_towers(
                    model, x, where, layer_outputs=["conv2"]
                ),
                ValueError,
                "nearest are .*conv2d",
            ),
            (
                lambda: towers.build_towers([model], x, where),
                TypeError,
                "tower_fn",
            ),
            (
                lambda: tf.function(
                    lambda phase: (
                        towers.build_towers(drop, x, where, phase).outputs
                    ),
                    autograph=False,
                )(tf.constant(True)),
                TypeError,
                "`training` must be True, False or None.*Build towers twice",
            ),
        ):
            with self.assertRaisesRegex(error, message):
                call()

    def test_foreign_state_is_refused_by_name(self):
        model = chain(
            [2], layers.Lambda(lambda x: x + keras.random.normal([2]))
        )
        with self.assertRaisesRegex(ValueError, "seed_generator_state"):
            towers.build_towers(model, np.ones([2, 2]), placement(2))
