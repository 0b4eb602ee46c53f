"""copies: what is copied is what would have been built."""

import functools
import re
from unittest import mock

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from same import step_of, towered_step

import towers
from towers.engine import boundary, copies
from towers.engine.copies import Maker

layers = keras.layers
N, ROWS = 3, 6  # one tower is copied, of rows that are as many in each


class Counted(layers.Layer):
    """Counts how often it is called in a tower, in Python.

    Not as part of the plain model, nor when that is asked for shapes.
    """

    calls = 0

    def call(self, x):
        scope = tf.compat.v1.get_default_graph().get_name_scope()
        type(self).calls += "tower_" in scope
        return tf.nn.softplus(x) * x


class Numbered(Counted):
    """Another op at each call."""

    def call(self, x):
        type(self).calls += 1
        return x * float(type(self).calls)


class AtHome(Counted):
    """Says itself where it runs."""

    def call(self, x):
        with tf.device("/CPU:0"):
            return super().call(tf.tanh(x))


class Drawn(Counted):
    """Has an op with a seed of its own."""

    def call(self, x):
        return super().call(x) + tf.random.uniform(tf.shape(x))


class Clipped(Counted):
    """Has a gradient of its own."""

    def call(self, x):
        @tf.custom_gradient
        def clipped(x):
            return x * 3.0, lambda g: tf.clip_by_value(g * x, -0.1, 0.1)

        return clipped(super().call(x))


class Looped(Counted):
    def call(self, x):
        return tf.while_loop(
            lambda i, x: i < 3,
            lambda i, x: (i + 1, tf.sin(x)),
            (0, super().call(x)),
        )[1]


class Outside(Counted):
    """Takes a tensor of the graph that the towers are in."""

    seen = 1.0

    def call(self, x):
        return super().call(x) * self.seen


def at_home(x):
    with tf.device("/CPU:0"):
        return tf.tanh(x)


def with_layer(layer):
    layer.calls = 0
    keras.utils.set_random_seed(3)
    return models.chain(
        [4],
        layers.Dense(5, activation="tanh", name="before"),
        layers.BatchNormalization(name="norm"),
        layer(name="layer"),
        layers.Dropout(0.3, seed=2, name="drop"),
        layers.Dense(3, name="after"),
    )


def towered(model, n=N, graphs=None):
    def call(x, training):
        graph = towers.build_towers(
            model, x, models.placement(n), training=training
        )
        if graphs is not None:
            graphs.append(graph)
        return graph.outputs

    return call


def compiled(step, rows_known):
    rows = [ROWS if rows_known else None, 4]
    signature = [tf.TensorSpec(rows, tf.float32)]
    return tf.function(step, input_signature=signature)


def check_same(model, step_of_call, rows_known, tolerance=1e-5, eager=True):
    """That a step with towers gives what it gives with the plain model."""
    x = tf.random.normal([ROWS, 4])
    plain = step_of_call(lambda x, training: model(x, training=training))
    plain = plain if eager else compiled(plain, rows_known)
    with mock.patch.object(
        boundary, "differentiated", wraps=boundary.differentiated
    ) as backward:
        actual = compiled(step_of_call(towered(model)), rows_known)(x)
    models.close(actual, plain(x), tolerance)
    return backward.call_count


@functools.cache
def traced(rows_known):
    """A training step of towers that are copied; how often a layer was called."""
    model = with_layer(Counted)
    Counted.calls = 0
    spec = tf.TensorSpec([ROWS if rows_known else None, 4])
    step = towered_step(model, models.placement(N), spec, inputs=True)
    step.get_concrete_function()
    return step, Counted.calls


