"""Training that survives the loss of workers, or of the chief.

What CI does is short. The whole of it:

    TOWERS_KILLS="6 4" pytest -m slow tests/cluster/going_on_test.py
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from unittest import mock

import keras
import pytest
from absl.testing import absltest
from chiefs import run_chief, said
from cluster_workers import wait_until

import towers
from towers.cluster.address import Address
from towers.cluster.heartbeat import Line
from towers.wrapper import watching

TESTS = pathlib.Path(__file__).parents[1]


def started(worker):
    """Names the start of the worker that answers here; None if none does yet."""
    there = Address.parse(worker)
    try:
        connection = socket.create_connection((there.host, there.heartbeat), 20)
        with Line(connection, 20) as line:
            return line.ask(hello=1)["incarnation"]
    except OSError:
        return None


@pytest.mark.slow
class GoingOnTest(absltest.TestCase):
    def test_no_batch_is_lost_nor_taken_twice(self):
        kills, returns = os.environ.get("TOWERS_KILLS", "2 1").split()
        told = said("going_on.py", kills, returns)
        self.assertLess(told["weights"], 1e-6, told)
        self.assertLess(told["history"], 1e-6, told)
        self.assertLess(told["by batch"], 1e-4, told)
        self.assertLess(max(told["open ends"]), 1e-6, told)
        self.assertEqual(told["mistaken"], ["InvalidArgumentError"] * 2)
        self.assertEqual(told["steps"], 120)
        self.assertEqual(told["kills"], int(kills))
        self.assertEqual(told["returned"], int(returns))
        self.assertContainsSubset([2, 3], told["towers"])
        warned = " ".join(x for x in told["warned"] if "Workers of" in x)
        for address in told["dead"]:
            self.assertRegex(warned, f"lost [^;]*{address}.*of 3 towers")
        self.assertEqual(warned.count("back: "), int(returns))
        for pattern, message in zip(
            (
                "`parameter_device` is .*task:0.*Backup",
                "`parameter_device` is a policy.*Backup",
                "`layer_devices` puts layers.*Backup",
                "`output_device` is .*task:0.*Backup",
                "steps_per_execution=2",
                "run_eagerly=True",
                "`train_step` of the model's own",
            ),
            told["refused"],
            strict=True,
        ):
            self.assertRegex(message, pattern)

    def test_variables_that_are_lost_come_from_the_last_checkpoint(self):
        told = said("restarting.py", "-", "-", "3", "15")
        self.assertLess(told["weights"], 1e-6, told)
        self.assertEqual((told["attempts"], told["towers"]), (3, 1))
        self.assertLess(max(told["took"]), 60, told)
        self.assertGreaterEqual(len(told["untouched"]), 8)
        self.assertTrue(all(told["untouched"]))

    def test_a_chief_that_dies_goes_on_with_the_same_workers(self):
        workers = subprocess.Popen(
            [sys.executable, TESTS / "cluster_workers.py", "2"],
            env={
                **os.environ,
                "PYTHONPATH": str(TESTS.parent),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            addresses, pids = json.loads(workers.stdout.readline())
            with tempfile.TemporaryDirectory() as folder:
                arguments = ",".join(addresses), folder, "3"
                kwargs = {"status": -signal.SIGKILL}
                run_chief("restarting.py", *arguments, "chief15", **kwargs)
                told = said("restarting.py", *arguments, "chief-1")
            self.assertLess(told["weights"], 1e-6, told)
            self.assertEqual(told["attempts"], 1)
            self.assertNotIn(None, told["starts"])
            for address, served, pid in zip(addresses, told["starts"], pids):
                # Nothing of the chief's is left: they have started anew.
                before = None, served
                wait_until(lambda a=address, b=before: started(a) not in b, 300)
                os.kill(pid, 0)  # it is there, the same process
        finally:
            os.killpg(workers.pid, signal.SIGKILL)
            workers.wait()
            workers.stdin.close()
            workers.stdout.close()


class OnLostTest(absltest.TestCase):
    def test_what_is_refused_without_a_cluster(self):
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        placement = towers.Placement(["/CPU:0", "/CPU:1"])
        for on_lost, pattern in (
            ("go on", "`on_lost` must be one of 'raise', 'continue'; got 'go"),
            ("continue", "this process has no cluster"),
        ):
            given = model, placement, "concat", False, (), False, on_lost
            with self.assertRaisesRegex(ValueError, pattern):
                towers.TowerModel(*given)

    def test_what_is_to_go_on_is_not_watched_while_it_is_made(self):
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        given = model, ["/CPU:0"], "concat", False, (), False, "continue"
        with mock.patch.object(watching, "watched") as watched:
            with self.assertRaisesRegex(ValueError, "has no cluster"):
                towers.TowerModel(*given)
        watched.assert_not_called()
