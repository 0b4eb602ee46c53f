"""draws: rows of other towers have other noise; what has no rows is one."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized

import towers

TWO = towers.Placement(["/CPU:0", "/CPU:1"])
THREE = towers.Placement(["/CPU:0", "/CPU:1", "/CPU:2"], weights=[3, 2, 1])
FOUR = towers.Placement.cpus(4)
X = np.arange(14, dtype="float32").reshape(7, 2) / 10 + 1
SEED = [5, 7]


class Drawing(keras.Model):
    """Returns what functions of its input draw, by name."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return {name: f(x) for name, f in self.functions.items()}


def rows(x):
    """How many: a Python constant, where it is known."""
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


def looped(draw):
    def draw_thrice(x):
        step = lambda i, y: (i + 1, y + draw(i, tf.shape(x)))  # noqa: E731
        return tf.while_loop(lambda i, _: i < 3, step, (0, 0 * x))[1]

    return draw_thrice


def numbers(n):
    return tf.cast(n, tf.float32)


# What the plain model draws, bit for bit.
ROWS = {
    "dropout": lambda x: keras.random.dropout(x, 0.5, seed=3),
    "noise": lambda x: keras.random.normal(keras.ops.shape(x), seed=3),
    "alike": lambda x: keras.random.normal((rows(x), 3), seed=3),
    "integers": lambda x: numbers(
        tf.random.stateless_uniform([rows(x), 3], SEED, 0, 999, tf.int32)
    ),
    "truncated": lambda x: tf.random.stateless_truncated_normal(
        [rows(x), 1], SEED
    ),
    "gamma": lambda x: tf.random.stateless_gamma([rows(x)], SEED, 2.0),
    "last": lambda x: tf.transpose(
        tf.random.stateless_normal([2, rows(x)], SEED)
    ),
    "several": lambda x: tf.reshape(
        tf.random.stateless_normal([3 * rows(x), 2], SEED), [-1, 6]
    ),
    "loop": looped(lambda i, s: tf.random.stateless_normal(s, [i, 4])),
    "branch": lambda x: tf.cond(
        tf.reduce_sum(x) > 0.0,
        lambda: tf.random.stateless_uniform(tf.shape(x), SEED),
        lambda: x,
    ),
}
# One for the batch, of as many numbers as a tower of three has rows.
ONE = {
    "stateless": lambda x: 0 * x[:, :1] + keras.random.normal((3,), seed=3),
    "op": lambda x: 0 * x[:, :1] + tf.random.normal([3], seed=5),
    "number": lambda x: 0 * x + tf.random.uniform([], seed=5),
    "steps": lambda x: 0 * x + looped(lambda i, _: tf.random.normal([], seed=2))(x),
    "brightness": lambda x: tf.image.random_brightness(
        x[:, :, None, None], 0.5, seed=3
    )[..., 0, 0] - x,
}  # fmt: skip
# Of which each tower has a stream of its own.
OWN = {
    "op": lambda x: tf.random.normal([rows(x), 2], seed=5),
    "kept": lambda x: tf.nn.dropout(0 * x + 1, 1e-6, seed=3)
    + tf.random.uniform(tf.shape(x), seed=3),
    "loop": looped(lambda i, s: tf.random.normal(s, seed=4)),
    "by row": lambda x: tf.map_fn(
        lambda _: tf.random.normal([2], seed=4), x
    ),
    "shape of rows": lambda x: tf.random.stateless_gamma(
        tf.shape(x), SEED, x
    ),
    "words": lambda x: numbers(
        keras.random.categorical(0 * tf.repeat(x, 400, 1), 4, seed=3)
    ),
    "counts": lambda x: keras.random.binomial((rows(x), 4), 1e4, 0.5, seed=3),
    "shuffled": lambda x: tf.random.shuffle(
        tf.random.uniform([rows(x), 1], seed=9), seed=2
    ),
}  # fmt: skip


def drawn(functions, x, placement, training=True, **how):
    model = Drawing(functions)
    model(x)
    shape = [None, *x.shape[1:]] if how.pop("is_open", False) else x.shape

    @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
    def call(x):
        return towers.build_towers(model, x, placement, training, **how).outputs

    return tf.nest.map_structure(np.asarray, call(x))


def plainly(functions, x, **how):
    model = tf.function(Drawing(functions), autograph=False, **how)
    return tf.nest.map_structure(np.asarray, model(tf.constant(x)))


class DrawsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (TWO, 7, True), (THREE, 7, False), (THREE, 2, True), (THREE, 2, False)
    )
    @pytest.mark.slow_after(2)
    def test_a_tower_draws_its_rows_by_a_constant_seed(
        self, placement, size, is_open
    ):
        functions = {**ROWS, **{f"one {k}": f for k, f in ONE.items()}}
        plain = plainly(functions, X[:size])
        here = drawn(functions, X[:size], placement, is_open=is_open)
        for name, value in plain.items():
            np.testing.assert_allclose(
                here[name], value, rtol=1e-6, err_msg=name
            )

    @parameterized.parameters((TWO, False), (THREE, True))
    @pytest.mark.slow_after(1)
    def test_no_row_has_the_numbers_of_another_tower_s(
        self, placement, is_open
    ):
        same = np.ones_like(X)
        here = drawn(OWN, same, placement, is_open=is_open)
        plain = plainly(OWN, same)
        for name, value in here.items():
            self.assertLen(np.unique(value, axis=0), len(value), name)
        for name in ("op", "kept"):  # the first tower's
            np.testing.assert_array_equal(here[name][:3], plain[name][:3])

    @parameterized.parameters("quick_start", "jit_compile")
    @pytest.mark.slow_after(1)
    def test_so_it_is_in_towers_that_are_called(self, how):
        some = ("dropout", "several")
        functions = {name: ROWS[name] for name in some}
        plain = plainly(functions, X, jit_compile=how == "jit_compile")
        here = drawn(functions, X, THREE, **{how: True})
        for name, value in plain.items():
            np.testing.assert_allclose(
                here[name], value, rtol=1e-6, err_msg=name
            )

    def test_copies_of_a_tower_have_rows_of_their_own(self):
        keras_own = keras.layers.Lambda(
            tf.nn.experimental.stateless_dropout,
            arguments={"rate": 0.5, "seed": SEED},
        )
        by_users = keras.layers.Lambda(ROWS["noise"])
        for layer in (keras_own, by_users):
            model = keras.Sequential([keras.Input([2]), layer])
            x = np.ones([8, 2], "float32")
            graph = towers.build_towers(model, x, FOUR)
            np.testing.assert_allclose(graph.outputs, model(x), rtol=1e-6)

    def test_the_seed_of_a_program_counts_too(self):
        functions = {
            "rows": lambda x: tf.random.normal(tf.shape(x)),
            "looped": looped(lambda i, s: tf.random.normal(s)),
            "one": lambda x: 0 * x + tf.random.normal([2]),
        }
        tf.random.set_seed(1)
        self.addCleanup(tf.random.set_seed, None)
        for quickly in (False, True):
            here = drawn(functions, X, THREE, quick_start=quickly)
            self.assertLen(np.unique(here["rows"], axis=0), 7)
            self.assertLen(np.unique(here["looped"], axis=0), 7)
            self.assertLen(np.unique(here["one"], axis=0), 1)

    def test_fit_trains_as_the_plain_model_does(self):
        def model():
            keras.utils.set_random_seed(1)
            tf.random.set_seed(None)
            layers = [
                keras.Input([2]),
                keras.layers.Dense(6),
                keras.layers.Lambda(ROWS["dropout"]),
                keras.layers.Lambda(lambda x: x + tf.random.normal([6], seed=2)),
                keras.layers.Dense(1),
            ]  # fmt: skip
            return keras.Sequential(layers)

        def trained(model):
            model.compile(keras.optimizers.SGD(0.1), "mse")
            y = X[:, :1] ** 2
            model.fit(X, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
            return model

        plain, here = (
            trained(model()),
            trained(towers.TowerModel(model(), THREE)),
        )
        for a, b in zip(plain.get_weights(), here.get_weights()):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_a_session_has_it_so(self):
        functions = {"rows": ROWS["noise"], "own": OWN["op"], "one": ONE["op"]}
        plain = plainly(functions, X)
        model = Drawing(functions)
        model(X)
        with tf.Graph().as_default():
            graph = towers.build_towers(model, tf.constant(X), THREE)
            with tf.compat.v1.Session() as session:
                here = session.run(graph.outputs)
        for name in ("rows", "one"):
            np.testing.assert_allclose(here[name], plain[name], rtol=1e-6)
        self.assertLen(np.unique(here["own"], axis=0), 7)

    def test_what_is_computed_again_is_drawn_again(self):
        def again(x):
            return tf.recompute_grad(lambda x: x * ROWS["dropout"](x))(x)

        def slope(call):
            x = tf.constant(X)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = call(x)
            return tape.gradient(y, x)

        model = Drawing({"": lambda x: ROWS["noise"](x) + again(x)})
        model(X)
        plain = tf.function(lambda: slope(model))()
        here = tf.function(
            lambda: slope(
                lambda x: towers.build_towers(model, x, THREE).outputs
            )
        )()
        np.testing.assert_allclose(here, plain, rtol=1e-6)

    def test_what_towers_share_is_said_once_by_name(self):
        @tf.function
        def kept(x):
            return x + tf.random.normal(tf.shape(x), seed=1)

        class Kept(keras.layers.Layer):
            def call(self, x):
                return kept(x)

        model = keras.Sequential([keras.Input([2]), Kept(name="noisy")])
        with self.assertWarnsRegex(UserWarning, "'noisy' draws .*tf.function"):
            towers.build_towers(model, X[:6], TWO)

    def test_what_cannot_be_looked_at_is_said_by_name(self):
        def fixed(x):
            noise = tf.random.normal([2], seed=1)
            return tf.concat([x, tf.zeros([3, 0])], 1) + noise

        layer = keras.layers.Lambda(fixed, name="noisy")
        model = keras.Sequential([keras.Input([2], batch_size=3), layer])
        with self.assertWarnsRegex(UserWarning, "'noisy' draws .*another num"):
            graph = towers.build_towers(
                model, np.ones([6, 2], "f"), TWO, merge="stack"
            )
        self.assertNotAllClose(*graph.outputs)

    def test_xla_s_own_numbers_are_said_by_name(self):
        with self.assertWarnsRegex(UserWarning, "XLA does not go by such"):
            drawn({"one": ONE["op"]}, X, TWO, jit_compile=True)

    def test_a_model_without_such_seeds_is_not_asked(self):
        seed = keras.random.SeedGenerator(3)
        functions = {
            "generator": lambda x: keras.random.dropout(x, 0.5, seed=seed),
            "none": lambda x: tf.random.normal(tf.shape(x)),
        }
        model = Drawing(functions)
        model.seed = seed
        model(X)
        before = model.calls
        with warnings.catch_warnings(action="error"):
            towers.build_towers(model, X, THREE, merge="none")
        self.assertEqual(model.calls, before + 3)


if __name__ == "__main__":
    absltest.main()
