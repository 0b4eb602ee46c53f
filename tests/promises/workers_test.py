"""Towers in two worker processes: the same weights, each byte once."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from absl.testing import absltest

HERE = pathlib.Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


class WorkersTest(absltest.TestCase):
    @pytest.mark.slow
    def test_two_processes_train_the_plain_model(self):
        ports = [free_port(), free_port()]
        cluster = json.dumps({"worker": [f"127.0.0.1:{p}" for p in ports]})
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        workers = [
            subprocess.Popen(
                [sys.executable, HERE / "worker.py", cluster, str(i)],
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            for i in range(2)
        ]
        try:
            for port in ports:
                wait_for(port)
            done = subprocess.run(
                [sys.executable, HERE / "chief.py", cluster],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout.splitlines()[-1])
        self.assertLess(report["difference"], 1e-6)
        self.assertLess(report["difference from generators"], 1e-6)
        self.assertLess(report["bytes over least"], 1.03)
        self.assertBetween(report["bytes over reported"], 1.0, 1.03, report)


if __name__ == "__main__":
    absltest.main()
