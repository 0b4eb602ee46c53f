"""answers: what is said first, in text, page and notebook."""

import pathlib
import tempfile

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES, cnn, inputs, make, placement, targets

import towers
from towers.report.answers import answers


class AnswersTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        model = towers.TowerModel(make(cnn), placement(2))
        model.compile("sgd", "mse")
        x, y = inputs(model.template, 6), targets(model.template, 6)
        cls.report = towers.execution_report(model.train_on_batch, x, y)
        cls.told = dict(answers(cls.report))

    def test_what_is_asked(self):
        pairs = self.told
        self.assertEqual(
            pairs["Crossed"], "3.10 kB in 5 transfers; nothing crossed twice"
        )
        self.assertStartsWith(
            pairs["By kind"], "batch 1.54 kB (49 %), parameters 748 B (24 %)"
        )
        self.assertIn("924 B crossed: parameters 444 B", pairs["Most of it"])
        self.assertStartsWith(pairs["Most ops"], "/CPU:0 has ")
        self.assertEqual(pairs["Parameters"], "748 B on /CPU:0")
        self.assertEqual(pairs["Elsewhere than asked"], "no op")

    def test_text_page_and_notebook_say_them_first(self):
        with tempfile.TemporaryDirectory() as folder:
            page = pathlib.Path(folder, "report.html")
            self.report.save(page)
            text = page.read_text()
        lines = str(self.report).split("\n\n")[0].splitlines()
        self.assertEqual(
            lines, [f"{asked}: {answer}" for asked, answer in self.told.items()]
        )
        for answer in self.told.values():
            self.assertIn(f"<dd>{answer}</dd>", text.split("<details>")[0])
            self.assertIn(f"<dd>{answer}</dd>", self.report._repr_html_())
        self.assertIn(f"{self.report.subject}</p>", text)
        self.assertRegex(
            self.report.subject,
            r"\.train_on_batch of \[6, 8, 8, 2\]; TensorFlow .*; \d{4}-",
        )

    def test_what_is_not_where_it_was_asked(self):
        @tf.function
        def apply(x):
            with tf.device("/GPU:0"):
                y = tf.matmul(x, x, name="away")
            with tf.device(DEVICES[1]):
                return tf.sin(y)

        report = towers.execution_report(apply, np.ones([3, 3], "float32"))
        pairs = dict(answers(report))
        self.assertEqual(
            pairs["Elsewhere than asked"],
            "away (MatMul) is on /CPU:0, not /GPU:0",
        )
        self.assertIn("asked for /GPU:0 and got /CPU:0", report.hints[0])
        (stray,) = report.to_dict()["moved"]
        self.assertEqual((stray["op"], stray["got"]), ("away", "/CPU:0"))
