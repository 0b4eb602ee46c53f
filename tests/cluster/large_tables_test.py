"""Tables that are large, on workers."""

import sys

import pytest
from absl.testing import absltest
from chiefs import said


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes.")
@pytest.mark.rare
class LargeTablesTest(absltest.TestCase):
    def test_a_step_waits_for_a_table_and_sends_ids_and_rows(self):
        answer = said("large_tables.py")
        self.assertLess(answer["first step"], 1e-6)
        self.assertLess(answer["set"], 1e-6)
        self.assertBetween(answer["sent"], 1.0, 1.03)
        self.assertLess(answer["more"], 10_000)
