"""graphs: `tf.config.run_functions_eagerly(True)` leaves towers what they are."""

import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, cnn, inputs, make, placement, recurrent, targets
from same import pair, same_fit

import towers
from towers.engine.graphs import as_graphs


class GraphsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        tf.config.run_functions_eagerly(True)
        self.addCleanup(tf.config.run_functions_eagerly, False)

    @parameterized.parameters(
        (cnn, {}),
        (cnn, {"loss_on_towers": True}),
        (recurrent, {"prefetch": True}),
    )
    @pytest.mark.slow(after=1)
    @pytest.mark.filterwarnings("ignore:.*does not apply to tf.data")
    def test_a_model_trains_and_predicts_as_the_plain_one(self, model, options):
        models = pair(model, placement(2), **options)
        x, y = inputs(models[0], 5), targets(models[0], 5)
        same_fit(models, x, y, batch_size=3, predict=True)
        self.assertTrue(tf.config.functions_run_eagerly())

    def test_towers_that_are_built_eagerly_have_gradients(self):
        model = make(cnn)
        x = tf.constant(inputs(model, 5))
        results = []
        for call in (
            lambda: model(x),
            lambda: towers.build_towers(model, x, placement(2)).outputs,
        ):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(call() ** 2)
            results.append(tape.gradient(loss, model.trainable_variables))
        close(*results)
        self.assertLen(towers.split_batch(x, placement(2)), 2)

    def test_it_is_as_before_after_an_error_too(self):
        with self.assertRaises(KeyError), as_graphs():
            self.assertFalse(tf.config.functions_run_eagerly())
            raise KeyError
        self.assertTrue(tf.config.functions_run_eagerly())
