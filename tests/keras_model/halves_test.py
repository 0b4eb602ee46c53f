"""halves: under mixed precision weights cross as towers compute with them.

Expected are the numbers of towers that are given weights as they are, bit for bit.
"""

import contextlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from two_machines import between_machines, in_machines

import towers
from towers.keras_model import halves, reads, tower

layers, ops, v1 = keras.layers, keras.ops, tf.compat.v1
HOME = "/CPU:3"
THREE = ["/CPU:0", "/CPU:1", "/CPU:1"]  # the last two share a device
INPUTS = "inputs of the model"
BFLOAT16, FLOAT16 = "mixed_bfloat16", "mixed_float16"


class Own(layers.Layer):
    """A layer of a weight `k` [n, n], of which a function makes something.

    Args:
      function: of the layer and its inputs.
    """

    def __init__(self, function, **kwargs):
        super().__init__(name=function.__name__, **kwargs)
        self.function = function

    def build(self, shape):
        penalty = "l2" if self.function is in_a_penalty else None
        self.k = self.add_weight(
            shape=(shape[-1], shape[-1]), name="k", regularizer=penalty
        )

    def call(self, x):
        return self.function(self, x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


def by_autocast(layer, x):
    return x @ layer.k.value


def before_all(layer, x):
    """Once, whatever is made of it."""
    k = tf.convert_to_tensor(layer.k)
    return x @ k + tf.reduce_sum(k * k, 0)


def by_rows(layer, x):
    """Its gradient is sparse."""
    return x + tf.gather(layer.k, tf.cast(tf.abs(x[:, 0]), tf.int32) % 4)


def outside(layer, x):
    def full(x):
        return tf.cast(x, tf.float32) @ layer.k.value

    return tf.cast(layers.Lambda(full, dtype="float32")(x), x.dtype)


def twice(layer, x):
    return (x @ layer.k.value) @ tf.transpose(layer.k.value)


def in_a_function(layer, x):
    return tf.function(lambda x: x @ layer.k.value, autograph=False)(x)


def in_a_branch(layer, x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ layer.k.value, lambda: x)


def assigned(layer, x):
    layer.k.assign(layer.k * 0.99)
    return x @ layer.k.value


def on_a_tape(layer, x):
    """What a layer gets for a gradient is as wide as the variable."""
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(tf.cast(tf.tanh(x @ layer.k.value), tf.float32))
    gradient = tape.gradient(y, layer.k)
    assert gradient.dtype == tf.float32
    return x + tf.cast(tf.reduce_sum(gradient, 0), x.dtype)


def anew(layer, x):
    return tf.recompute_grad(lambda x: tf.tanh(x @ layer.k.value))(x)


def in_a_penalty(layer, x):
    """Keras reads it past autocast."""
    return x + tf.cast(tf.add_n(layer.losses), x.dtype)


def backward_too(layer, x):
    """A gradient of a user's own may read what it likes."""

    @tf.custom_gradient
    def function(x):
        def backward(upstream):
            full = layers.Lambda(
                lambda x: x * tf.reduce_sum(layer.k.value), dtype="float32"
            )
            return tf.cast(full(tf.cast(upstream, tf.float32)), x.dtype)

        return tf.identity(x), backward

    return function(x @ layer.k.value)


# What crosses in half, and what does not.
ONCE = [by_autocast, before_all, by_rows]
OTHERWISE = [
    *(outside, twice, in_a_function, in_a_branch, assigned, on_a_tape, anew),
    in_a_penalty,
]


def dense():
    """With a regulariser that takes nothing but float32, and a head of it."""

    def full(k):
        return 0.01 * tf.reduce_sum(tf.square(k) + tf.ones(k.shape))

    return [
        keras.Input([4]),
        layers.Dense(200, activation="relu", kernel_regularizer=full),
        layers.Dropout(0.5),
        layers.Dense(120),
        layers.Dense(3, dtype="bfloat16"),
        layers.Dense(2, dtype="float32", name="head"),
    ]


def convolutions():
    return [
        keras.Input([6, 6, 2]),
        layers.Conv2D(4, 3, activation="relu"),
        layers.BatchNormalization(name="norm"),
        layers.SeparableConv2D(4, 3),
        layers.Flatten(),
        layers.Dense(2),
    ]


def attention():
    x = keras.Input([6, 4])
    y = layers.MultiHeadAttention(2, 4)(x, x)
    y = layers.LayerNormalization(name="norm")(x + y)
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(y)))


