"""What a user reads is run: docstrings and the examples; see `blocks_test.py`."""

import doctest
import importlib
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
import tempfile
import unittest

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import towers

ROOT = pathlib.Path(towers.__file__).parent.parent
MODULES = [
    m.name.removeprefix("towers.")
    for m in pkgutil.walk_packages(towers.__path__, "towers.")
    if not m.ispkg
]
# Files that have no test of their own, and those that would fail.
TESTED_BY = {
    "__main__": "cluster.worker",
    "cluster.members": "cluster.cluster",
    "cluster.pulse": "cluster.heartbeat",
    "cluster.schedulers": "cluster.cluster",
    "verbs.arrivals": "wrapper.prefetch",
    "wrapper.recovery": "cluster.going_on",
    "wrapper.repeated_step": "cluster.going_on",
    "engine.all_towers": "engine.meeting",
    "engine.calls": "wrapper.jit",
    "engine.draws": "keras_model.tower_draws",
    "engine.fragments": "engine.copies",
    "engine.row_kinds": "engine.row_sums",
    "engine.row_ops": "engine.row_sums",
    "engine.row_products": "engine.row_sums",
    "engine.row_reductions": "engine.row_sums",
    "engine.row_shapes": "engine.row_sums",
    "engine.row_slices": "engine.row_sums",
    "builder": "build",
    "eager": "build",
    "log_level": "planning.commands",
    "planning.slices": "planning.timeline",
    "planning.timeline_page": "planning.timeline",
    "foreign.keras_optimizer": "foreign.keras_updates",
    "foreign.tf_calls": "report.recording",
    "foreign.tf_errors": "keras_model.memory",
    "foreign.tf_saved_model": "export",
    "keras_model.rehearsal": "keras_model.tower_draws",
    "keras_model.whereabouts": "keras_model.parameter_copies",
    "keras_model.model_calls": "wrapper.arguments",
    "keras_model.draw_look": "keras_model.tower_draws",
    "keras_model.findings": "keras_model.batchless",
    "keras_model.drawn_shapes": "keras_model.tower_draws",
    "keras_model.notes": "keras_model.hooks",
    "keras_model.layer_graph": "keras_model.layer_devices",
    "keras_model.brought": "keras_model.hooks",
    "keras_model.pieces.activations": "keras_model.pieces.computed",
    "keras_model.pieces.cuts": "keras_model.pieces.cut_in_place",
    "keras_model.pieces.dropout": "keras_model.pieces.computed",
    "keras_model.pieces.heads": "keras_model.pieces.kinds_in_pieces",
    "keras_model.pieces.lookup": "keras_model.pieces.kinds_in_pieces",
    "keras_model.pieces.piece_scopes": "keras_model.pieces.computed",
    "keras_model.pieces.starts": "keras_model.pieces.made_cut",
    "keras_model.pieces.joined": "keras_model.pieces.cut_in_place",
    "keras_model.pieces.assembled": "keras_model.pieces.computed",
    "keras_model.pieces.whole": "keras_model.pieces.cut_in_place",
    "keras_model.pieces.recut": "keras_model.pieces.cut_in_place",
    "keras_model.moments": "keras_model.state",
    "keras_model.parameter_copies": "keras_model.parameters",
    "keras_model.outputs": "foreign.keras_layers",
    "keras_model.reads": "keras_model.halves",
    "keras_model.replay": "keras_model.hooks",
    "keras_model.homes": "keras_model.parameters",
    "keras_model.request": "build",
    "keras_model.row_order": "keras_model.batchless",
    "keras_model.signature": "keras_model.checks",
    "keras_model.sources": "keras_model.shared_state",
    "keras_model.table_look": "keras_model.row_tables",
    "keras_model.tower": "build",
    "keras_model.tower_losses": "keras_model.losses",
    "planning.compared_steps": "planning.compare",
    "planning.figures": "planning.compare",
    "planning.machines": "planning.plan",
    "planning.suspects": "planning.compare",
    "planning.trace_events": "planning.timeline",
    "planning.waits": "planning.timeline",
    "readers": "inputs_per_tower",
    "session_values": "v1_graph",
    "verbs.stand_ins": "keras_model.row_tables",
    "reading": "wrapper.feeding",
    "report.execution": "report.report",
    "report.executed": "report.sent_kinds",
    "report.moved": "report.answers",
    "report.parts": "report.sent_kinds",
    "report.plain": "report.report",
    "report.values": "report.sent_kinds",
    "report.colours": "report.html",
    "report.text": "report.report",
    "report.variables": "report.report",
    "report.html_devices": "report.html",
    "report.html_page": "report.html",
    "report.html_tables": "report.html",
    "placement.device_names": "placement.placement",
    "placement.layer_devices": "placement.placement",
    "planning.crossings": "planning.plan",
    "planning.oversized": "planning.spread",
    "planning.plan_graphs": "planning.plan",
    "planning.steps": "planning.spread",
    "placement.policies": "keras_model.parameters",
    "placement.weights": "placement.placement",
    "placement.worked_out": "placement.placement",
    "verbs.batch": "verbs.split",
    "verbs.join": "engine.meeting",
    "verbs.rows": "verbs.scatter",
    "engine.warned": "wrapper.warned",
    "wrapper.distributed": "placement.from_layout_map",
    "wrapper.fed_steps": "wrapper.feeding",
    "wrapper.jit_choice": "wrapper.jit",
    "wrapper.joined_batch": "wrapper.feeding",
    "wrapper.model_export": "export",
    "wrapper.multi_gpu": "wrapper.tower_model",
    "wrapper.tower_calls": "wrapper.own_steps",
    "wrapper.tower_functions": "wrapper.devices",
    "wrapper.tower_steps": "wrapper.own_steps",
    "wrapper.watching": "cluster.going_on",
}


