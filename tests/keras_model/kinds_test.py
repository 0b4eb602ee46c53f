"""kinds: each variable has one, and each kind its way there and back."""

import keras
from absl.testing import absltest
from models import chain

import towers
from towers.keras_model import parameter_copies, state
from towers.keras_model.kinds import Kind
from towers.keras_model.layer_graph import LayerGraph


class Counted(keras.layers.Layer):
    def build(self, shape):
        self.seen = self.add_weight(name="seen", trainable=False)
        self.mean = keras.metrics.Mean(name="mean")
        self.total = keras.layers.BatchNormalization()
        self.total.build([*shape])
        towers.merge_state_by(self.total.moving_mean, "max")

    def call(self, x):
        return self.total(x)


def model():
    frozen = keras.layers.Dense(2, name="frozen", use_bias=False)
    frozen.trainable = False
    return keras.Sequential(
        [
            keras.Input([4, 2], batch_size=6),
            keras.layers.SimpleRNN(3, stateful=True, name="rnn"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="dropout"),
            frozen,
            Counted(name="counted"),
        ]
    )


class KindsTest(absltest.TestCase):
    def test_a_variable_has_the_kind_that_is_told_by_its_owner(self):
        scaled = chain(
            [4],
            keras.layers.Dense(2, name="scaled", dtype="float8_from_float32"),
        )
        total = keras.metrics.Sum(name="sum")
        graph = LayerGraph([model(), scaled, total])
        results = {}
        for v, kind in zip(graph.variables, graph.kinds, strict=True):
            path = v.path.split("/")[-2:]
            results.setdefault(kind, set()).add("/".join(path))
        for kind, *paths in [
            (Kind.STATISTIC, "norm/moving_mean", "norm/moving_variance"),
            (Kind.METRIC, "mean/total", "mean/count", "sum/total"),
            (Kind.OWN, "frozen/kernel", "counted/seen"),
            (Kind.TRAINED, "norm/gamma", "scaled/kernel"),
            (Kind.OVERWRITTEN, "scaled/kernel_scale"),
        ]:
            self.assertContainsSubset(paths, results[kind], kind)
        self.assertCountEqual(results, Kind)

    def test_one_that_has_a_rule_declared_is_moved_by_no_moments(self):
        network = model()
        graph = LayerGraph(network)
        declared = network.layers[-1].total.moving_mean
        self.assertIs(graph.kinds[graph.index_of(declared)], Kind.OWN)

    def test_what_keras_trains_is_in_order(self):
        network = model()
        graph = LayerGraph(network)
        entries = [v.path for v in network.trainable_variables]
        results = [graph.variables[i].path for i in graph.trainable]
        self.assertEqual(results, entries)

    def test_each_kind_has_its_way(self):
        for kind in Kind:
            self.assertIn(kind, parameter_copies._TO_TOWERS)
            self.assertIn(kind, state._FROM_TOWERS)
