"""summary: sums by device and machine, and who shows them."""

import pathlib
import tempfile

import tensorflow as tf
from absl.testing import parameterized

from towers.report.partitions import Transfer
from towers.report.report import ExecutionReport
from towers.report.summary import least_bytes, machine_of, size

HERE = "/job:localhost/replica:0/task:0"
ONE, TWO = (f"/job:worker/replica:0/task:{i}" for i in (0, 1))


def crossing(source, target, rows):
    return Transfer(source, target, "x:0", tf.float32, (rows,), 1)


def report():
    """Parameters from here to two machines, one of which passes them on."""
    one, two = f"{ONE}/device:GPU:0", f"{TWO}/device:GPU:0"
    return ExecutionReport(
        nodes=((one, "a", "MatMul"), ("/CPU:0", "b", "Add")),
        transfers=(
            crossing("/CPU:0", one, 100),
            crossing("/CPU:0", two, 100),
            crossing(two, f"{TWO}/device:GPU:1", 100),
            crossing("/CPU:0", "/CPU:1", 7),
            crossing(one, "/CPU:0", 25),
        ),
        variables=(),
        least_bytes=1300,
        least_between_machines=900,
    )


class SummaryTest(parameterized.TestCase):
    def test_what_leaves_a_machine(self):
        summary = report()
        self.assertEqual(
            summary.between_machines,
            {(HERE, ONE): 400, (HERE, TWO): 400, (ONE, HERE): 100},
        )
        self.assertEqual(summary.busiest_link, (HERE, 800, 100))
        self.assertEqual(summary.total_bytes, 1328)
        self.assertEqual(
            summary.summary.machines,
            {
                HERE: ["/CPU:0", "/CPU:1"],
                ONE: [f"{ONE}/device:GPU:0"],
                TWO: [f"{TWO}/device:GPU:0", f"{TWO}/device:GPU:1"],
            },
        )
        self.assertEqual(summary.to_dict()["least_between_machines"], 900)

    def test_text_and_page_tell_of_machines(self):
        summary = report()
        self.assertIn(
            "Between machines: 900 B; nothing crossed twice. The busiest link "
            f"is that of {HERE}: 800 B out, 100 B in",
            str(summary),
        )
        with tempfile.TemporaryDirectory() as folder:
            page = pathlib.Path(folder, "report.html")
            summary.save(page)
            text = page.read_text()
        self.assertEqual(text.count('class="machine"'), 3)
        self.assertIn("<caption>Between machines</caption>", text)
        self.assertIn(f"is that of {HERE}: 800 B out, 100 B in<", text)

    def test_one_machine_says_nothing_of_others(self):
        result = ExecutionReport((), (crossing("/CPU:0", "/CPU:1", 7),), (), 28)
        self.assertIsNone(result.busiest_link)
        for text in (str(result), result._repr_html_()):
            self.assertNotIn("machine", text)

    def test_a_value_counts_once_for_each_place(self):
        sent = {
            ("w", "/CPU:0", f"{ONE}/device:GPU:0"): 4,
            ("w", "/CPU:0", f"{ONE}/device:GPU:1"): 4,
            ("x", f"{ONE}/device:GPU:0", f"{ONE}/device:GPU:1"): 8,
            ("y", "/CPU:0", "/CPU:0"): 16,
        }
        self.assertEqual(least_bytes(sent), 16)
        self.assertEqual(least_bytes(sent, machine_of), 4)

    @parameterized.parameters(
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12345, "12.3 kB"),
        (123456789, "123 MB"),
        (10**10, "10.0 GB"),
    )
    def test_sizes(self, count, text):
        self.assertEqual(size(count), text)