class ReadTest(parameterized.TestCase):
    @parameterized.parameters(*MODULES)
    def test_docstrings(self, name):
        module = importlib.import_module(f"towers.{name}")
        names = {
            "towers": towers,
            "tf": tf,
            "keras": keras,
            "np": np,
            "os": os,
            "tempfile": tempfile,
        }
        result = unittest.TestResult()
        doctest.DocTestSuite(
            module,
            extraglobs=names,
            # So that long errors may be broken.
            optionflags=doctest.NORMALIZE_WHITESPACE,
        ).run(result)
        self.assertEqual([e for _, e in result.failures + result.errors], [])

    def test_every_public_name_has_a_docstring_with_an_example(self):
        records = ["Comparison", "ExecutionReport", "PlacementPlan", "Timeline"]
        records += ["Tower", "TowerGraph"]
        for name in towers.__all__:
            text = getattr(towers, name).__doc__
            self.assertTrue(text, name)
            if name not in records:
                self.assertIn(">>>", text, name)

    def test_every_module_has_a_test_or_is_run_by_one(self):
        tests = {
            ".".join(path.relative_to(ROOT / "tests").parts)
            for path in (ROOT / "tests").rglob("*_test.py")
        }
        missing = [
            m for m in MODULES if f"{TESTED_BY.get(m, m)}_test.py" not in tests
        ]
        self.assertEqual(missing, [])
        self.assertContainsSubset(TESTED_BY, MODULES)

    @pytest.mark.slow
    def test_examples(self):
        rounding = r"(\d\.\de-(0[6-9]|[1-9]\d)|0\.0e\+00)"
        last_lines = {
            ("mnist_cnn.py", "--epochs=1"): r"Test accuracy: 0\.\d{4}\n$",
            ("two_towers.py",): r"step 100  loss 0\.0\d+\n$",
            ("session_loop.py",): r"Session: (0\.9\d+|1\.0+)\nKeras: \1\n$",
            ("tower_loss.py",): r"step  60  loss 2\.\d+\n$",
            ("contrastive.py",): rf"weights differ by {rounding}\n$",
            ("pipeline.py",): rf"weights differ by {rounding} from the .*\n$",
            (
                *("planned_cluster.py", "--machines=3", "--gpus=1"),
            ): r"GPUs \| \d+ \| ([\d.]+ MB) \| ([\d.]+ MB) \| \1, \2 \|\n$",
            ("serve.py",): r"for_gpus \(7, 3\)\nplain \(7, 3\)\n$",
        }
        commands = [
            [str(ROOT / "examples" / file), *flags]
            for file, *flags in last_lines
        ]
        done = run("tests/programs/forked.py", json.dumps(commands))
        self.assertEqual(done.returncode, 0, done.stderr)
        data = json.loads(done.stdout.splitlines()[-1])
        for command, last, (status, out, err) in zip(
            commands, last_lines.values(), data, strict=True
        ):
            with self.subTest(command=command):
                self.assertEqual(status, 0, err)
                self.assertRegex(out, last)

    @pytest.mark.slow
    def test_the_example_that_loses_a_worker(self):
        done = run(ROOT / "examples" / "cluster.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"towers 1\n40 steps, of 40\n$")

    @pytest.mark.slow
    def test_the_benchmark(self):
        done = run(
            ROOT / "examples" / "benchmark.py",
            *("--quick", "--models=cnn", "--towers=2"),
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        last = r"towers 2 / classic 2: \d\.\d+ .*\n\n.* TensorFlow [\d.]+\n$"
        self.assertRegex(done.stdout, last)

    @pytest.mark.slow
    def test_the_benchmark_of_workers(self):
        done = run(
            ROOT / "examples" / "benchmark_workers.py",
            *("--width=2", "--batch=8", "--rounds=1", "--steps=1"),
            "--ways=plain,selfloss",
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        last = r"selfloss .* ms .*CPU .* ms  \d+ transfers, [\d,]+ bytes\n$"
        self.assertRegex(done.stdout, last)


def run(file, *arguments):
    """A Python program in a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / file, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
    )
