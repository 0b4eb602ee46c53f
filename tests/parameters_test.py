"""parameters: policies, moving, and what an empty tower's gradient does."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import close, cnn, make, placement

import towers


class ParametersTest(absltest.TestCase):
    def test_a_policy_places_each_variable_and_its_slots(self):
        model = make(cnn)
        model.compile(keras.optimizers.Adam(), "mse")
        model.optimizer.build(model.trainable_variables)
        names = ["/CPU:1", "/CPU:2", "/CPU:3", "/CPU:1"]
        where = placement(2, parameter_device=lambda variables: names)
        towers.place_variables(model, where)
        for i, (variable, name) in enumerate(zip(model.variables, names)):
            self.assertEndsWith(variable.value.device, name[1:])
            slot = model.optimizer._momentums[i]
            self.assertEndsWith(slot.value.device, name[1:])

    def test_bad_policies_are_refused(self):
        for policy, message in (
            (lambda v: ["/CPU:0"], "4 devices, one per variable; got 1"),
            (lambda v: ["/CPU:9"] * len(v), "parameter_device.*CPU:9"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                towers.place_variables(
                    make(cnn), placement(2, parameter_device=policy)
                )

    def test_moving_inside_a_graph_is_refused(self):
        model = make(cnn)

        @tf.function
        def move():
            towers.place_variables(model, placement(2))

        with self.assertRaisesRegex(RuntimeError, "eagerly"):
            move()

    def test_nan_gradients_of_an_empty_tower_are_dropped(self):
        class Spread(keras.layers.Layer):
            """Adds next to nothing of the rows' deviation: a NaN gradient at one row."""

            def build(self, shape):
                self.scale = self.add_weight(shape=(1,), initializer="ones")

            def call(self, x):
                x = x * self.scale
                return x + 1e-30 * tf.sqrt(tf.math.reduce_variance(x, 0))

        model = keras.Sequential([keras.Input([2]), Spread()])

        def gradient(x, weights):
            @tf.function(input_signature=[tf.TensorSpec([None, 2])])
            def run(x):
                with tf.GradientTape() as tape:
                    where = placement(2, weights)
                    graph = towers.build_towers(model, x, where)
                    loss = tf.reduce_sum(graph.outputs[:, 0])
                return tape.gradient(loss, model.trainable_variables[0])

            return run(x)

        x = np.array([[1, 2], [3, 5]], "float32")
        # The plain model says NaN of one row, and so does a tower that has it.
        self.assertTrue(np.isnan(gradient(x, [1, 1])).all())
        # An empty first tower runs on one spare row, and is not heard.
        close(gradient(x, [0, 1]), np.array([4.0]))


if __name__ == "__main__":
    absltest.main()
