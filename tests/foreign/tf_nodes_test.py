"""tf_nodes: TensorFlow still calls nodes so."""

import tensorflow as tf
from absl.testing import absltest
from executed import run_metadata

from towers.foreign import tf_nodes


class TfNodesTest(absltest.TestCase):
    def test_tensorflow_still_has_the_private_names(self):
        variable = tf.Variable([1.0, 2.0])

        @tf.function(autograph=False)
        def step(x):
            with tf.device("/CPU:1"):
                y = tf.matmul(x, x)
            with tf.GradientTape() as tape:
                loss = tf.recompute_grad(tf.square)(y) * variable
            return tape.gradient(loss, variable)

        metadata = run_metadata(lambda: step(tf.ones([2, 2])))
        ran = metadata.function_graphs
        cut = [n for f in ran for part in f.partition_graphs for n in part.node]
        whole = [n for f in ran for n in f.post_optimization_graph.node]
        ops = {node.op for node in cut}
        for names in (
            tf_nodes.SENDS,
            tf_nodes.RECEIVES,
            tf_nodes.ARGUMENTS,
            tf_nodes.RESULTS,
        ):
            self.assertTrue(ops.intersection(names), names)
        attributes = {name for node in whole for name in node.attr}
        self.assertContainsSubset(
            {tf_nodes.CALLED, tf_nodes.HANDLE_SHAPES, tf_nodes.HANDLE_DTYPES},
            attributes,
        )
        graph = step.get_concrete_function(tf.ones([2, 2])).graph
        with graph.as_default(), tf.compat.v1.colocate_with(graph.inputs[0]):
            beside = tf.constant(1.0).op
        operations = [*graph.get_operations(), beside]
        self.assertContainsSubset(
            {tf_nodes.GRADIENT, tf_nodes.BESIDE},
            {name for op in operations for name in op.node_def.attr},
        )

    def test_ops_of_one_argument_in_a_row_become_one(self):
        rows = tf.function(lambda x: tf.sin(tf.exp(x)), autograph=False)
        ran = run_metadata(lambda: rows(tf.ones([2]))).function_graphs
        ops = {n.op for f in ran for n in f.post_optimization_graph.node}
        self.assertIn(tf_nodes.IN_A_ROW, ops)

    def test_a_kernel_of_onednn_is_called_by_its_op(self):
        for kernel, op in {
            "_MklMatMul": "MatMul",
            "_MklNativeFusedConv2D": "_FusedConv2D",
            "_MklNativeFusedBatchNormV3": "FusedBatchNormV3",
            "_FusedMatMul": "_FusedMatMul",
            "FusedBatchNormV3": "FusedBatchNormV3",
        }.items():
            self.assertEqual(tf_nodes.op_of_kernel(kernel), op)

    def test_a_fused_convolution_is_taken_apart(self):
        @tf.function(autograph=False)
        def step(x):
            y = tf.nn.conv2d(x, tf.ones([2, 2, 3, 4]), [1, 2, 2, 1], "VALID")
            return tf.nn.relu(tf.nn.bias_add(y, tf.ones([4])))

        x = tf.ones([2, 7, 5, 3])
        run_metadata(lambda: None)  # what ran before is not ours
        (fused,) = (
            node
            for ran in run_metadata(lambda: step(x)).function_graphs
            for node in ran.post_optimization_graph.node
            if node.op.startswith("_Fused")
        )
        tf_nodes.take_apart(fused)
        self.assertEqual(fused.op, "Conv2D")
        with tf.Graph().as_default():
            ends = {
                fused.input[0]: tf.zeros(x.shape),
                fused.input[1]: tf.zeros([2, 2, 3, 4]),
            }
            graph = tf.compat.v1.GraphDef(node=[fused])
            (y,) = tf.compat.v1.import_graph_def(
                graph, ends, [f"{fused.name}:0"]
            )
        self.assertEqual(y.shape, step(x).shape)
