"""Tables that are large, on workers."""

import sys

import pytest
from absl.testing import absltest
from chiefs import said


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes.")
@pytest.mark.rare
class LargeTablesTest(absltest.TestCase):
    def test_a_step_waits_for_a_table_and_sends_ids_and_rows(self):
        told = said("large_tables.py")
        self.assertLess(told["first step"], 1e-6)
        self.assertLess(told["set"], 1e-6)
        self.assertBetween(told["sent"], 1.0, 1.03)
        self.assertLess(told["more"], 10_000)
