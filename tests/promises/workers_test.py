"""Towers in worker processes: the same weights, each byte once, no input twice."""

import sys

import pytest
from absl.testing import absltest
from chiefs import said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes.")
class WorkersTest(absltest.TestCase):
    def test_processes_train_the_plain_model_and_each_byte_crosses_once(self):
        answer = said("chief.py")
        self.assertLess(answer["difference"], 1e-6)
        self.assertLess(answer["difference from generators"], 1e-6)
        self.assertLen(answer["bytes"], 4)
        for n, where, over_least, least_over_reported in answer["bytes"]:
            self.assertBetween(over_least, 1.0, 1.03, (n, where))
            self.assertBetween(least_over_reported, 0.99, 1.0, (n, where))
        bytes_over_inputs, error = answer["own inputs"]
        self.assertLess(bytes_over_inputs, 0.1)
        self.assertLess(error, 1e-6)
