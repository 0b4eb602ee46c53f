"""TowerGraph: what each tower hands out, and what may be done with it."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from executed import Executed
from models import close, inputs, make, nested, placement, recurrent

import towers


class HandlesTest(absltest.TestCase):
    def test_towers_hand_out_what_they_are(self):
        model = make(nested)
        x = tf.constant(inputs(model, 3))

        @tf.function
        def run(x):
            graph = towers.build_towers(
                model, x, placement(4), layer_outputs=["inner/deep", "inner"]
            )
            tower = graph.towers[3]
            loss = tf.reduce_sum(tower.outputs)
            return (
                tower.inputs,
                tf.gradients(loss, tower.parameters),
                tower.layer_outputs["inner"],
                graph.towers[0].inputs,
            )

        shard, gradients, deep, empty = run(x)
        np.testing.assert_array_equal(shard, x[2:])
        self.assertEqual(empty.shape[0], 0)
        self.assertLen(deep, 2)  # called twice
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x[2:]))
        close(gradients, tape.gradient(loss, model.trainable_variables))

    def test_gradients_of_layers_and_of_each_tower_s_loss(self):
        model = make(nested)
        x = tf.constant(inputs(model, 5))

        @tf.function
        def run(x):
            graph = towers.build_towers(
                model, x, placement(2), layer_outputs=["inner/deep"]
            )
            each = [
                tf.gradients(tf.reduce_mean(t.outputs**2), t.parameters)
                for t in graph.towers
            ]
            deep = tf.add_n(
                [
                    tf.reduce_sum(y)
                    for t in graph.towers
                    for y in t.layer_outputs["inner/deep"]
                ]
            )
            variables = [v.value for v in model.trainable_variables]
            return (
                towers.average_gradients(each, rows=graph.rows),
                tf.gradients(deep, variables)[:2],
            )

        step = Executed(lambda: run(x))
        average, deep = run(x)
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(model(x) ** 2)
            hidden = model.get_layer("inner")(x)
            total = tf.reduce_sum(hidden)
            total += tf.reduce_sum(model.get_layer("inner")(hidden))
        close(average, tape.gradient(loss, model.trainable_variables))
        close(deep, tape.gradient(total, model.trainable_variables)[:2])
        for i in range(2):
            self.assertEqual(step.heavy()[f"tower_{i}"], {f"/CPU:{i}"})

    def test_updates_name_the_model_s_own_variables(self):
        model = make(nested)
        graph = towers.build_towers(model, inputs(model, 3), placement(2))
        self.assertEqual(graph.apply_updates(), None)
        for ours, theirs in graph.variables:
            self.assertIs(ours.value, theirs)


class RefusalTest(absltest.TestCase):
    def test_copying_without_a_session_graph_is_refused(self):
        model = make(recurrent)
        graph = towers.build_towers(model, inputs(model, 3), placement(2))
        for copy in (graph.copy_to_model, graph.copy_from_model):
            with self.assertRaisesRegex(RuntimeError, "the model's own"):
                copy(None)


class TowerFnTest(absltest.TestCase):
    def test_a_function_that_asks_gets_its_tower(self):
        placement = towers.Placement(["/CPU:1", "/CPU:2"], weights=[1, 2])
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])

        def scaled(model, shard, tower):
            where = tf.constant(tower.device)
            rows = tf.shape(tower.inputs)[0]
            return model(shard) * (tower.index + 1), [where], [rows]

        def not_asked(model, tower):  # here that is the shard
            return model(tower)

        x = tf.ones([6, 2])
        for build in (lambda f: f(), lambda f: tf.function(f)()):
            graph = build(
                lambda: (
                    towers.build_towers(
                        model, x, placement, merge="none", tower_fn=scaled
                    ).outputs
                )
            )
            plain = model(x).numpy()
            (one, two), (wheres,), (rows,) = graph
            np.testing.assert_allclose(one, plain[:2], rtol=1e-6)
            np.testing.assert_allclose(two, 2 * plain[2:], rtol=1e-6)
            self.assertEqual(
                [w.numpy() for w in wheres], [b"/CPU:1", b"/CPU:2"]
            )
            self.assertEqual([int(r) for r in rows], [2, 4])
        graph = towers.build_towers(model, x, placement, tower_fn=not_asked)
        np.testing.assert_allclose(graph.outputs, model(x), rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