class CopyTest(parameterized.TestCase):
    def check(self, layer, rows_known):
        training = not rows_known
        model = with_layer(layer)
        model.get_layer("drop").rate = 0.0
        model.get_layer("norm").trainable = False  # or it has other moments

        def step_of_call(call):
            def step(x):
                # A tensor of this graph.
                layer.seen = 2.0 + 0.0 * tf.reduce_sum(x)
                outputs = lambda x: (call(x, training), [])  # noqa: E731
                return step_of(outputs, model, inputs=True)(x)

            return step

        layer.calls = 0
        backwards = check_same(model, step_of_call, rows_known)
        # Only what has nothing of its own is copied, once two came out alike.
        if layer is not Outside:
            self.assertEqual(layer.calls, 2 if layer is Counted else N)
        # Of towers that are alike, so are the gradients; one more is of gather.
        if layer is Counted:
            self.assertEqual(backwards, 1 + 1)
        elif layer is not Outside:
            self.assertGreaterEqual(backwards, 2 + 1)

    @parameterized.parameters(
        (Counted, True),
        (Counted, False),
        (Clipped, False),
        (Looped, True),
        (AtHome, False),
        (Outside, False),
    )
    def test_as_few_are_built_as_can_be_with_the_plain_numbers(
        self, layer, rows_known
    ):
        self.check(layer, rows_known)

    @parameterized.parameters(
        (Clipped, True), (Looped, False), (AtHome, True), (Outside, True)
    )
    @pytest.mark.rare
    def test_and_whether_rows_are_known_or_not(self, layer, rows_known):
        self.check(layer, rows_known)

    def test_copies_hold_what_is_needed_and_each_thing_once(self):
        class Wasteful(Counted):
            def call(self, x):
                tf.cos(x)  # nobody asks for it
                same = tf.tanh(x * 3.0) + tf.tanh(x * 3.0)
                return super().call(x) * 3.0 + same

        model = with_layer(Wasteful)
        spec = tf.TensorSpec([None, 4])
        step = towered_step(model, models.placement(N), spec, inputs=True)
        ops = step.get_concrete_function().graph.get_operations()
        towers_ops = [
            [op for op in ops if op.name.startswith(f"tower_{i}/")]
            for i in range(N)
        ]
        cosines = [sum(op.type == "Cos" for op in x) for x in towers_ops]
        self.assertEqual(cosines, [1, 1, 0])
        tanhs = [
            sum("/layer/Tanh" in op.name and op.type == "Tanh" for op in x)
            for x in towers_ops
        ]
        self.assertEqual(tanhs, [2, 2, 1])
        twice = []
        for each in towers_ops:
            constants = [
                op.get_attr("value").SerializeToString(deterministic=True)
                for op in each
                if op.type == "Const"
            ]
            self.assertNotEmpty(constants)
            twice.append(len(constants) > len(set(constants)))
        self.assertEqual(twice, [True, True, False])

    def test_copies_leave_out_what_moments_tell(self):
        """Keras's own moving statistics, which are those of a shard only."""
        step, calls = traced(rows_known=False)
        self.assertEqual(calls, 2)
        ops = step.get_concrete_function().graph.get_operations()
        sums = [
            sum(
                f"tower_{i}/norm/" in op.name and op.type.startswith("Add")
                for op in ops
            )
            for i in range(N)
        ]
        self.assertEqual([sums[0] - n for n in sums], [0, 0, 2])

    @parameterized.parameters(0, 2)
    def test_gradients_from_above_may_be_one_or_several(self, where):
        a = keras.Input([4])
        b = layers.Dense(3, activation="tanh")(a)
        model = keras.Model(a, [layers.Dense(2)(b), layers.Dense(2)(b)])
        x = tf.random.normal([ROWS, 4])

        def gradients(pairs):
            with tf.GradientTape() as tape:
                loss = 0.0
                for i, (y, z) in enumerate(pairs()):
                    one = y + z if i == where else 3.0 * y + tf.sin(z)
                    loss += tf.reduce_sum(one)
            return tape.gradient(loss, model.trainable_variables)

        @tf.function
        def actual(x):
            def pairs():
                graph = towers.build_towers(model, x, models.placement(N))
                return [tower.outputs for tower in graph.towers]

            return gradients(pairs)

        expected = gradients(lambda: [model(x) for x in tf.split(x, N)])
        models.close(actual(x), expected)

    @parameterized.named_parameters(
        ("alone", lambda x, other: tf.sin(x), True),
        ("outside", lambda x, other: x + other, False),
        ("passed_on", lambda x, other: [tf.sin(x), other], False),
        ("random", lambda x, other: x * tf.random.uniform([]), False),
        ("elsewhere", lambda x, other: at_home(x), False),
    )
    def test_one_is_enough_only_if_it_stands_alone(self, function, enough):
        maker = Maker()
        with tf.Graph().as_default():
            other, parts = tf.zeros([2]), []
            for i in (1, 2):
                device = f"/job:localhost/replica:0/task:0/device:CPU:{i}"
                with tf.device(device), tf.name_scope(f"tower_{i}") as scope:
                    x = tf.ones([2])
                    parts.append(
                        maker.make(
                            lambda x=x: function(x, other),
                            [x],
                            device,
                            scope,
                            determined=True,
                        )
                    )
        self.assertEqual([x.copied for x in parts], [False, enough])

    @parameterized.named_parameters(
        ("keras_s_own", "tanh", models.DEVICES[:3], 1),
        ("on_one_device", "tanh", ["/CPU:1"] * 3, 1),
        ("a_function_of_one_s_own", lambda x: tf.tanh(x), models.DEVICES, 2),
        ("another_device_type", "tanh", ["/CPU:0", "/CPU:1", "/GPU:0"], 2),
    )
    def test_of_keras_s_own_layers_one_tower_is_built(
        self, activation, devices, built
    ):
        model = models.chain([4], layers.Dense(3, activation=activation))
        where = towers.Placement(devices, available="any")

        def call(x):
            return towers.build_towers(model, x, where).outputs

        with mock.patch.object(
            layers.Dense, "call", autospec=True, side_effect=layers.Dense.call
        ) as calls:
            call = tf.function(call, autograph=False)
            specs = call.get_concrete_function(tf.TensorSpec([None, 4]))
        self.assertEqual(calls.call_count, built)
        for i, device in enumerate(devices):
            ops = {
                op.device
                for op in specs.graph.get_operations()
                if op.name.startswith(f"tower_{i}/")
            }
            self.assertLen(ops, 1)
            self.assertIn(device[1:], ops.pop())

    def test_what_differs_from_tower_to_tower_is_built(self):
        model = models.chain([2], Numbered())
        Numbered.calls = 0
        x = tf.ones([4, 2])
        outputs = tf.function(towered(model, 4))(x, None)
        self.assertEqual(outputs[:, 0].numpy().tolist(), [1, 2, 3, 4])

    @parameterized.parameters(
        (tf.identity, 0, True),
        (tf.identity, 3, False),
        (tf.nn.silu, 0, False),  # this has a gradient of its own
        (tf.nn.silu, 3, True),
    )
    def test_gradients_of_what_differs_are_built(self, also, other, backwards):
        class Odd(Counted):
            def call(self, x):
                type(self).calls += 1
                odd = self.calls == 1 + other
                return also(tf.tanh(x) if odd else tf.sin(x))

        model = models.chain([2], Odd())
        Odd.calls = 0
        x = tf.random.normal([4, 2])

        @tf.function
        def actual(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                graph = towers.build_towers(model, x, models.placement(4))
                parts = [tower.outputs for tower in graph.towers]
                y = tf.concat(parts[:: -1 if backwards else 1], 0)
            return tape.gradient(y, x), y[:: -1 if backwards else 1]

        def plain(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                parts = tf.split(x, 4)
                odd = other if Odd.calls > other else None  # not if copied
                y = tf.concat(
                    [
                        also(tf.tanh(z) if i == odd else tf.sin(z))
                        for i, z in enumerate(parts)
                    ],
                    0,
                )
            return tape.gradient(y, x), y

        models.close(actual(x), plain(x))

    def test_each_tower_draws_numbers_of_its_own(self):
        tf.random.set_seed(None)
        model = models.chain([2], Drawn())
        outputs = tf.function(towered(model, 4))(tf.zeros([4, 2]), None)
        self.assertLen(set(outputs[:, 0].numpy().tolist()), 4)

    @parameterized.parameters(None, 8)
    def test_copies_draw_their_own_rows_of_the_plain_dropout(self, rows):
        def model():
            dropout = layers.Dropout(0.5)
            return models.chain([63], dropout, dropout)

        x, plain, here = (
            tf.ones([8, 63]),
            models.make(model),
            models.make(model),
        )

        @tf.function(input_signature=[tf.TensorSpec([rows, 63])])
        def step(x):
            graph = towers.build_towers(
                here, x, models.placement(4), training=True
            )
            graph.apply_updates()
            return graph.outputs

        with mock.patch.object(copies, "_copy", wraps=copies._copy) as copied:
            step.get_concrete_function()
        self.assertEqual(copied.call_count, 3)
        for _ in range(2):
            np.testing.assert_array_equal(step(x), plain(x, training=True))

    def test_what_a_model_took_when_it_was_made_is_one_for_all(self):
        def model():
            x = keras.Input([16, 16])
            # An eager tensor, too large to be embedded as a constant.
            places = layers.Embedding(16, 16)(keras.ops.arange(16))
            return keras.Model(x, layers.Dense(16)(x) + places)

        plain, here = models.make(model), models.make(model)
        step = tf.function(
            lambda x: towers.build_towers(here, x, models.placement(4)).outputs
        )
        with mock.patch.object(copies, "_copy", wraps=copies._copy) as copied:
            x = tf.ones([8, 16, 16])
            models.close(step(x), plain(x))
        self.assertEqual(copied.call_count, 2)  # of two that are alike

    def test_shards_of_other_shapes_are_not_copied(self):
        model = with_layer(Counted)
        Counted.calls = 0
        graphs = []
        x = tf.random.normal([10, 4])
        outputs = tf.function(towered(model, 4, graphs))(x, False)
        models.close(outputs, model(x, training=False))
        shapes = [tower.outputs.shape.as_list() for tower in graphs[0].towers]
        self.assertEqual(shapes, [[2, 3], [3, 3], [2, 3], [3, 3]])
        self.assertEqual(Counted.calls, 4)

    @parameterized.named_parameters(("known", True), ("unknown", False))
    def test_copies_run_on_their_towers_by_their_names(self, rows_known):
        step, calls = traced(rows_known)
        self.assertEqual(calls, 2)
        executed = Executed(lambda: step(tf.random.normal([ROWS, 4])))
        for i in range(N):
            for op in ("MatMul", "Softplus$", "TanhGrad", "RsqrtGrad"):
                devices = executed.devices(f"tower_{i}/", op)
                self.assertEqual(devices, {f"/CPU:{i}"}, op)
        names = [
            {
                re.sub(r"gradients_\d+", "gradients", name).replace(
                    f"tower_{i}/", "tower/"
                )
                for device, name, node in executed.nodes
                if f"tower_{i}/" in name
                and re.search("MatMul|Softplus", node.op)
            }
            for i in range(N)
        ]
        self.assertEqual(names[1:], names[:1] * (N - 1))
        self.assertContainsSubset(
            ["tower/layer/Softplus", "tower/after/BiasAdd"],
            {re.sub(".*(?=tower/)", "", name) for name in names[0]},
        )


def outputs_of(call):
    """A function of its input, smooth and with nothing linear in it."""
    return lambda x: tf.reduce_sum(tf.sin(call(x, False)), -1)


def by_tapes(f, x, variables):
    """Second and third derivatives."""
    with tf.GradientTape() as outmost:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                for tape in (outmost, outer, inner):
                    tape.watch(x)
                y = f(x)
            slope = inner.gradient(y, x)
            size = tf.reduce_sum(slope**2)
        curves = outer.gradient(size, variables[:-1])
        size = sum(tf.reduce_sum(c**2) for c in curves)
    return slope, curves, outmost.gradient(size, [x, *variables[:-1]])


def by_a_persistent_tape(f, x, variables):
    """Gradients that are taken while the tape goes on."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = f(x)
        slope = tape.gradient(y, x)
        size = tf.reduce_sum(slope**2)
    return slope, tape.gradient(size, [x, *variables[:-1]])


def by_the_graph(f, x, variables):
    """As programs of TensorFlow 1 do it."""
    (slope,) = tf.compat.v1.gradients(f(x), x)
    return slope, tf.compat.v1.gradients(tf.reduce_sum(slope**2), x)


def forwards(f, x, variables):
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        y = f(x)
    return accumulator.jvp(y)


def jacobian(f, x, variables):
    with tf.GradientTape(persistent=True) as tape:
        y = f(x)
    return tape.jacobian(y, variables[0].value, experimental_use_pfor=False)


class DerivativeTest(parameterized.TestCase):
    @parameterized.parameters(
        (by_tapes, False),
        (by_a_persistent_tape, False),
        (by_the_graph, True),
        (forwards, False),
        (jacobian, True),
    )
    @pytest.mark.slow(after=2)
    def test_derivatives_of_any_order(self, way, rows_known):
        keras.utils.set_random_seed(3)
        model = models.chain([4], layers.Dense(3), Counted(), layers.Dense(2))

        def step_of_call(call):
            variables = model.trainable_variables
            return lambda x: way(outputs_of(call), x, variables)

        eager = way is not by_the_graph
        check_same(model, step_of_call, rows_known, 1e-4, eager)
