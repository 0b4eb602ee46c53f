"""tower_draws: rows of other towers have other noise; what has no rows is one."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed

import towers

TWO = towers.Placement(["/CPU:0", "/CPU:1"])
THREE = towers.Placement(["/CPU:0", "/CPU:1", "/CPU:2"], weights=[3, 2, 1])
FOUR = towers.Placement.cpus(4)
X = np.arange(14, dtype="float32").reshape(7, 2) / 10 + 1
SEED = [5, 7]


class Drawing(keras.Model):
    """Returns what functions of its input and a seed draw, by name.

    Args:
      functions: them.
      seed: a number, or a generator.
    """

    def __init__(self, functions, seed):
        super().__init__()
        self.functions, self.seed = functions, seed
        self.calls, self.traces = 0, []

    def call(self, x):
        self.calls += 1
        self.traces.append(None)
        return {name: f(x, self.seed) for name, f in self.functions.items()}


def rows(x):
    """How many: a Python constant, where it is known."""
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


def pair(seed):
    """What `tf.random.stateless_*` take for a seed."""
    return tf.cast(
        [seed, 7] if isinstance(seed, int) else seed.next(), tf.int32
    )


def looped(draw):
    def draw_thrice(x, seed):
        seed = pair(seed)
        step = lambda i, y: (i + 1, y + draw(seed + i, tf.shape(x)))  # noqa: E731
        return tf.while_loop(lambda i, _: i < 3, step, (0, 0 * x))[1]

    return draw_thrice


def each_row(mapped):
    def draw_once(x, seed):
        seed = pair(seed)
        return mapped(lambda _: tf.random.stateless_normal([2], seed), x)

    return draw_once


def numbers(n):
    return tf.cast(n, tf.float32)


def windows(x, seed):
    """Several rows of each, in order."""
    y = keras.random.dropout(tf.reshape(x, [-1, 1]), 0.5, seed=seed)
    return tf.reshape(y, [-1, 2])


# What the plain model draws, bit for bit.
ROWS = {
    "dropout": lambda x, s: keras.random.dropout(x, 0.5, seed=s),
    "noise": lambda x, s: keras.random.normal(keras.ops.shape(x), seed=s),
    "alike": lambda x, s: keras.random.normal((rows(x), 3), seed=s),
    "integers": lambda x, s: numbers(
        tf.random.stateless_uniform([rows(x), 3], pair(s), 0, 999, tf.int32)
    ),
    "truncated": lambda x, s: tf.random.stateless_truncated_normal(
        [rows(x), 1], pair(s)
    ),
    "doubles": lambda x, s: numbers(
        keras.random.uniform((rows(x), 3), seed=s, dtype="float64")
    ),
    "gamma": lambda x, s: tf.random.stateless_gamma([rows(x)], pair(s), 2.0),
    "gamma of rows": lambda x, s: tf.random.stateless_gamma(
        tf.shape(x), pair(s), x
    ),
    "gamma of columns": lambda x, s: tf.random.stateless_gamma(
        [rows(x), 3], pair(s), [1.0, 2.0, 3.0]
    ),
    "beta": lambda x, s: keras.random.beta((rows(x), 2), 2.0, x, seed=s),
    "words": lambda x, s: numbers(
        keras.random.categorical(0 * tf.repeat(x, 400, 1), 4, seed=s)
    ),
    "counts": lambda x, s: keras.random.binomial((rows(x), 4), 99, 0.5, seed=s),
    "counts of rows": lambda x, s: keras.random.binomial(
        (rows(x), 2), 9 + tf.round(9 * x), 0.5, seed=s
    ),
    "arrivals": lambda x, s: tf.random.stateless_poisson(
        tf.shape(x), pair(s), x
    ),
    "last": lambda x, s: tf.transpose(
        tf.random.stateless_normal([2, rows(x)], pair(s))
    ),
    "several": lambda x, s: tf.reshape(
        tf.random.stateless_normal([3 * rows(x), 2], pair(s)), [-1, 6]
    ),
    "windows": windows,
    "loop": looped(lambda s, n: tf.random.stateless_normal(n, s)),
    "map": each_row(tf.map_fn),
    "vectorized": each_row(tf.vectorized_map),
    "branch": lambda x, s: tf.cond(
        tf.reduce_sum(x) > 0.0,
        lambda: tf.random.stateless_uniform(tf.shape(x), pair(3)),
        lambda: x,
    ),
}
# Likewise, by a seed that has come by way of what takes rows.
ROWS |= {
    "seed of a loop": lambda x, s: tf.random.stateless_normal(
        tf.shape(x),
        tf.while_loop(
            lambda i, *_: i < 2,
            lambda i, y, seed: (i + 1, y * 2.0, seed + 1),
            (0, x, pair(s)),
        )[2],
    ),
    "seed of a branch": lambda x, s: tf.random.stateless_normal(
        tf.shape(x),
        tf.cond(tf.reduce_sum(x) > 0.0, lambda: pair(3), lambda: pair(4)),
    ),
    "seed of a shape": lambda x, s: tf.random.stateless_normal(
        tf.shape(x), pair(s) + tf.shape(x)[1]
    ),
}
# One for the batch, of as many numbers as a tower of three has rows.
ONE = {
    "stateless": lambda x, s: 0 * x[:, :1] + keras.random.normal((3,), seed=s),
    "op": lambda x, s: 0 * x[:, :1] + tf.random.normal([3], seed=5),
    "number": lambda x, s: 0 * x + tf.random.uniform([], seed=5),
    "steps": lambda x, s: (
        0 * x + looped(lambda *_: tf.random.normal([], seed=2))(x, 3)
    ),
    "brightness": lambda x, s: (
        tf.image.random_brightness(x[:, :, None, None], 0.5, seed=3)[..., 0, 0]
        - x
    ),
}


@tf.function
def kept(x, seed):
    return tf.random.stateless_normal(tf.shape(x), seed)


def joined(x, seed):
    """Two views of the batch, one after the other."""
    noise = keras.random.uniform((2 * rows(x), 2), seed=seed)
    views = tf.concat([x, -x], 0) * noise
    return tf.reshape(
        tf.transpose(tf.reshape(views, [2, -1, 2]), [1, 0, 2]), [-1, 4]
    )


def of_data(x, seed):
    many = tf.random.stateless_uniform(tf.shape(tf.where(x > 0.0)), pair(seed))
    return many[: tf.shape(x)[0]]


# Of which each tower has a stream of its own, by what is said of that.
OWN = {
    "op": lambda x, s: tf.random.normal([rows(x), 2], seed=5),
    "kept": lambda x, s: (
        tf.nn.dropout(0 * x + 1, 1e-6, seed=3)
        + tf.random.uniform(tf.shape(x), seed=3)
    ),
    "loop": looped(lambda _, n: tf.random.normal(n, seed=4)),
    "by row": lambda x, s: tf.map_fn(
        lambda _: tf.random.normal([2], seed=4), x
    ),
    "shuffled ops": lambda x, s: tf.random.shuffle(
        tf.random.uniform([rows(x), 1], seed=9), seed=2
    ),
    "shuffled": lambda x, s: tf.random.experimental.stateless_shuffle(
        keras.random.uniform((rows(x), 2), seed=s), pair(s)
    ),
    "pairs": lambda x, s: tf.random.stateless_normal(
        [rows(x), rows(x)], pair(s)
    )[:, :2],
    "views": joined,
    "parts": lambda x, s: tf.concat(
        tf.split(keras.random.uniform((2 * rows(x), 2), seed=s), 2), 1
    ),
    "samples": lambda x, s: tf.transpose(
        numbers(
            tf.random.stateless_categorical(
                tf.zeros([20, 999]), rows(x), pair(s)
            )
        )
    ),
    "data": of_data,
}
SAID = {
    "op": "an op of `tf.random` or `tf.nn` with a state",
    "by row": "an op of `tf.random` or `tf.nn` with a state",
    "shuffled": "depend on other rows",
    "pairs": "for pairs of rows",
    "views": "several views of a batch",
    "data": "of a size that its data tells",
}


def drawn(functions, x, placement, seed=3, **how):
    """What towers draw, and the state of their generator, after two steps."""
    model = Drawing(functions, seed)
    model(x)
    if not isinstance(seed, int):
        seed.state.assign([3, 0])
    shape = [None, *x.shape[1:]] if how.pop("is_open", False) else x.shape

    @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
    def call(x):
        graph = towers.build_towers(model, x, placement, True, **how)
        graph.apply_updates()
        return graph.outputs

    results = [call(x) for _ in range(2)]
    return tf.nest.map_structure(np.asarray, results), seed


def plainly(functions, x, seed=3, **how):
    model = tf.function(Drawing(functions, seed), autograph=False, **how)
    results = [model(tf.constant(x)) for _ in range(2)]
    return tf.nest.map_structure(np.asarray, results), seed


def generator():
    return keras.random.SeedGenerator(3)


# What is drawn in a branch is, as all rows choose it.
@pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
class DrawsTest(tf.test.TestCase, parameterized.TestCase):
    def same(self, functions, x, placement, seed=int, **how):
        plain = {"jit_compile": True} if how.get("jit_compile") else {}
        make = generator if seed is not int else lambda: 3
        expected, end = plainly(functions, x, make(), **plain)
        actual, here = drawn(functions, x, placement, make(), **how)
        for one, other in zip(actual, expected):
            for name, value in other.items():
                np.testing.assert_allclose(
                    one[name], value, rtol=1e-6, err_msg=name
                )
        if seed is not int:
            np.testing.assert_array_equal(here.state, end.state)

    @parameterized.product(
        seed=(keras.random.SeedGenerator, int),
        how=(
            (THREE, 7, True),
            (THREE, 6, False),
            (THREE, 2, True),
            (FOUR, 8, False),
        ),
    )
    @pytest.mark.slow(after=1)
    @pytest.mark.rare(after=4)
    def test_a_tower_draws_its_rows(self, seed, how):
        placement, size, is_open = how
        functions = {**ROWS, **{f"one {k}": f for k, f in ONE.items()}}
        if seed is not int:  # ops with a state begin anew in each function
            functions = {**ROWS, "one": ONE["stateless"]}
        x = np.arange(2 * size, dtype="float32").reshape(size, 2) / 10 + 1
        self.same(functions, x, placement, seed, is_open=is_open)

    @parameterized.parameters((TWO, False), (THREE, True))
    @pytest.mark.slow(after=1)
    def test_no_row_has_the_numbers_of_another_tower_s(
        self, placement, is_open
    ):
        same = np.ones_like(X)
        for seed in (3, generator()):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (here, _), _ = drawn(
                    OWN, same, placement, seed, is_open=is_open
                )
            (plain, _), _ = plainly(OWN, same, seed=3)
            for name, value in here.items():
                self.assertLen(np.unique(value, axis=0), len(value), name)
            for name in ("op", "kept"):  # the first tower's
                np.testing.assert_array_equal(here[name][:3], plain[name][:3])
            caught = [str(w.message) for w in caught]
            for what in {*SAID.values()}:
                self.assertLen([x for x in caught if what in x], 1, what)

    def test_a_loop_of_python_over_rows_is_named(self):
        def of_each(x, seed):
            noise = [
                keras.random.normal((2,), seed=seed) for _ in range(rows(x))
            ]
            return tf.stack(noise)

        with self.assertWarnsRegex(UserWarning, "in a loop over rows"):
            (here, _), _ = drawn({"": of_each}, X, TWO, generator())
        self.assertLen(np.unique(here[""], axis=0), len(X))

    def test_one_number_for_all_needs_no_seed(self):
        functions = {
            "one": lambda x, s: 0 * x + tf.random.uniform([]),
            "rows": lambda x, s: tf.random.uniform(tf.shape(x)),
        }
        tf.random.set_seed(None)
        with warnings.catch_warnings(action="error"):
            warnings.filterwarnings("ignore", "Towers were")  # of garbage
            (first, second), _ = drawn(functions, X, THREE)
        self.assertLen(np.unique(first["rows"], axis=0), len(X))
        for copy in (first, second):
            self.assertLen(np.unique(copy["one"]), 1)
        self.assertNotEqual(first["one"][0, 0], second["one"][0, 0])

    def test_seeds_of_raw_ops_are_named(self):
        def raw(x, seed):
            shape = tf.shape(x)
            return tf.raw_ops.StatelessRandomNormal(
                shape=shape, seed=pair(seed)
            )

        with self.assertWarnsRegex(UserWarning, "by a constant seed"):
            drawn({"": raw}, X, TWO)
        with self.assertWarnsRegex(UserWarning, "a stream of its own"):
            (here, _), _ = drawn({"": raw}, X, TWO, generator())
        self.assertLen(np.unique(here[""], axis=0), len(X))

    def test_a_generator_of_tensorflow_s_is_named(self):
        generator = tf.random.Generator.from_seed(3)
        draw = lambda _, shape: generator.normal(shape)  # noqa: E731
        for function in (lambda x, s: draw(s, tf.shape(x)), looped(draw)):
            with self.assertWarnsRegex(UserWarning, "`tf.random.Generator`"):
                (here, _), _ = drawn({"": function}, X, TWO)
            self.assertLen(np.unique(here[""], axis=0), len(X))

    def test_axes_of_unknown_size_are_no_rows(self):
        def tokens(x, seed):
            y = keras.random.dropout(tf.reshape(x, [-1]), 0.5, seed=seed)
            return tf.reshape(y, tf.shape(x))

        model = Drawing({"": tokens}, generator())
        model(np.ones([4, 30], "float32"))

        @tf.function(input_signature=[tf.TensorSpec([None, None])])
        def call(x):
            return towers.build_towers(model, x, TWO).outputs[""]

        with self.assertWarnsRegex(UserWarning, "draws random numbers"):
            y = call(np.ones([4, 30], "float32"))
        self.assertLen(np.unique(y, axis=0), 4)

    def test_a_generator_of_a_function_is_a_stream_of_each_tower(self):
        class Kept(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.seed = generator()

            def call(self, x):
                noise = keras.random.uniform(keras.ops.shape(x), seed=self.seed)
                return x + kept(x, tf.cast(self.seed.next(), tf.int32)) + noise

        model = keras.Sequential([keras.Input([2]), Kept(name="noisy")])
        model(np.ones_like(X))
        model.layers[0].seed.state.assign([3, 0])
        with self.assertWarnsRegex(UserWarning, "'noisy' draws .*tf.function"):
            graph = towers.build_towers(model, np.ones_like(X), THREE)
            graph.apply_updates()
        self.assertLen(np.unique(graph.outputs, axis=0), len(X))
        np.testing.assert_array_equal(model.layers[0].seed.state, [3, 2])

    @parameterized.parameters("quick_start", "jit_compile")
    @pytest.mark.slow(after=1)
    def test_so_it_is_in_towers_that_are_called(self, how):
        some = ("dropout", "several", "noise", "last")
        functions = {name: ROWS[name] for name in some}
        self.same(functions, X, THREE, generator, **{how: True})

    def test_copies_of_a_tower_have_rows_of_their_own(self):
        keras_own = keras.layers.Lambda(
            tf.nn.experimental.stateless_dropout,
            arguments={"rate": 0.5, "seed": SEED},
        )
        by_users = keras.layers.Lambda(ROWS["noise"], arguments={"s": 3})
        for layer in (keras_own, by_users):
            model = keras.Sequential([keras.Input([2]), layer])
            x = np.ones([8, 2], "float32")
            graph = towers.build_towers(model, x, FOUR)
            np.testing.assert_allclose(graph.outputs, model(x), rtol=1e-6)

    def test_the_seed_of_a_program_counts_too(self):
        functions = {
            "rows": lambda x, s: tf.random.normal(tf.shape(x)),
            "looped": looped(lambda _, n: tf.random.normal(n)),
            "one": lambda x, s: 0 * x + tf.random.normal([2]),
        }
        tf.random.set_seed(1)
        self.addCleanup(tf.random.set_seed, None)
        for quickly in (False, True):
            with self.assertWarnsRegex(UserWarning, "with a state"):
                (here, _), _ = drawn(functions, X, THREE, quick_start=quickly)
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
                keras.layers.Lambda(ROWS["dropout"], arguments={"s": 3}),
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
        functions = {"rows": ROWS["noise"], "one": ONE["stateless"]}
        (first, second), _ = plainly(functions, X, generator())
        model = Drawing(functions, generator())
        model(X)
        model.seed.state.assign([3, 0])
        with tf.Graph().as_default():
            graph = towers.build_towers(model, tf.constant(X), THREE)
            with tf.compat.v1.Session() as session:
                session.run(tf.compat.v1.global_variables_initializer())
                for plain in (first, second):
                    here = session.run(graph.outputs)
                    for name in plain:
                        np.testing.assert_allclose(
                            here[name], plain[name], rtol=1e-6
                        )

    def test_what_is_computed_again_is_drawn_again(self):
        def again(x):
            return tf.recompute_grad(lambda x: x * ROWS["dropout"](x, 3))(x)

        def slope(call):
            x = tf.constant(X)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = call(x)
            return tape.gradient(y, x)

        noise = ROWS["noise"]
        model = Drawing({"": lambda x, s: noise(x, s) + again(x)}, 3)
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

    @parameterized.parameters((8, 4), (7, 13))
    def test_a_draw_takes_few_ops_more(self, width, most):
        def ops(placement):
            model = keras.Sequential(
                [keras.Input([width])]
                + [keras.layers.Dropout(0.5) for _ in range(4)]
            )

            @tf.function(input_signature=[tf.TensorSpec([None, width])])
            def call(x):
                return towers.build_towers(model, x, placement, True).outputs

            ops = call.get_concrete_function().graph.get_operations()
            return len(
                [
                    op
                    for op in ops
                    if "tower_0/dropout" in op.name
                    and op.type not in ("Const", "NoOp")
                ]
            )

        alone, here = ops(towers.Placement(["/CPU:0"])), ops(TWO)
        self.assertBetween((here - alone) / 4, 1, most)

    def test_where_a_tower_is_travels_with_the_seeds(self):
        def sent(rate):
            layers = [keras.layers.GaussianNoise(rate) for _ in range(2)]
            scaled = keras.layers.Rescaling(2.0)
            model = keras.Sequential([keras.Input([4]), scaled, *layers])
            where = towers.Placement(["/CPU:1", "/CPU:2"])

            @tf.function(input_signature=[tf.TensorSpec([None, 4])])
            def step(x):
                graph = towers.build_towers(model, x, where, True)
                graph.apply_updates()
                return graph.outputs

            return len(Executed(lambda: step(tf.ones([5, 4]))).sends())

        # A tensor to each tower; seeds move on at home.
        self.assertEqual(sent(0.5) - sent(0.0), 2)

    def test_a_model_is_asked_once_and_nothing_shows_it(self):
        some = {"dropout": ROWS["dropout"], "one": ONE["stateless"]}
        none = {"none": lambda x, s: tf.tanh(x)}
        alone = towers.Placement(["/CPU:0"])
        for functions, placement, asked in (
            (some, THREE, 1),
            (some, alone, 0),
            (none, THREE, 0),  # it has a generator, and does not draw
        ):
            model = Drawing(functions, generator())
            model(X)
            calls, n = [], len(placement.devices)
            for _ in range(2):
                before = len(model.traces)
                towers.build_towers(model, X, placement, merge="none")
                calls.append(len(model.traces) - before)
            self.assertEqual(calls, [n + asked, n])
            self.assertEqual(model.calls, 1 + 2 * n)
