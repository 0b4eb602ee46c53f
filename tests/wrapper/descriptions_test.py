"""descriptions: a model in towers says so, where a person looks."""

import contextlib
import io
import logging

import keras
import numpy as np
from absl.testing import parameterized
from models import chain, placement

import towers
from towers.wrapper import descriptions

X, Y = np.ones([4, 3], "float32"), np.ones([4, 2], "float32")


def net(n=2, **kwargs):
    plain = chain([3], keras.layers.Dense(2), name="net")
    model = towers.TowerModel(plain, placement(n, **kwargs))
    model.compile("sgd", "mse")
    return model


def printed(*args, model=None, **kwargs):
    """What a `fit` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        (model or net()).fit(X, Y, *args, batch_size=4, **kwargs)
    return out.getvalue()


class DescriptionsTest(parameterized.TestCase):
    @parameterized.parameters(
        (1, "<TowerModel of net: 1 tower on /CPU:0>"),
        (2, "<TowerModel of net: 2 towers on /CPU:0, /CPU:1>"),
        (
            40,
            "<TowerModel of net: 40 towers on /CPU:0, /CPU:1, /CPU:2, /CPU:3, "
            "/CPU:0, /CPU:1, ..., /CPU:3>",
        ),
    )
    def test_repr_and_print_name_towers_and_devices(self, n, expected):
        model = net(n)
        self.assertEqual([repr(model), str(model)], [expected] * 2)

    def test_notebooks_show_what_is_on_which_device(self):
        shown = net(2, parameter_device="/CPU:3")._repr_html_()
        for text in (
            "TowerModel of net: 2 towers on /CPU:0, /CPU:1",
            "tower_0 (50% of the rows), batches are split",
            # A kernel of 3 by 2, and a bias.
            "<tr><td>/CPU:3</td>",
            "32 bytes of variables, outputs are gathered",
        ):
            self.assertIn(text, shown)

    @parameterized.parameters(
        ({}, "outputs and loss on /CPU:0"),
        ({"parameter_device": "/CPU:3"}, "parameters on /CPU:3"),
        ({"parameter_device": towers.balanced(["/CPU:0"])}, "by a policy"),
        ({"layer_devices": {"dense": "/CPU:2"}}, "; 1 more in `layer_devices`"),
    )
    def test_the_line_of_a_fit(self, kwargs, expected):
        line = descriptions.first_line("net", placement(2, **kwargs))
        self.assertStartsWith(line, "net runs in 2 towers on /CPU:0, /CPU:1;")
        self.assertIn(expected, line)

    def test_the_first_fit_says_it_once_before_the_progress_bar(self):
        model = net()
        line = descriptions.first_line("net", model.placement)
        first, second = printed(model=model), printed(model=model)
        self.assertStartsWith(first, f"{line}\n")
        self.assertLen(first.split(line), 2)
        self.assertNotIn(line, second)
        self.assertNotEmpty(second)

    def test_it_is_silent_where_keras_is(self):
        self.assertEmpty(printed(verbose=0))
        model = net()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model.fit(X, Y, 4, 1, 0)  # the fifth is `verbose`
        self.assertEmpty(out.getvalue())
        keras.config.disable_interactive_logging()
        try:
            with self.assertLogs("absl", logging.INFO) as log:
                self.assertEmpty(printed())
        finally:
            keras.config.enable_interactive_logging()
        self.assertIn("net runs in 2 towers", log.output[0])

    def test_a_summary_ends_with_the_placement(self):
        model = net()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model.summary()
        lines = out.getvalue().strip().splitlines()
        self.assertEqual(lines[-1], str(model.placement))
        printed = []
        model.summary(None, None, printed.append)  # the third is `print_fn`
        self.assertEqual(printed[-1], str(model.placement))
