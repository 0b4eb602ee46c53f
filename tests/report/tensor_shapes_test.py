"""tensor_shapes: what can be known of a shape, and what cannot."""

import tensorflow as tf
from absl.testing import parameterized

from towers.report.recording import record
from towers.report.tensor_shapes import shapes_of

VARIABLE = tf.Variable(tf.ones([3, 4]))


def looped(x):
    rows = tf.TensorArray(tf.float32, 0, dynamic_size=True)
    _, rows = tf.while_loop(
        lambda i, _: i < 3,
        lambda i, rows: (i + 1, rows.write(i, x * tf.cast(i, tf.float32))),
        [0, rows],
    )
    return rows.stack()


def added_up(x):
    """As TensorFlow rewrites an `AddN` when memory is short."""
    ops = tf.raw_ops
    ref = ops.TemporaryVariable(shape=[2], dtype=tf.float32, var_name="sum")
    ref = ops.Assign(ref=ref, value=tf.zeros([2]))
    with tf.control_dependencies([ops.AssignAdd(ref=ref, value=x[0, :2])]):
        total = ops.DestroyTemporaryVariable(ref=ref, var_name="sum")
    return tf.boolean_mask(total, total > 0.0)


def fused(x):
    """What oneDNN makes one kernel of, in a type that its op does not list."""
    images = tf.cast(tf.reshape(x, [1, 5, 3, 1]), tf.bfloat16)
    kernel = tf.ones([2, 2, 1, 4], tf.bfloat16)
    y = tf.nn.conv2d(images, kernel, 1, "VALID")
    return tf.nn.relu(tf.nn.bias_add(y, tf.ones([4], tf.bfloat16)))


class ShapesTest(parameterized.TestCase):
    @parameterized.parameters(
        (lambda x: x @ VARIABLE, (5, 4)),
        (lambda x: tf.gather(VARIABLE, tf.zeros([7], tf.int32)), (7, 4)),
        (lambda x: x[: tf.shape(x)[0] // 2], (2, 3)),
        (
            lambda x: tf.boolean_mask(x, [True, False, True, True, False]),
            (3, 3),
        ),
        (looped, (3, 5, 3)),
        (added_up, (2,)),
        (fused, (1, 4, 2, 4)),
    )
    def test_a_shape_is_the_one_of_the_call(self, function, expected):
        specs = tf.function(
            lambda x: tf.stop_gradient(function(x), name="wanted"),
            input_signature=[tf.TensorSpec([None, None])],
        )
        value = specs(tf.ones([5, 3]))
        self.assertEqual(tuple(value.shape), expected)
        recording = record(lambda: specs(tf.ones([5, 3])))
        (ran,) = recording.functions
        (name,) = (n.input[0] for n in ran.graph.node if n.op == "_Retval")
        name += ":0" * (":" not in name)
        shapes = shapes_of(ran, recording.batches, [name])
        self.assertEqual(shapes, {name: expected})

    def test_nothing_is_assigned_while_shapes_are_sought(self):
        counter = tf.Variable(0)

        @tf.function(input_signature=[tf.TensorSpec([None])])
        def count(x):
            counter.assign_add(1)
            return tf.boolean_mask(x, x > 0.0) + tf.cast(counter, tf.float32)

        recording = record(lambda: count(tf.ones([5])))
        (ran,) = recording.functions
        (name,) = (n.input[0] for n in ran.graph.node if n.op == "_Retval")
        name += ":0" * (":" not in name)
        shapes = shapes_of(ran, recording.batches, [name])
        self.assertEqual(shapes, {name: (5,)})
        self.assertEqual(counter.numpy(), 0)

    def test_a_shape_that_differs_between_calls_is_not_known(self):
        double = tf.function(
            lambda x: (x * 2.0, tf.reduce_sum(x)),
            input_signature=[tf.TensorSpec([None])],
        )
        recording = record(lambda: [double(tf.ones([n])) for n in (2, 3)])
        (ran,) = recording.functions
        names = [n.input[0] for n in ran.graph.node if n.op == "_Retval"]
        names = [n if ":" in n else f"{n}:0" for n in names]
        shapes = shapes_of(ran, recording.batches, names)
        self.assertEqual(list(shapes.values()), [()])
