"""merge_rules: state that a layer keeps itself is the plain model's."""

import copy
import inspect
import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from warned import messages

import towers
from towers.keras_model import merge_rules

DEVICES = ["/CPU:0", "/CPU:1", "/CPU:2"]
UNEQUAL = towers.Placement(DEVICES, weights=[2, 1, 1])
# Name, rule, dtype and shape of the state of `Kept`.
STATE = [
    ("total", "sum", "float32", ()),
    ("count", "sum", "int32", ()),
    ("small", "sum", "uint8", ()),
    ("half", "sum", "float16", ()),
    ("calls", "sum", "int32", ()),
    ("top", "max", "float32", (3,)),
    ("floor", "min", "int64", ()),
    ("above", "max", "bool", ()),
    ("inside", "min", "bool", ()),
    ("mean", "mean", "float32", (3,)),
    ("row", "last", "float32", (3,)),
]


@keras.saving.register_keras_serializable("merge_rules_test")
class Kept(keras.layers.Layer):
    """State of each rule, of several dtypes."""

    def build(self, shape):
        for name, rule, dtype, shape in STATE:
            variable = self.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer="ones" if rule == "min" else "zeros",
                trainable=False,
            )
            setattr(self, name, variable)
            towers.merge_state_by(variable, rule)

    def call(self, x):
        ops = keras.ops
        rows = ops.shape(x)[0]
        self.total.assign_add(ops.sum(x))
        self.count.assign_add(rows)
        self.small.assign_add(ops.cast(rows, "uint8"))
        self.half.assign_add(ops.cast(rows, "float16"))
        self.calls.assign_add(1)  # the same in all towers: once
        # Not only ever larger: an empty tower must not keep the old value.
        self.top.assign(ops.max(x, 0))
        self.floor.assign(ops.cast(ops.min(x) * 100, "int64"))
        self.above.assign(ops.max(x) > 2.5)
        self.inside.assign(ops.max(x) < 2.5)
        self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, 0))
        self.row.assign(x[-1])
        return x


class Bare(keras.layers.Layer):
    """State that depends on rows, without a rule, and some that does not."""

    def build(self, shape):
        def state(name, dtype="float32"):
            return self.add_weight(
                name=name, dtype=dtype, initializer="zeros", trainable=False
            )

        self.seen, self.peak = state("seen"), state("peak", "int32")
        self.calls = state("calls", "int32")

    def call(self, x):
        self.seen.assign_add(keras.ops.sum(x))
        self.peak.assign(keras.ops.cast(keras.ops.max(x), "int32"))
        self.calls.assign_add(1)
        return x


def model(*layers):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input([3]), *layers, keras.layers.Dense(2)], name="model"
    )


def batch(rows):
    x = np.random.default_rng(rows).normal(size=[rows, 3]) * 2
    return x.astype("float32"), np.zeros([rows, 2], "float32")


RULE = "merge_state_by"


