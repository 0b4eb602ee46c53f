"""write_graph: TensorBoard's own backend reads it, with a device per node."""

import importlib
import tempfile
import warnings

import pytest
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES

import towers
from towers.report.write_graph import joined


@tf.function
def there_and_back(x):
    with tf.device(DEVICES[1]):
        y = tf.matmul(x, x, transpose_b=True, name="away")
    with tf.device(DEVICES[0]):
        return tf.matmul(y, x, name="home")


def report():
    return towers.execution_report(
        lambda: (there_and_back(tf.ones([6, 8])), there_and_back(tf.eye(3)))
    )


def part(name):
    """A module of TensorBoard's, which may be missing."""
    with warnings.catch_warnings():  # of what it brings along
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"tensorboard.{name}")


def read(logdir):
    """As the server does for a browser."""
    processing = "backend.event_processing"
    multiplexer = part(f"{processing}.plugin_event_multiplexer")
    events = multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(logdir)
    events.Reload()
    provider = part(f"{processing}.data_provider")
    plugin = part("plugins.graph.graphs_plugin").GraphsPlugin(
        part("plugins.base_plugin").TBContext(
            logdir=logdir,
            multiplexer=events,
            data_provider=provider.MultiplexerDataProvider(events, logdir),
        )
    )
    text, _ = plugin.graph_impl(
        part("context").RequestContext(), ".", None, False, ""
    )
    text_format = importlib.import_module("google.protobuf.text_format")
    return text_format.Parse(text, tf.compat.v1.GraphDef())


class WriteGraphTest(absltest.TestCase):
    def test_tensorboard_reads_it(self):
        summary = report()
        logdir = tempfile.mkdtemp()
        summary.write_graph(logdir)
        graph = read(logdir)
        self.assertLen(graph.node, sum(len(g.node) for g in summary.graphs))
        names = [node.name for node in graph.node]
        self.assertLen(set(names), len(names))
        for node in graph.node:
            self.assertRegex(node.device, r"CPU:[01]$")
            for name in node.input:
                self.assertIn(name.removeprefix("^").split(":")[0], names)
        devices = {n.name.split("/")[-1]: n.device[-5:] for n in graph.node}
        self.assertEqual(devices["away"], DEVICES[1][1:])
        self.assertEqual(devices["home"], DEVICES[0][1:])

    def test_a_receive_comes_after_its_send(self):
        graph = joined(report().graphs)
        receives = [n for n in graph.node if "Recv" in n.op]
        self.assertNotEmpty(receives)
        for node in receives:
            self.assertLen(node.input, 1)
            self.assertRegex(node.input[0], r"^\^")
