"""Workers of several devices: what is sent crosses once per machine."""

import sys

import pytest
from absl.testing import parameterized
from chiefs import said

_ASIDE = 25_000  # bytes of a step: calls, and where each tensor is asked for


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes.")
class MachinesTest(parameterized.TestCase):
    @parameterized.parameters(
        (2, "cnn", "mixed"),
        (2, "lstm", "small", "embedding", "frozen"),
        (4, "cnn", "lstm", "small", "embedding", "frozen", "mixed"),
    )
    @pytest.mark.slow
    @pytest.mark.rare(after=1)
    def test_bytes_are_of_machines_and_weights_of_the_plain_model(
        self, devices, *models
    ):
        answer = said("once_per_machine.py", str(devices), *models)
        self.assertNotEmpty(answer)
        for name, (difference, sent, least, *reported) in answer.items():
            with self.subTest(name):
                total, once, *planned = reported
                self.assertLen(planned, name.startswith(("cnn", "mixed")))
                for count in planned:
                    self.assertBetween(count, total, 1.002 * total)
                self.assertBetween(total, once, 1.001 * once)
                self.assertBetween(total, 0.97 * least, 1.02 * least + 2000)
                self.assertLess(difference, 1e-6)
                self.assertBetween(
                    sent, 0.97 * least, 1.02 * least + _ASIDE, name
                )

    @pytest.mark.slow
    def test_what_is_merged_crosses_once_from_each_of_them_on_workers(self):
        answer = said("once_per_machine.py", "2", "counted")
        self.assertLen(answer, 2)
        for difference, sent in answer:
            self.assertLess(difference, 1e-6)
            # Parts of the compiled loss with the metric's, and an added loss; a
            # counter; a parcel of gradients, and one of the maxima of float8.
            kinds = {"outputs": 2, "state": 1, "gradient": 1 + 1}
            self.assertEqual(sent, kinds)
