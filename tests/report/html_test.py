"""html: what the page says is what the report says, in a browser too."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES, chain

import towers

layers = keras.layers
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome"))), ""
)


def step():
    """A CNN in three unequal towers, with a pinned embedding."""
    picture = keras.Input([8, 8, 3])
    words = keras.Input([7], dtype="int32")
    x = layers.Flatten()(layers.Conv2D(4, 3)(picture))
    y = layers.Embedding(100, 8, name="words")(words)
    y = layers.GlobalAveragePooling1D()(y)
    model = keras.Model(
        [picture, words], layers.Dense(2)(x) + layers.Dense(2)(y)
    )
    placement = towers.Placement(
        DEVICES[:3], weights=[3, 2, 1], layer_devices={"words": DEVICES[3]}
    )
    model = towers.TowerModel(model, placement)
    model.compile("sgd", "mse")
    inputs = [np.ones([6, 8, 8, 3], "float32"), np.ones([6, 7], "int32")]
    return towers.execution_report(
        model.train_on_batch, inputs, np.ones([6, 2], "float32")
    )


def rows(text, caption):
    """The cells of a table's rows."""
    (body,) = re.findall(
        rf"<caption>{caption}</caption>.*?<tbody>(.*?)</tbody>", text, re.S
    )
    return [
        [
            f"{int(exact):,}" if exact else html.unescape(cell)
            for exact, cell in re.findall(
                r'<td(?:[^>]*data-n="(\d+)")?[^>]*>(.*?)</td>', row
            )
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)
    ]


class PageTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.report = step()
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        cls.report.save(cls.folder / "report.html")
        cls.text = (cls.folder / "report.html").read_text()

    def says_all(self, text):
        data = self.report.to_dict()
        pairs = {(a, b): n for a, b, _, n in rows(text, "What crossed")}
        self.assertEqual(
            pairs,
            {
                (p["source"], p["target"]): f"{p['bytes']:,}"
                for p in data["bytes_between"]
            },
        )
        self.assertLen(pairs, 10)
        held = {row[0]: row[2:] for row in rows(text, "Devices")}
        self.assertEqual(set(held), set(DEVICES))
        for device, (parameters, slots, _) in held.items():
            self.assertEqual(
                parameters, f"{self.report.parameter_bytes.get(device, 0):,}"
            )
            self.assertEqual(
                slots, f"{self.report.slot_bytes.get(device, 0):,}"
            )

    def test_every_device_and_pair_with_its_bytes(self):
        self.says_all(self.text)
        self.says_all(self.report._repr_html_())
        self.assertLen(rows(self.text, "Transfers"), len(self.report.transfers))
        self.assertLen(rows(self.text, "Variables"), len(self.report.variables))
        for device in DEVICES:
            self.assertIn(f">{device}</text>", self.text)
        words = re.search(r'<th scope="row">words</th>(.*?)</tr>', self.text)[1]
        self.assertEqual(words.count(f">{DEVICES[3]} "), 3)

    def test_layers_of_models_in_models(self):
        inner = chain([4], layers.Dense(4, name="deep"), name="inner")
        model = chain([4], inner)
        where = towers.Placement(DEVICES[:2])
        report = towers.execution_report(
            lambda: towers.build_towers(model, tf.ones([4, 4]), where)
        )
        report.save(self.folder / "inner.html")
        text = (self.folder / "inner.html").read_text()
        self.assertIn('<th scope="row">inner/deep</th>', text)

    def test_nothing_is_fetched(self):
        self.assertNotRegex(self.text, r"https?:|<link|<img|@import|url\(")
        self.assertIn("default-src 'none'", self.text)

    def test_names_are_no_markup(self):
        @tf.function
        def crossing(x):
            with tf.device(DEVICES[0]):
                y = x + 1.0
            with tf.device(DEVICES[1]):
                return y * weight

        with tf.device(DEVICES[1]):
            weight = tf.Variable(1.0, name="a<b>&c")
        text = towers.execution_report(crossing, tf.ones([3]))._repr_html_()
        page = self.folder / "names.html"
        towers.execution_report(crossing, tf.ones([3])).save(page)
        self.assertNotIn("<b>&c", text)
        self.assertIn("a&lt;b&gt;&amp;c", page.read_text())

    def test_other_endings(self):
        self.report.save(self.folder / "report.json")
        data = json.loads((self.folder / "report.json").read_text())
        self.assertEqual(data["total_bytes"], self.report.total_bytes)
        with self.assertRaisesRegex(ValueError, r"\.html or \.json"):
            self.report.save(self.folder / "report.pdf")

    @pytest.mark.rare
    @pytest.mark.skipif(not BROWSER, reason="apt-get install chromium")
    def test_in_a_browser(self):
        click = (
            "<script>document.querySelectorAll('table')[2].querySelectorAll("
            "'button')[3].click(); document.title = 'fetched ' + "
            "performance.getEntriesByType('resource').length</script>"
        )
        page = self.folder / "clicked.html"
        page.write_text(self.text.replace("</body>", click + "</body>"))
        done = browsed(page)
        self.says_all(done.stdout)
        counts = [n for *_, n in rows(done.stdout, "What crossed")]
        self.assertEqual(
            counts,
            sorted(counts, key=lambda n: -int(n.replace(",", ""))),
        )
        self.assertIn('aria-sort="descending"', done.stdout)
        self.assertNotIn("CONSOLE", done.stderr)
        self.assertIn("<title>fetched 0</title>", done.stdout)
        # The log of the browser does tell of errors.
        page.write_text("<script>console.error('seen'); boom()</script>")
        self.assertRegex(browsed(page).stderr, r"(?s)CONSOLE.*seen.*boom")


def browsed(page, *flags):
    return subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", "--enable-logging=stderr"),
            *(*flags, "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
