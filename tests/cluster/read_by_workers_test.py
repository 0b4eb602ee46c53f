"""`fit` with what workers read where they are."""

import sys

import pytest
from absl.testing import absltest
from chiefs import said


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes.")
@pytest.mark.slow
class FedWorkersTest(absltest.TestCase):
    def test_workers_read_for_fit_and_no_input_crosses(self):
        answer = said("read_by_workers.py")
        same = ("plain", "auto", "prefetch", "executions", "balanced", "open")
        for name in same:
            self.assertLess(answer[name], 1e-6, name)
        for name in ("crossing", "crossing auto"):
            narrow, wide, sent_over_inputs = answer[name]
            self.assertLess(abs(wide - narrow), 100, name)  # their rows' count
            self.assertLess(sent_over_inputs, 0.05, name)
        losing = answer["losing"]
        self.assertEqual(losing["towers"], [1, 1, 2, 2])
        self.assertEqual(losing["batches"], [5, 6, 6, 6])
        self.assertLess(losing["weights"], 1e-6)
        warned = [x for x in losing["warned"] if "worker" in x]
        self.assertLen(warned, 1)
        self.assertRegex(warned[0], "left out.*not read: 1 on /job:worker.*:1/")
        for message in answer["raising"]:
            self.assertRegex(message, "127.0.0.1")