def recurrent():
    return [
        keras.Input([5, 3]),
        layers.LSTM(4, name="cell"),
        layers.Dense(2),
    ]


def frozen():
    model = dense()
    model[1].trainable = False
    return model


def own(*functions):
    return lambda: [keras.Input([4]), *map(Own, functions), layers.Dense(2)]


def make(factory, policy=BFLOAT16):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    try:
        model = factory()
        return keras.Sequential(model) if isinstance(model, list) else model
    finally:
        keras.config.set_dtype_policy(before)


def batch(model, rows=7):
    rng = np.random.default_rng(0)
    shape = [rows, *model.input_shape[1:]]
    y = rng.normal(size=[rows, 2]).astype("float32")
    return rng.normal(size=shape).astype("float32"), y


def placement(devices=THREE, **kwargs):
    places = {"parameter_device": HOME, "output_device": HOME, **kwargs}
    return towers.Placement(devices, **places)


def scaled():
    """Its first steps overflow."""
    sgd = keras.optimizers.SGD(0.05)
    return keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**18)


def trained(factory, policy=BFLOAT16, jit=False, optimizer=None, **kwargs):
    """A report of a step, and the model after five."""
    model = make(factory, policy)
    towered = towers.TowerModel(model, placement(), **kwargs)
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    towered.compile(optimizer() if optimizer else sgd, "mse", jit_compile=jit)
    x, y = batch(model)
    report = towers.execution_report(towered.train_on_batch, x, y)
    for _ in range(4):
        towered.train_on_batch(x, y)
    return report, model


@contextlib.contextmanager
def full():
    """While open, all weights and inputs cross as they are."""
    with mock.patch.object(tower, "halves_of", lambda *_: halves.Halves()):
        yield


def both(function, *args, **kwargs):
    """What it gives, and what it gives of weights as they are."""
    with full():
        expected = function(*args, **kwargs)
    return function(*args, **kwargs), expected