class MergeStateByTest(parameterized.TestCase):
    def check(self, towered, plain):
        self.assertEqual(len(towered.variables), len(plain.variables))
        for ours, theirs in zip(towered.variables, plain.variables):
            np.testing.assert_allclose(
                ours.numpy().astype("float64"),
                theirs.numpy().astype("float64"),
                atol=1e-5,
                err_msg=ours.path,
            )

    @parameterized.parameters(False, True)
    @pytest.mark.slow(after=1)
    def test_fit_keeps_the_plain_model_s_state(self, loss_on_towers):
        plain, template = model(Kept()), model(Kept())
        towered = towers.TowerModel(
            template, UNEQUAL, loss_on_towers=loss_on_towers
        )
        for trained in (plain, towered):
            trained.compile("sgd", "mse")
            # The last batch is of one row: two towers are empty.
            trained.fit(
                *batch(9), batch_size=4, epochs=2, shuffle=False, verbose=0
            )
        self.check(template, plain)
        self.assertGreater(int(template.layers[0].count), 0)

    @parameterized.parameters(1, 2, 6)
    def test_so_does_a_call_of_known_rows(self, rows):
        plain, towered = model(Kept()), model(Kept())
        plain(batch(rows)[0])
        towers.build_towers(
            towered, batch(rows)[0], towers.Placement(DEVICES)
        ).apply_updates()
        self.check(towered, plain)

    def test_a_tower_without_rows_says_nothing(self):
        class Peak(keras.layers.Layer):
            def build(self, shape):
                self.peak = self.add_weight(
                    name="peak", initializer="zeros", trainable=False
                )
                towers.merge_state_by(self.peak, "max")

            def call(self, x):
                self.peak.assign(keras.ops.mean(x))
                return x

        # The third is fed the last row, whose mean would be 5.
        placement = towers.Placement(DEVICES, weights=[1, 1, 0])
        model = keras.Sequential([keras.Input([1]), Peak()])
        x = tf.constant([[1.0], [1.0], [1.0], [5.0]])
        towers.TowerModel(model, placement)(x)
        self.assertEqual(float(model.layers[0].peak), 3.0)

    def test_so_do_update_ops_of_a_session(self):
        plain, towered = model(Kept()), model(Kept())
        plain(batch(3)[0])
        with tf.Graph().as_default():
            x = tf.compat.v1.placeholder(tf.float32, [None, 3])
            graph = towers.build_towers(towered, x, UNEQUAL)
            updates = tf.compat.v1.get_collection(
                tf.compat.v1.GraphKeys.UPDATE_OPS
            )
            with tf.compat.v1.Session() as session:
                session.run(tf.compat.v1.global_variables_initializer())
                session.run(updates, {x: batch(3)[0]})
                graph.copy_to_model(session)
        self.check(towered, plain)

    def test_the_rule_stays_with_the_variable(self):
        network = model(Kept())
        path = os.path.join(tempfile.mkdtemp(), "model.keras")
        network.save(path)
        rules = [rule for _, rule, _, _ in STATE]
        towered = towers.TowerModel(network, UNEQUAL)  # moves what can be moved
        for other in (
            network,
            copy.deepcopy(network),
            keras.models.clone_model(network),
            keras.models.load_model(path),
            copy.deepcopy(towered).template,
        ):
            results = [merge_rules.declared(v) for v in other.variables]
            self.assertEqual(results[: len(rules)], rules)
        one = copy.deepcopy(network.layers[0].top)
        self.assertEqual(merge_rules.declared(one), "max")

    def test_state_of_rows_without_a_rule_warns_once_by_name(self):
        towered = towers.TowerModel(model(Bare()), UNEQUAL)
        towered.compile("sgd", "mse")
        (warning,) = messages(lambda: towered.fit(*batch(6), verbose=0), RULE)
        self.assertRegex(warning, "'model/[^/]*/seen', 'model/[^/]*/peak' dep")
        self.assertNotIn("calls", warning)
        self.assertEmpty(
            messages(lambda: towered.evaluate(*batch(6), verbose=0), RULE)
        )

    def test_nothing_is_told_with_one_tower_or_all_rules(self):
        one = towers.Placement(["/CPU:0"])
        self.assertEmpty(
            messages(
                lambda: towers.TowerModel(model(Bare()), one)(batch(6)[0]), RULE
            )
        )
        x = batch(6)[0]
        self.assertEmpty(
            messages(lambda: towers.TowerModel(model(Kept()), UNEQUAL)(x), RULE)
        )

    def test_a_declared_rule_of_a_metric_goes_first(self):
        class Top(keras.metrics.Metric):
            def __init__(self):
                super().__init__()
                self.top = self.add_variable((), "zeros", name="top")
                towers.merge_state_by(self.top, "max")

            def update_state(self, x, sample_weight=None):
                self.top.assign(keras.ops.maximum(self.top, keras.ops.max(x)))

            def result(self):
                return self.top

        class Watched(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.metric = Top()

            def call(self, x):
                self.metric.update_state(x)
                return x

        x, outcome = batch(6)[0], model(Watched())
        towers.TowerModel(outcome, UNEQUAL)(x)
        self.assertAlmostEqual(
            float(outcome.layers[0].metric.result()), x.max(), places=6
        )

    def test_a_declared_rule_of_a_batch_norm_goes_first(self):
        network = model(keras.layers.BatchNormalization(momentum=0.5))
        towers.merge_state_by(network.layers[0].moving_mean, "max")
        towers.merge_state_by(network.layers[0].moving_variance, "last")
        x = batch(8)[0]
        towers.TowerModel(network, UNEQUAL)(x, training=True)
        shards = [x[:4], x[4:6], x[6:]]
        np.testing.assert_allclose(
            network.layers[0].moving_mean.numpy(),
            np.max([0.5 * s.mean(0) for s in shards], 0),
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            network.layers[0].moving_variance.numpy(),
            0.5 + 0.5 * shards[-1].var(0),
            rtol=1e-5,
        )

    @parameterized.parameters(2, 7)
    def test_renormalised_statistics_are_of_the_whole_batch(self, rows):
        constant = inspect.signature(keras.layers.BatchNormalization).parameters
        if "renorm" not in constant:
            self.skipTest("this Keras has no batch renormalisation")
        layers = [
            keras.layers.BatchNormalization(renorm=True) for _ in range(2)
        ]
        plain, towered = (model(layer) for layer in layers)
        x = batch(rows)[0]
        plain(x, training=True)
        wrapped = towers.TowerModel(towered, UNEQUAL)
        self.assertEmpty(messages(lambda: wrapped(x, training=True), RULE))
        self.check(towered, plain)

    @parameterized.parameters(
        (tf.Variable(1.0), "sum", TypeError, "must be a keras.Variable.*got"),
        (1.0, "sum", TypeError, "must be a keras.Variable.*got float"),
        (keras.Variable(1.0), "add", ValueError, "'sum', 'max', 'min', 'mean'"),
        (keras.Variable(1.0), ["sum"], ValueError, "is \\['sum'\\]. Expected"),
        (
            keras.Variable(1),
            "mean",
            ValueError,
            "dtype int.*'max', 'min', 'las",
        ),
        (keras.Variable(True), "sum", ValueError, "dtype bool.*'max', 'min'"),
        (keras.random.SeedGenerator(1).state, "last", ValueError, "seed gener"),
    )
    def test_what_cannot_be_is_refused(self, variable, rule, error, words):
        with self.assertRaisesRegex(error, words):
            towers.merge_state_by(variable, rule)

    def test_the_state_of_a_stateful_rnn_has_its_own(self):
        inputs = keras.Input(batch_shape=[4, 2, 3])
        rnn = keras.layers.GRU(2, stateful=True)
        model = keras.Model(inputs, rnn(inputs))
        towers.merge_state_by(rnn.states[0], "last")
        with self.assertRaisesRegex(ValueError, "state of a stateful RNN"):
            towers.build_towers(model, np.ones([4, 2, 3], "float32"), UNEQUAL)
