"""`python -m towers worker`, as a process of its own."""

import contextlib
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from absl.testing import parameterized
from chiefs import end
from cluster_workers import free_ports

import towers
from towers import __main__
from towers.cluster.heartbeat import Line

ROOT = pathlib.Path(towers.__file__).parents[1]


def command(*flags):
    return subprocess.Popen(
        [sys.executable, "-m", "towers", *flags],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def line_with(process, word):
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"The worker has ended without saying {word!r}.")


class WorkerTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_a_worker_starts_anew_without_its_chief_and_ends_when_told(self):
        (port,) = free_ports(1)
        process = command("worker", f"--port={port}")
        self.addCleanup(end, process)
        answer = line_with(process, "CPU:0")
        self.assertIn("no authentication", answer)
        self.assertIn("Trusted networks only", answer)
        beat = port + 1000 if port <= 64535 else port - 1000

        def call():
            return Line(socket.create_connection(("127.0.0.1", beat), 5), 5)

        with call() as line:
            first = line.ask(hello=1, chief="test")
            self.assertEqual(first["devices"], ["CPU:0"])
            line.end()
        line_with(process, "starting anew")
        line_with(process, "CPU:0")
        with call() as line:
            self.assertNotEqual(
                line.ask(hello=1)["incarnation"], first["incarnation"]
            )
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)

    @parameterized.parameters(
        ({"port": 70000}, ValueError, "`port` must have a port from 1"),
        ({"port": "1"}, TypeError, "`port` must have"),
        ({"port": 1, "heartbeat_port": 0}, ValueError, "`heartbeat_port`"),
        ({"port": 1, "threads": 0}, ValueError, "`threads` must be"),
        ({"port": 1, "host": "192.0.2.1"}, OSError, "'192.0.2.1' cannot be"),
    )
    def test_arguments(self, kwargs, kind, pattern):
        with self.assertRaisesRegex(kind, pattern):
            towers.serve(**kwargs)

    def test_ports_that_are_taken_are_named(self):
        (port,) = free_ports(1)
        with (
            socket.create_server(("127.0.0.1", port + 1000)),
            self.assertRaisesRegex(OSError, "`heartbeat_port`.*listened on"),
        ):
            towers.serve(port, heartbeat_port=port + 1000)
        with (
            socket.create_server(("127.0.0.1", port)),
            self.assertRaisesRegex(OSError, f"`port` {port}.*taken"),
        ):
            towers.serve(port, heartbeat_port=port + 1000)

    def test_the_commands_are_listed(self):
        stream = io.StringIO()
        with (
            contextlib.redirect_stderr(stream),
            self.assertRaisesRegex(SystemExit, "^2$"),
        ):
            __main__.main(["towers"])
        self.assertIn("  worker  ", stream.getvalue())
