"""Clusters, in chiefs that have a process of their own, and so have workers."""

import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized

import towers

HERE = pathlib.Path(__file__).parent


def run_chief(name, *arguments, timeout=150):
    """What a script beside this file says; the end of it ends its workers."""
    paths = [HERE.parents[1], HERE, HERE.parent]
    chief = subprocess.Popen(
        [sys.executable, HERE / name, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = chief.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(chief.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        chief.wait()
    return chief.returncode, out, err


class ClusterTest(parameterized.TestCase):
    def test_connecting_and_losing(self):
        status, _, err = run_chief("connecting.py")
        self.assertEqual(status, 0, err[-5000:])

    @parameterized.parameters(
        ("10.0.0.2:2222", {}, TypeError, "`addresses` must be a list"),
        ([], {}, ValueError, "`addresses` is empty"),
        (["10.0.0.2"], {}, ValueError, r"`addresses\[0\]` must be 'host:port"),
        (["a:1", "a:1"], {}, ValueError, "a:1 twice"),
        (["a:1"], {"timeout": 0}, ValueError, "`timeout` must be more than 0"),
        (["a:1"], {"heartbeat": "5"}, TypeError, "`heartbeat` must be seconds"),
        (["a:1"], {"address": "b"}, ValueError, "`address` must be 'host:port"),
    )
    def test_arguments(self, addresses, kwargs, kind, pattern):
        with self.assertRaisesRegex(kind, pattern):
            towers.Cluster(addresses, **kwargs)

    @parameterized.parameters(
        ("", "it is not set"),
        ("{", "names no workers"),
        ('{"cluster": {"chief": ["a:1"]}}', "names no workers"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}',
            "this process is a worker",
        ),
    )
    def test_what_the_environment_must_say(self, config, pattern):
        with (
            mock.patch.dict(os.environ, {"TF_CONFIG": config}),
            self.assertRaisesRegex(ValueError, pattern),
        ):
            towers.Cluster.from_environment()


if __name__ == "__main__":
    absltest.main()
