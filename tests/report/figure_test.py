"""figure: what the bars and the squares say is what the report says."""

import importlib
import importlib.util

import pytest
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES

import towers
from towers.foreign.patches import patched
from towers.report.figure import check_figure_ending


def report():
    with tf.device(DEVICES[1]):
        weight = tf.Variable(tf.ones([8, 500]))

    @tf.function
    def crossing(x):
        with tf.device(DEVICES[1]):
            y = tf.matmul(x, weight)
        with tf.device(DEVICES[0]):
            return tf.reduce_sum(y)

    return towers.execution_report(crossing, tf.ones([6, 8]))


class FigureTest(absltest.TestCase):
    @pytest.mark.skipif(
        not importlib.util.find_spec("matplotlib"), reason="no matplotlib"
    )
    def test_bars_and_squares(self):
        summary = report()
        figure = summary.plot()
        held, crossed = figure.axes
        self.assertEqual(
            [bar.get_width() for bar in held.patches], [0, 16000] + 4 * [0]
        )
        self.assertEqual(
            sorted(text.get_text() for text in crossed.texts),
            ["12.0 kB", "192 B"],
        )
        figure.canvas.draw()
        self.assertEqual(figure._repr_png_()[:4], b"\x89PNG")
        check_figure_ending("a.PNG", "--figure")
        for path in ("a.xyz", "a"):
            with self.assertRaisesRegex(ValueError, "--figure.*png"):
                check_figure_ending(path, "--figure")

    def test_without_matplotlib(self):
        def import_module(name):
            raise ImportError(name)

        summary = report()
        with patched((importlib, "import_module", import_module)):
            with self.assertRaisesRegex(ImportError, r"towers\[pictures\]"):
                summary.plot()
