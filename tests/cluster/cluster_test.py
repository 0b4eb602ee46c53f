"""Clusters, in chiefs that have a process of their own, and so have workers."""

import os
from unittest import mock

import pytest
from absl.testing import absltest, parameterized
from cluster_chiefs import run_chief

import towers


class ClusterTest(parameterized.TestCase):
    @pytest.mark.slow
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
