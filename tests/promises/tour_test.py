"""The notebook in examples/: executed, with its pictures, and it still runs so."""

import importlib
import json
import pathlib

import pytest
from absl.testing import absltest

import towers

PATH = pathlib.Path(towers.__file__).parent.parent / "examples" / "tour.ipynb"
DRAWN = "image/svg+xml"  # by Graphviz, where it is installed


def outputs_of(cells):
    """By code cell what is below it, without logs."""
    return [
        [o for o in cell["outputs"] if o.get("name") != "stderr"]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def kinds_of(outputs):
    return {kind for o in outputs for kind in o.get("data", ["printed"])}


class TourTest(absltest.TestCase):
    def test_it_was_executed_in_order_and_has_its_pictures(self):
        cells = json.loads(PATH.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        count = [cell["execution_count"] for cell in code]
        self.assertEqual(count, [*range(1, len(code) + 1)])
        every = sum(outputs_of(cells), [])
        self.assertNotIn("error", {o["output_type"] for o in every})
        pictures = {"image/png", DRAWN, "text/html"}
        self.assertContainsSubset(pictures, kinds_of(every))

    @pytest.mark.rare
    def test_it_runs_and_shows_what_it_did(self):
        nbformat = importlib.import_module("nbformat")
        client = importlib.import_module("nbclient")
        notebook = nbformat.read(PATH, 4)
        before = outputs_of(notebook["cells"])
        where = {"metadata": {"path": str(PATH.parent)}}
        client.NotebookClient(notebook, timeout=300, resources=where).execute()
        after = outputs_of(notebook["cells"])
        self.assertEqual(
            [kinds_of(cell) - {DRAWN} for cell in before],
            [kinds_of(cell) - {DRAWN} for cell in after],
        )
        self.assertIn("Equal: the towers' numbers", str(after))
