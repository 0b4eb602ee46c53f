"""commands: models from files and functions, and the command line as users call it."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import types
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest
from models import DEVICES, NAMED, attention, chain, cnn, inputs, make

import towers
from towers import __main__
from towers.planning import commands
from towers.report.report import ExecutionReport

COMMAND_LINE = [sys.executable, "-m", "towers"]


def saved(model=cnn):
    path = os.path.join(tempfile.mkdtemp(), "model.keras")
    make(model).save(path)
    return path


def called(*arguments, cwd=None, log_level="3"):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    if log_level:
        env["TF_CPP_MIN_LOG_LEVEL"] = log_level
    return subprocess.run(
        [*COMMAND_LINE, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


class CommandsTest(absltest.TestCase):
    def test_models(self):
        model = commands.loaded(saved())
        x = inputs(model, 3)
        np.testing.assert_allclose(model(x), make(cnn)(x), atol=1e-6)
        sys.modules["made_here"] = types.SimpleNamespace(
            good=lambda: make(cnn), other=lambda: 3, bad=lambda: 1 / 0
        )
        self.assertIsInstance(commands.loaded("made_here:good"), keras.Model)
        sys.modules["made_here"].made = model
        self.assertIs(commands.loaded("made_here:made"), model)
        for source, words in (
            ("nowhere.keras", "no file nowhere.keras"),
            ("made_here:other", "returned a int"),
            ("made_here:bad", "ZeroDivisionError"),
            ("not_there_at_all:f", "ModuleNotFoundError"),
            (__file__, "cannot be loaded"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                commands.loaded(source)

    def test_a_lambda_in_a_file_is_not_run(self):
        path = os.path.join(tempfile.mkdtemp(), "model.keras")
        chain([3], keras.layers.Lambda(lambda x: x + 1)).save(path)
        with self.assertRaisesRegex(ValueError, "cannot be loaded"):
            commands.loaded(path)

    @pytest.mark.slow
    def test_a_step_of_every_model(self):
        placement = commands.placement_of(DEVICES[:2], ["2", "1"], "balanced")
        for name, model in NAMED:
            if name == "subclassed":  # says nothing of its inputs
                continue
            with self.subTest(name):
                step = commands.step_of(make(model), placement, 6, "predict")
                self.assertIsNotNone(step[0](*step[1:]))

    def test_a_step(self):
        placement = commands.placement_of(DEVICES[:2], ["2", "1"], "balanced")
        self.assertEqual(placement.weights, (2.0, 1.0))
        step = commands.step_of(make(attention), placement, 6)
        towers.execution_report(*step).assert_runs_on("tower_1", DEVICES[1])
        with self.assertRaisesRegex(ValueError, "--batch must be at least 1"):
            commands.step_of(make(cnn), placement, 0)

    def test_endings(self):
        for flag, good in (("html", "a.HTML"), ("save", "a.json")):
            commands.check_flag_ending(flag, good)
            with self.assertRaisesRegex(ValueError, f"--{flag}.*a.xyz.*end in"):
                commands.check_flag_ending(flag, "a.xyz")
        commands.check_flag_ending("picture", "a.dot")

    def test_devices(self):
        for device in DEVICES:
            self.assertIn(device, commands.device_table())

    @pytest.mark.rare
    def test_machines_that_are_named(self):
        self.assertEqual(
            commands.machine_for(["/GPU:1", "/cpu:0"]), {"CPU": 1, "GPU": 2}
        )
        self.assertEqual(
            commands.machine_for(["/CPU:0", "/job:worker/task:1/GPU:3"]),
            [{"CPU": 1, "GPU": 0}, {"CPU": 1, "GPU": 4}],
        )
        with self.assertRaisesRegex(ValueError, "no device of a machine"):
            commands.machine_for(["/job:worker"])

    def test_mistakes_are_told_in_a_line(self):
        model, where = saved(), f"--devices={','.join(DEVICES[:2])}"
        for arguments, words in (
            (["plan", model, "--devices=/TPU:0"], "/TPU:0"),
            (["report", "nowhere.keras", where], "There is no file"),
            (["report", model, "--devices=/GPU:9"], "TensorFlow sees only"),
            (["report", model, where, "--batch=many"], "--batch: .*'many'"),
            (["report", where], "are required: model"),
            (["repot", model, where], "Did you mean report"),
            (["report", "nowhere", where, "--figure=a.xyz"], "end in .*.png"),
        ):
            with (
                contextlib.redirect_stderr(io.StringIO()) as stream,
                self.assertRaisesRegex(SystemExit, "^2$"),
            ):
                __main__.main(["towers", *arguments])
            (line,) = stream.getvalue().splitlines()
            self.assertRegex(line, words)
        with (
            contextlib.redirect_stdout(io.StringIO()) as stream,
            self.assertRaisesRegex(SystemExit, "^0$"),
        ):
            __main__.main(["towers", "--version"])
        self.assertEqual(stream.getvalue(), f"{towers.__version__}\n")

    def test_a_step_that_is_checked(self):
        asked = ["report", saved(), f"--devices={','.join(DEVICES[:2])}"]

        def done():
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                __main__.main(["towers", *asked, "--batch=6", "--check"])
            return stream.getvalue()

        self.assertIn("All ops of 2 towers ran where asked", done())
        elsewhere = mock.patch.object(
            ExecutionReport, "assert_runs_on", side_effect=AssertionError
        )
        with elsewhere, self.assertRaisesRegex(SystemExit, "^1$"):
            done()

    @pytest.mark.rare
    def test_the_command_line(self):
        folder, model = tempfile.mkdtemp(), saved()
        where = f"--devices={','.join(DEVICES[:2])}"
        done = called(
            *("report", model, where, "--batch=6", "--html=report.html"),
            *("--json=report.json", "--loops", "--check"),
            cwd=folder,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Wrote report.html", done.stdout)
        self.assertIn("All ops of 2 towers ran where asked", done.stdout)
        self.assertIn("nothing crossed twice", done.stdout)
        with open(os.path.join(folder, "report.json")) as file:
            self.assertNotEmpty(json.load(file)["transfers"])
        self.assertTrue(os.path.exists(os.path.join(folder, "report.html")))
        done = called(
            *("timeline", model, where, "--save=step.json"),
            "--html=step.html",
            cwd=folder,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"/CPU:\d waited for ")
        for name in ("step.json", "step.html"):
            self.assertTrue(os.path.exists(os.path.join(folder, name)))
        done = called("compare", model, where, "--batch=6")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Equal: the towers' numbers", done.stdout)
        gpus = "--devices=/GPU:0,/GPU:1"
        for there, status in ((2, 0), (1, 1)):
            machine = (gpus, f"--gpus={there}", "--strict")
            done = called("plan", model, *machine)
            if "cannot know" in done.stderr:  # no kernels for GPUs
                status = 2
            self.assertEqual(done.returncode, status, done.stderr)
        done = called("report", "--help", log_level=None)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("python -m towers report model.keras", done.stdout)
        self.assertIn("--parameter-device", done.stdout)
