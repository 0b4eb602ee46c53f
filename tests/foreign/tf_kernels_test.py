"""tf_kernels: what towers put on a GPU runs there, and waits for nothing.

The graphs are for GPUs that are not here, and are never run: TensorFlow's Linux
wheel registers its GPU kernels wherever it is installed.
"""

import re

import keras
import tensorflow as tf
from absl.testing import parameterized
from models import GPUS, NAMED, chain, make

import towers
from towers.foreign import tf_kernels

layers = keras.layers
# Ops without a GPU kernel that towers put on a GPU, and why.
EXCUSED: dict[str, str] = {}
# Ops whose results the host waits for, and why.
AWAITED = {
    "DynamicStitch": "TensorFlow's own gradient of a sum over an open axis",
}
# What towers' own work is called, besides that of the layers.
VERBS = re.compile(
    r"(^|/)(split|replicate|gather|all_towers|merge_state|merge_moments)(_\d+)?/"
)
COUNTS = (tf.int32, tf.int64, tf.bool)


class Standardized(layers.Layer):
    needs_all_towers = True

    def call(self, x):
        return towers.all_towers(
            lambda x: x - tf.reduce_mean(x, 0), x, split=True
        )


def stateful():
    """Rows, seeds, statistics and states of all kinds, and a meeting."""
    return chain(
        [5],
        layers.Embedding(11, 4, mask_zero=True),
        layers.GRU(3),
        layers.Dropout(0.5),
        layers.BatchNormalization(),
        layers.BatchNormalization(synchronized=True),
        Standardized(),
        layers.Dense(2),
        dtype="int32",
    )


def rnn_with_state():
    return keras.Sequential(
        [
            keras.Input(batch_shape=[7, 5, 3]),
            layers.LSTM(4, stateful=True),
            layers.Dense(2),
        ]
    )


def spec(symbol):
    return tf.TensorSpec([None, *symbol.shape[1:]], symbol.dtype)


def ops_of(model, inputs, **kwargs):
    """The ops of a training step on GPUs, with its state."""
    where = towers.Placement(GPUS, available="any", **kwargs)

    def step(inputs):
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, inputs, where, training=True)
            each = [tf.reduce_sum(y) for y in tf.nest.flatten(graph.outputs)]
            loss = tf.add_n([*each, *graph.losses])
        graph.apply_updates()
        return tape.gradient(loss, model.trainable_variables)

    step = tf.function(step, autograph=False)
    return needed(step.get_concrete_function(inputs).graph)


def needed(graph):
    """The ops of a function that what it returns, or assigns, depends on."""
    ahead = [x.op for x in graph.outputs] + list(graph.control_outputs)
    kernels = {}
    while ahead:
        op = ahead.pop()
        if op.name not in kernels:
            kernels[op.name] = op
            ahead += [*(x.op for x in op.inputs), *op.control_inputs]
    return list(kernels.values())


def on_gpu(op):
    return "GPU" in op.device


def host_ends(op, kind):
    """For each input, and each output, whether it is in the host's memory."""
    definition = tf_kernels.kernel(op, kind)
    named = set(definition.host_memory_arg) if definition is not None else set()

    def each(arguments):
        flat = []
        for argument in arguments:
            count = 1
            if argument.number_attr:
                count = op.get_attr(argument.number_attr)
            elif argument.type_list_attr:
                count = len(op.get_attr(argument.type_list_attr))
            flat += [argument.name in named] * count
        return flat

    return each(op.op_def.input_arg), each(op.op_def.output_arg)


def in_gpu_memory(tensor):
    """Whether a tensor is made on a GPU, in the memory of that."""
    _, outputs = host_ends(tensor.op, "GPU")
    return on_gpu(tensor.op) and not outputs[tensor.value_index]


def waits(ops):
    """Ops for which a host waits until a GPU has a count, a flag or a seed."""
    results = []
    for op in ops:
        host = [not on_gpu(op)] * len(op.inputs)
        if on_gpu(op):
            host, _ = host_ends(op, "GPU")
        results += [
            (op.name, op.type, x.name)
            for x, taken in zip(op.inputs, host)
            if taken
            and in_gpu_memory(x)
            and (on_gpu(op) or x.dtype in COUNTS)
            and x.op.type not in AWAITED
        ]
    return results


ALL_ON_GPUS = dict(parameter_device="/GPU:0", input_device="/GPU:1")


class KernelTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if not tf_kernels.knows_gpus():
            self.skipTest("This TensorFlow was built without kernels for GPUs.")

    @parameterized.named_parameters(
        *NAMED, ("stateful", stateful), ("rnn_with_state", rnn_with_state)
    )
    def test_each_op_on_a_gpu_has_its_kernel(self, model):
        model = make(model)
        inputs = (
            tf.TensorSpec([None, 4])
            if not getattr(model, "inputs", None)
            else spec(model.inputs[0])
            if isinstance(model, keras.Sequential)
            else tf.nest.map_structure(spec, model.input)
        )
        ops = ops_of(model, inputs, **ALL_ON_GPUS)
        self.assertNotEmpty([op for op in ops if on_gpu(op)])
        missing = {
            (op.type, op.name)
            for op in ops
            if on_gpu(op) and tf_kernels.kernel(op, "GPU") is None
        }
        self.assertEqual(
            {m for m in missing if VERBS.search(m[1]) or m[0] not in EXCUSED},
            set(),
        )
        verbs = [op for op in ops if VERBS.search(op.name)]
        self.assertEqual(waits(verbs), [])

    def test_seeds_are_drawn_without_waiting(self):
        model = chain([4], layers.Dropout(0.5), layers.Dense(2))
        ops = ops_of(model, tf.TensorSpec([None, 4]))
        self.assertEqual(waits(ops), [])

    def test_sparse_and_ragged_batches(self):
        where = towers.Placement(GPUS, available="any", input_device="/GPU:0")

        def split(*batch):
            return towers.split_batch(batch, where)

        traced = tf.function(split, autograph=False).get_concrete_function(
            tf.SparseTensorSpec([None, 5]),
            tf.RaggedTensorSpec([None, None, 2], ragged_rank=1),
            tf.TensorSpec([None, 3]),
        )
        ops = needed(traced.graph)
        for op in ops:
            if on_gpu(op):
                self.assertIsNotNone(tf_kernels.kernel(op, "GPU"), op.name)
        self.assertEqual(waits(ops), [])

    def test_the_registry(self):
        with tf.Graph().as_default():
            x = tf.constant([1.0])
            text = tf.strings.as_string(x)
            where = tf.where(tf.constant([True]), [1], [2])
            rows = tf.shape(x)
        self.assertIsNone(tf_kernels.kernel(text.op, "GPU"))
        self.assertIsNotNone(tf_kernels.kernel(text.op, "CPU"))
        self.assertEqual(host_ends(where.op, "GPU")[1], [False])
        self.assertEqual(host_ends(rows.op, "GPU")[1], [True])
