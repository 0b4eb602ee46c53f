"""Clusters, in chiefs that have a process of their own, and so have workers."""

import json
import os
from unittest import mock

import pytest
import tensorflow as tf
from absl.testing import parameterized
from chiefs import run_chief

import towers


class ClusterTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_connecting_and_losing(self):
        run_chief("connecting.py")

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

    @parameterized.parameters(
        ({"worker": ["a:1"], "ps": ["b:1"]}, None, "the job 'ps'"),
        ({"chief": ["a:1"]}, None, "names no workers"),
        ({}, None, "names no workers"),
        ({"worker": ["a:1"]}, "worker", "this process is worker 0"),
        (
            {"worker": ["a:1"], "chief": ["b:1"], "master": ["c:1"]},
            None,
            "2 chiefs, b:1, c:1",
        ),
    )
    def test_what_a_resolver_must_say(self, jobs, task_type, pattern):
        with self.assertRaisesRegex(ValueError, f"^`resolver`.*{pattern}"):
            towers.Cluster.from_resolver(resolver(jobs, task_type))
        with self.assertRaisesRegex(TypeError, "`resolver` must be one of"):
            towers.Cluster.from_resolver(jobs)

    def test_a_resolver_tells_workers_and_where_this_process_is(self):
        class Told(towers.Cluster):
            def __init__(self, *args):
                self.told = args

        chief = {"chief": ["a:1"]}
        for jobs, own in (
            ({}, None),
            (chief, "a:1"),
            ({"master": ["b:1"]}, "b:1"),
        ):
            jobs = {**jobs, "worker": {3: "c:1", 5: "d:1"}}
            cluster = Told.from_resolver(resolver(jobs), 7, 8.0)
            self.assertEqual(cluster.told, (["c:1", "d:1"], own, 7, 8.0))
        config = {"cluster": {**chief, "worker": ["c:1"]}}
        for task, pattern in (("chief", None), ("worker", "is worker 0")):
            config["task"] = {"type": task, "index": 0}
            result = mock.patch.dict(
                os.environ, {"TF_CONFIG": json.dumps(config)}
            )
            asked = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            with result:
                if pattern is None:
                    cluster = Told.from_resolver(asked)
                    self.assertEqual(cluster.told[:2], (["c:1"], "a:1"))
                else:
                    with self.assertRaisesRegex(ValueError, pattern):
                        Told.from_resolver(asked)


def resolver(jobs, task_type=None):
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type=task_type, task_id=0
    )
