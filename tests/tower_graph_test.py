"""tower_graph: updates that nobody applies are warned of, and no others."""

import copy
import gc

import keras
import tensorflow as tf
from absl.testing import parameterized
from models import chain, make, placement
from warned import messages

import towers

layers = keras.layers
X = tf.ones([4, 3])


def normed():
    return chain([3], layers.BatchNormalization(name="norm"))


def built(model, x=X, training=True):
    return towers.build_towers(model, x, placement(2), training=training)


def in_a_function(body):
    model = make(normed)
    return tf.function(lambda x: body(model, x), autograph=False)(X)


def raising(model, x):
    built(model, x)
    raise KeyError("the user's")


def in_a_v1_graph():
    model = make(normed)
    with tf.Graph().as_default():
        built(model, tf.ones([4, 3]))


def in_an_error():
    try:
        in_a_function(raising)
    except KeyError:
        pass


def planned():
    model = make(normed)
    towers.placement_plan(
        lambda x: built(model, x).outputs, X, machine={"CPU": 2}
    )


def copied():
    graph = built(make(normed))
    other, deep = copy.copy(graph), copy.deepcopy(graph.pending)
    del graph
    gc.collect()
    del deep
    other.apply_updates()


SILENT = {
    "applied": lambda: in_a_function(lambda m, x: built(m, x).apply_updates()),
    "read": lambda: in_a_function(lambda m, x: built(m, x).updates[0][1]),
    "nothing to apply": lambda: in_a_function(
        lambda m, x: built(m, x, False).outputs
    ),
    "an error": in_an_error,
    "a graph of tf.compat.v1": in_a_v1_graph,
    "a plan": planned,
    "compare": lambda: towers.compare(make(normed), placement(2), X),
    "an eager model": lambda: towers.TowerModel(make(normed), placement(2))(
        X, training=True
    ),
    "eager, applied": lambda: built(make(normed)).apply_updates(),
    "eager, copies": copied,
}
WARNED = {
    "in a function": lambda: in_a_function(lambda m, x: built(m, x).outputs),
    "in a branch": lambda: in_a_function(
        lambda m, x: tf.cond(
            x[0, 0] > 0, lambda: built(m, x).outputs, lambda: x
        )
    ),
    "eager": lambda: built(make(normed)).outputs,
}


class PendingTest(parameterized.TestCase):
    def warned(self, call):
        gc.collect()  # what others left, who may have words of their own

        def ended():
            call()
            gc.collect()

        return messages(ended, "nobody has applied")

    @parameterized.named_parameters(SILENT.items())
    def test_no_word(self, call):
        self.assertEqual(self.warned(call), [])

    @parameterized.named_parameters(WARNED.items())
    def test_a_word(self, call):
        (result,) = self.warned(call)
        self.assertRegex(result, r"norm/moving_mean, .*`apply_updates\(\)`")
