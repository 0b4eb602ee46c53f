"""split: shards by weight, gradient in one piece."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from models import placement

import towers


class SplitTest(parameterized.TestCase):
    @parameterized.parameters(
        [[1]], [[1, 1]], [[3, 1]], [[1, 0, 2]], [[0.1, 0.2, 0.7]], [[0, 1, 0]]
    )
    def test_shards_follow_the_formula(self, weights):
        where = placement(len(weights), weights)

        def split(x):
            return towers.split_batch(x, where)

        unknown = tf.function(split, input_signature=[tf.TensorSpec([None, 2])])
        for call, counts in (
            (unknown, [0, 1, 2, 3, 7, 12]),
            (tf.function(split), [0, 7]),
        ):
            for rows in counts:
                x = np.arange(rows * 2, dtype="float32").reshape(rows, 2)
                shards = [shard.numpy() for shard in call(x)]
                np.testing.assert_array_equal(np.concatenate(shards), x)
                total = np.cumsum(weights)
                ends = np.floor(rows * total / total[-1])
                self.assertEqual(
                    [len(s) for s in shards], np.diff(ends, prepend=0).tolist()
                )

    def test_a_nest_stays_a_nest(self):
        batch = {"a": np.ones([5, 2]), "b": (np.arange(5), [None])}
        shards = towers.split_batch(batch, placement(2))
        self.assertEqual(shards[1]["b"][0].numpy().tolist(), [2, 3, 4])
        self.assertIsNone(shards[0]["b"][1][0])

    def test_gradient_is_the_batch_s(self):
        x = tf.random.normal([7, 3])
        with tf.GradientTape() as tape:
            tape.watch(x)
            shards = towers.split_batch(x, placement(3))
            loss = tf.add_n([tf.reduce_sum(s**3) for s in shards])
        np.testing.assert_allclose(tape.gradient(loss, x), 3 * x**2, rtol=1e-6)

    def test_whole_leaves_go_to_all_and_their_gradients_are_summed(self):
        batch = {"rows": tf.ones([5, 2]), "deep": [tf.ones([3]), tf.ones([5])]}
        with tf.GradientTape() as tape:
            tape.watch(batch)
            shards = towers.split_batch(
                batch, placement(3), whole=[("deep", 0)]
            )
            loss = tf.add_n(
                [
                    (i + 1.0) * tf.reduce_sum(shard["deep"][0])
                    for i, shard in enumerate(shards)
                ]
            )
        self.assertEqual([len(s["rows"]) for s in shards], [1, 2, 2])
        self.assertEqual([len(s["deep"][1]) for s in shards], [1, 2, 2])
        gradient = tape.gradient(loss, batch["deep"][0])
        np.testing.assert_array_equal(gradient, [6.0] * 3)

    @parameterized.named_parameters(
        ("scalar", 1.0, ValueError, "first axis"),
        ("rows", [np.ones([3]), np.ones([4])], ValueError, "same number"),
        ("nothing", [], ValueError, "at least one"),
        ("object", object(), TypeError, "tensor or an array"),
    )
    def test_bad_batches_are_refused(self, batch, error, message):
        with self.assertRaisesRegex(error, message):
            towers.split_batch(batch, placement(2))

    def test_disagreeing_rows_are_refused_when_run(self):
        @tf.function(input_signature=[[tf.TensorSpec([None])] * 2])
        def split(batch):
            return towers.split_batch(batch, placement(2))

        with self.assertRaisesRegex(tf.errors.InvalidArgumentError, "disagree"):
            split([np.ones(3, "float32"), np.ones(4, "float32")])

    def test_no_placement_is_refused(self):
        with self.assertRaisesRegex(TypeError, "towers.Placement"):
            towers.split_batch(np.ones(3), ["/CPU:0"])
