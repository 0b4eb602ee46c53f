"""tf_autograph: it converts the user's functions, and nothing of towers."""

import inspect
import pathlib
import re
import sys
import traceback

import keras
import tensorflow as tf
from absl.testing import absltest
from models import close, placement

import towers

layers = keras.layers


def converted(call):
    """The names of the functions that a call has autograph convert."""
    before = set(sys.modules)
    call()
    sources = [
        pathlib.Path(module.__file__).read_text()
        for name, module in list(sys.modules.items())
        if name not in before and name.startswith("__autograph_generated")
    ]
    return {
        x for source in sources for x in re.findall(r"def tf__(\w+)", source)
    }


class Branching(layers.Layer):
    """Autograph leaves layers alone, but not what they give to `tf.map_fn`."""

    def call(self, x):
        def positive(row):
            if tf.reduce_sum(row) > 0:
                row = row * 2.0
            return row

        return tf.map_fn(positive, x)


def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input([3]), layers.Dense(3), Branching()])


def branch(model, x):
    y = model(x)
    if tf.reduce_sum(y) > 0:
        y = y * 2.0
    else:
        y = y - 1.0
    return y


def meet(model, x):
    return model["m"](branch(model["m"], x))


meet.needs_all_towers = True


class ConvertedTest(absltest.TestCase):
    def test_nothing_of_towers_is_converted_by_any_public_function(self):
        m, where = model(), placement(3)
        wrapped = towers.TowerModel(model(), where)
        wrapped.compile("sgd", "mse")

        @tf.function
        def mine(x):
            with tf.GradientTape() as tape:
                graph = towers.build_towers(m, x, where, training=True)
                graph.apply_updates()
                loss = tf.reduce_sum(graph.outputs)
            gradients = tape.gradient(loss, m.trainable_variables)
            shards = towers.split_batch(x, where)
            y = towers.gather_outputs(shards, where, "concat")
            mean = towers.average_gradients([gradients] * 3)
            assert graph.towers[0].index == 0
            towers.Placement.cpus(2)
            towers.balanced(["/CPU:0"])
            towers.round_robin(["/CPU:0"])
            wrapped.compute_mask(x, None)
            return y, mean, wrapped(x), wrapped.train_step((x, x))

        names = converted(lambda: mine(tf.ones([4, 3])))
        self.assertEqual(names - {"positive"}, {"mine"})

    def test_each_public_function_and_method_is_marked(self):
        mark = vars(tf.autograph.experimental.do_not_convert(lambda: None))
        mark = set(mark) - {"__wrapped__"}
        self.assertNotEmpty(mark)
        for name in towers.__all__:
            public = getattr(towers, name)
            functions = [public]
            if inspect.isclass(public):
                functions = [
                    getattr(public, x)
                    for x in dir(public)
                    if (not x.startswith("_") or x == "__call__")
                    and inspect.isroutine(getattr(public, x))
                ]
            for function in functions:
                module = getattr(function, "__module__", None) or ""
                if module.startswith("towers."):
                    self.assertContainsSubset(mark, dir(function), function)
                    self.assertTrue(function.__doc__ or module, name)

    def test_signatures_and_docstrings_stay(self):
        names = list(inspect.signature(towers.build_towers).parameters)
        self.assertEqual(names[:3], ["model", "inputs", "placement"])
        self.assertStartsWith(towers.build_towers.__doc__, "Computes a Keras")
        self.assertFalse(hasattr(towers.build_towers, "__wrapped__"))


class UserTest(absltest.TestCase):
    def test_a_tower_fn_may_branch_on_tensors(self):
        m = model()
        for tower_fn, given in ((branch, m), (meet, {"m": m})):

            @tf.function
            def mine(x, tower_fn=tower_fn, given=given):
                return towers.build_towers(
                    given, x, placement(3), tower_fn=tower_fn
                ).outputs

            @tf.function
            def plain(x, tower_fn=tower_fn, given=given):
                return tf.concat(
                    [tower_fn(given, x[i : i + 1]) for i in range(3)], 0
                )

            x = tf.constant(
                [[1.0, 2.0, 3.0], [-1.0, 0.0, -3.0], [0.3, 9.0, 1.0]]
            )
            close(mine(x), plain(x))

    def test_a_function_of_all_towers_may_branch_on_tensors(self):
        def scaled(v):
            if tf.reduce_sum(v) > 0:
                v = v * 3.0
            return tf.reduce_mean(v, 0)

        def asking(model, x):
            return x + towers.all_towers(scaled, x)

        asking.needs_all_towers = True
        m = model()

        @tf.function
        def mine(x):
            return towers.build_towers(
                m, x, placement(3), tower_fn=asking
            ).outputs

        x = tf.ones([4, 3])
        close(mine(x), 4.0 * x)
        close(mine(-x), -2.0 * x)

    def test_a_step_of_the_template_s_own_may_branch_on_tensors(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(1, kernel_initializer="ones")

            def call(self, x):
                return self.dense(x)

            def test_step(self, data):
                total = tf.reduce_sum(self(data))
                if total > 0:
                    total = total * 2.0
                return {"total": total}

        x = tf.ones([4, 3])
        plain, towered = Own(), towers.TowerModel(Own(), placement(2))
        results = []
        for m in (plain, towered):
            m.compile("sgd", "mse")
            m(x)

            @tf.function
            def step(x, m=m):
                return m.test_step(x)["total"]

            results.append(step(x))
        close(results[1], results[0])

    def test_without_autograph_nothing_is_converted(self):
        m = keras.Sequential([keras.Input([3]), layers.Dense(3)])

        @tf.function(autograph=False)
        def mine(x):
            return towers.build_towers(
                m, x, placement(2), tower_fn=branch
            ).outputs

        with self.assertRaisesRegex(Exception, "AutoGraph|autograph"):
            mine(tf.ones([4, 3]))

    def test_an_error_points_at_the_user_s_line(self):
        def broken(model, x):
            return tf.matmul(x, x[:, :2])  # the line

        m = model()

        @tf.function
        def mine(x):
            return towers.build_towers(
                m, x, placement(2), tower_fn=broken
            ).outputs

        with self.assertRaises(ValueError) as caught:
            mine(tf.ones([8, 3]))
        words = "".join(traceback.format_exception(caught.exception))
        self.assertIn("# the line", words)
        self.assertNotIn("ag__.", words)