class HalvesTest(parameterized.TestCase):
    @parameterized.parameters(
        (dense, ["head", "dense_2/"]),
        (own(*ONCE, *OTHERWISE), [f.__name__ for f in OTHERWISE]),
        (convolutions, ["norm"]),
        (attention, ["norm", INPUTS]),
        (recurrent, ["cell"]),
        (frozen, ["head", "dense_2/"]),
        (own(backward_too), ["", INPUTS]),
        (dense, ["head", "dense_2/"], {"quick_start": True}),
        (dense, ["head", "dense_2/"], {"loss_on_towers": True}),
        (dense, ["head", "dense_2/"], {"jit": True}),
        (dense, ["head", "dense_2/"], {"policy": FLOAT16, "optimizer": scaled}),
    )
    @pytest.mark.rare(after=1)
    def test_of_each_weight_all_bytes_cross_or_half_of_them(
        self, factory, whole, options=()
    ):
        """By how it is read; and all numbers are as they were.

        Args:
          made: a factory of a model.
          whole: parts of paths, of weights that cross as they are, and INPUTS, if
            they do.
          options: of the model's towers.
        """
        keras.backend.clear_session()  # names of layers are counted anew
        (report, model), (before, expected) = both(
            trained, factory, **dict(options)
        )
        self.assertEqual(
            [w.tolist() for w in model.get_weights()],
            [w.tolist() for w in expected.get_weights()],
        )
        self.assertEqual(report.total_bytes, report.least_bytes)
        down = up = 0
        for v in expected.variables:
            if v.dtype == "float32" and not any(x in v.path for x in whole):
                down += v.numpy().nbytes // 2
                # The gradient is of two rows, of a tower that has as many.
                back = v[:2] if "by_rows" in v.path else v.value
                up += back.numpy().nbytes // 2 * v.trainable
        # Of 7 rows 2 stay with the first tower, beside the batch.
        inputs = 5 * int(np.prod(model.input_shape[1:])) * 2
        # Towers that share a device send the sum of their gradients.
        saved = {
            ("/CPU:0", "/CPU:1"): inputs * (INPUTS not in whole),
            (HOME, "/CPU:0"): down,
            (HOME, "/CPU:1"): down,
            ("/CPU:0", HOME): up,
        }
        for pair, size in before.bytes_between.items():
            less = size - report.bytes_between[pair]
            self.assertEqual(less, saved.get(pair, 0), pair)

    @pytest.mark.filterwarnings("ignore:.*makes its outputs of all rows")
    def test_reads_tell_it_as_well_as_what_is_made_of_them(self):
        """As they do of a tower that is built, of which it is not asked."""
        results = []

        def noted(rehearsal, *args):
            result = halves.halves_of(rehearsal, *args)
            variables = rehearsal.graph.variables
            results.extend(
                variables[k].path.split("/")[-2] for k in result.weights
            )
            return result

        model = make(own(*ONCE, *OTHERWISE[:-1]))
        with (
            mock.patch.object(reads.Reads, "is_cast", lambda *_: True),
            mock.patch.object(tower, "halves_of", noted),
        ):
            x, _ = batch(model)
            towers.build_towers(model, x, placement()).apply_updates()
        once = [f.__name__ for f in ONCE]
        self.assertContainsSubset(once, results)
        self.assertNoCommonElements([f.__name__ for f in OTHERWISE], results)

    @pytest.mark.rare
    def test_another_machine_is_sent_half_and_says_the_sum(self):
        where = placement(["/CPU:1", "/CPU:2", "/CPU:1", "/CPU:0"])
        model = make(convolutions)
        x, _ = batch(model)

        def stepped():
            with in_machines():
                step = gradients_of(
                    lambda x: towers.build_towers(model, x, where)
                )
                report = towers.execution_report(step, model, x)
                return report, step(model, x)

        (report, result), (before, expected) = both(stepped)
        for g, e in zip(result, expected, strict=True):
            np.testing.assert_array_equal(g, e)
        half = sum(
            v.numpy().nbytes // 2
            for v in model.trainable_variables
            if "norm" not in v.path
        )
        after, before = between_machines(report), between_machines(before)
        half += 5 * x[0].nbytes // 2  # rows of the towers there
        self.assertEqual(before["a", "b"] - after["a", "b"], half)
        self.assertEqual(before["b", "a"], after["b", "a"])

    @parameterized.parameters(
        (lambda model, x: model(x), True),
        (lambda model, x: (model(x), tf.shape(x)), True),
        (lambda model, x: (model(x), x), False),
        (lambda model, x: model(x) + tf.cast(x[:, :2] * 3, tf.bfloat16), False),
    )
    @pytest.mark.slow(after=1)
    def test_an_input_that_is_taken_otherwise_crosses_as_it_is(
        self, tower_fn, narrow
    ):
        """What a tower and its caller see of it is exact, gradients too."""
        model = make(own(by_autocast))
        x, _ = batch(model, 6)
        sent = []

        def run():
            @tf.function
            def step(x):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    graph = towers.build_towers(
                        model, x, placement(), tower_fn=tower_fn, merge="none"
                    )
                    outputs = tf.nest.flatten(graph.outputs)
                    loss = tf.add_n(
                        [tf.reduce_sum(tf.cast(y, "float32")) for y in outputs]
                    )
                shown = [t.inputs for t in graph.towers]
                return outputs, tape.gradient(loss, x), shown

            report = towers.execution_report(step, tf.constant(x))
            parts = [t.dtype for t in report.transfers if t.holds == "batch"]
            sent.append({d for d in parts if d.is_floating})
            return tf.nest.flatten(step(tf.constant(x)))

        result, expected = both(run)
        for y, e in zip(result, expected, strict=True):
            np.testing.assert_array_equal(y, e)
        self.assertIn(tf.bfloat16 if narrow else tf.float32, sent[1])

    @pytest.mark.slow
    def test_a_session_has_them_too(self):
        model = make(recurrent)
        x, _ = batch(model)

        def run():
            config = v1.ConfigProto(device_count={"CPU": 4})
            with tf.Graph().as_default(), v1.Session(config=config) as session:
                graph = towers.build_towers(model, tf.constant(x), placement())
                loss = tf.reduce_mean(tf.cast(graph.outputs, tf.float32) ** 2)
                gradients = tf.gradients(loss, v1.trainable_variables())
                session.run(v1.global_variables_initializer())
                metadata = v1.RunMetadata()
                result = session.run(
                    gradients,
                    options=v1.RunOptions(output_partition_graphs=True),
                    run_metadata=metadata,
                )
                halves = [
                    node
                    for part in metadata.partition_graphs
                    for node in part.node
                    if node.op == "_Send"
                    and "replicate" in node.name
                    and node.attr["T"].type == tf.bfloat16.as_datatype_enum
                ]
                return result, len(halves)

        (result, sent), (expected, _) = both(run)
        for g, e in zip(result, expected, strict=True):
            self.assertEqual(g.dtype, np.float32)
            np.testing.assert_array_equal(g, e)
        self.assertEqual(sent, 3)  # to each device, and what one says alone

    @parameterized.parameters([[]], [["norm"]])  # alone, and in step
    @pytest.mark.rare(after=1)
    def test_a_tower_that_reads_otherwise_than_was_seen_is_built_anew(
        self, norms
    ):
        def by_tower(layer, x):
            y = x @ layer.k.value
            if "tower_1" in v1.get_default_graph().get_name_scope():
                y += tf.cast(tf.reduce_sum(layer.k.value), y.dtype)
            return y

        def factory():
            more = [layers.BatchNormalization(synchronized=True) for _ in norms]
            return [*own(by_tower)()[:2], *more, layers.Dense(2)]

        (report, model), (before, expected) = both(trained, factory)
        for w, e in zip(model.get_weights(), expected.get_weights()):
            np.testing.assert_array_equal(w, e)
        self.assertEqual(report.total_bytes, before.total_bytes)

    def test_parameters_that_are_handed_out_are_exact(self):
        model = make(dense)
        x, _ = batch(model)

        def handed_out():
            @tf.function
            def run(x):
                graph = towers.build_towers(model, x, placement())
                each = [
                    tf.gradients(tf.reduce_sum(t.outputs**2), t.parameters)
                    for t in graph.towers
                ]
                return [t.parameters for t in graph.towers], each

            return tf.nest.flatten(run(x))

        result, expected = both(handed_out)
        for x, e in zip(result, expected, strict=True):
            self.assertEqual(x.dtype, e.dtype)
            np.testing.assert_array_equal(x, e)

    def test_models_are_looked_at_once_and_only_if_it_matters(self):
        elsewhere, here = placement(), placement([HOME] * 2, input_device=HOME)
        asked = mock.Mock(wraps=halves.read_once)
        with mock.patch.object(halves, "read_once", asked):
            for policy, where, times in (
                ("float32", elsewhere, 0),
                (BFLOAT16, here, 0),  # nothing crosses
                (BFLOAT16, elsewhere, 1),
            ):
                model = make(recurrent, policy)
                towers.place_variables(model, where)
                x, _ = batch(model)
                asked.reset_mock()
                for _ in range(2):
                    towers.build_towers(model, x, where)
                self.assertEqual(asked.call_count, times)


def gradients_of(call):
    @tf.function
    def step(model, x):
        with tf.GradientTape() as tape:
            outputs = tf.cast(call(x).outputs, tf.float32)
            loss = tf.reduce_mean(outputs**2)
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    return lambda model, x: step(model, tf.constant(x))
