"""Placement: names, weights and their errors."""

import dataclasses
import inspect

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import towers


class PlacementTest(parameterized.TestCase):
    @parameterized.parameters(
        "/CPU:1",
        "cpu:1",
        "CPU:1",
        "/device:cpu:1",
        "/job:localhost/replica:0/task:0/device:CPU:1",
        tf.DeviceSpec(device_type="CPU", device_index=1),
    )
    def test_any_spelling_means_the_same_device(self, name):
        self.assertEqual(towers.Placement([name]).devices, ("/CPU:1",))

    def test_logical_devices_are_names(self):
        devices = tf.config.list_logical_devices("CPU")[:2]
        self.assertEqual(
            towers.Placement(devices).devices, ("/CPU:0", "/CPU:1")
        )

    def test_equal_placements_are_one_key(self):
        both = [
            towers.Placement(["/CPU:1"], layer_devices={"a": name})
            for name in ("CPU:0", "/device:CPU:0")
        ]
        self.assertEqual(both[0], both[1])
        self.assertLen(set(both), 1)
        self.assertIn("a on /CPU:0", str(both[0]))
        self.assertIn(str(both[0]), both[0]._repr_html_())

    @parameterized.parameters(
        ("balanced", ["/CPU:1", "/CPU:0", "/CPU:1"]),
        ("round_robin", ["/CPU:1", "/CPU:0", "/CPU:1"]),
    )
    def test_a_policy_by_its_name_is_over_the_towers_devices(self, name, where):
        devices = ["/CPU:1", "/CPU:0", "/CPU:1"]
        placement = towers.Placement(devices, name)
        variables = [tf.Variable(np.ones(n)) for n in (4, 2, 1)]
        self.assertEqual(placement.parameter_device(variables)[:2], where[:2])
        named = getattr(towers, name)(devices[:2])
        self.assertEqual(
            placement.parameter_device(variables), named(variables)
        )

    def test_without_gpus_the_error_says_what_to_do(self):
        if tf.config.list_physical_devices("GPU"):
            self.skipTest("there is one")
        for words in ("tensorflow.and-cuda", "CUDA_VISIBLE", r"cpus\(3\)"):
            with self.assertRaisesRegex(ValueError, words):
                towers.Placement.gpus(3)

    def test_many_layers_on_a_device_are_not_all_printed(self):
        pins = {f"layer_{i}": "/CPU:1" for i in range(9)}
        text = str(towers.Placement(["/CPU:0"], layer_devices=pins))
        self.assertEndsWith(text, "; layer_0 and 8 more on /CPU:1")

    def test_output_device_follows_the_parameters(self):
        one = towers.Placement(["/CPU:1"], parameter_device="/CPU:2")
        policy = towers.Placement(
            ["/CPU:1"], parameter_device=lambda vs: ["/CPU:0"] * len(vs)
        )
        self.assertEqual(one.output_device, "/CPU:2")
        self.assertEqual(policy.output_device, "/CPU:1")

    def test_any_checks_the_spelling_only(self):
        placement = towers.Placement(["gpu:7"], available="any")
        self.assertEqual(placement.devices, ("/GPU:7",))

    def test_is_immutable(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            towers.Placement(["/CPU:0"]).devices = ()

    def test_cpus_takes_the_first(self):
        self.assertEqual(
            towers.Placement.cpus(2, weights=[1, 3]).devices,
            ("/CPU:0", "/CPU:1"),
        )

    @parameterized.named_parameters(
        ("empty", dict(devices=[]), ValueError, "devices.*empty"),
        ("text", dict(devices="/CPU:0"), TypeError, "devices.*list"),
        ("number", dict(devices=2), TypeError, "devices.*list"),
        ("unknown", dict(devices=["/GPU:7"]), ValueError, "GPU:7.*sees only"),
        ("malformed", dict(devices=["/CPU:x"]), ValueError, "no device name"),
        ("typo", dict(devices=["/CPU0"]), ValueError, "no device name"),
        ("none", dict(devices=[None]), TypeError, r"devices\[0\]"),
        (
            "parameters",
            dict(devices=["/CPU:0"], parameter_device="/CPU:9"),
            ValueError,
            "parameter_device.*CPU:9",
        ),
        (
            "output",
            dict(devices=["/CPU:0"], output_device="/CPU:9"),
            ValueError,
            "output_device.*CPU:9",
        ),
        (
            "input",
            dict(devices=["/CPU:0"], input_device="/CPU:9"),
            ValueError,
            "input_device.*CPU:9",
        ),
        (
            "available",
            dict(devices=["/CPU:0"], available="all"),
            ValueError,
            "available",
        ),
        *(
            (
                f"weights_{i}",
                dict(devices=["/CPU:0", "/CPU:1"], weights=weights),
                ValueError,
                "`weights` must be 2",
            )
            for i, weights in enumerate(
                [[1], [1, -1], [0, 0], [1, np.nan], [1, np.inf], []]
            )
        ),
        (
            "key",
            dict(devices=["/CPU:0"], layer_devices={0: "/CPU:0"}),
            TypeError,
            "got the key 0",
        ),
        (
            "weights_text",
            dict(devices=["/CPU:0"], weights="1"),
            TypeError,
            "`weights`",
        ),
    )
    def test_bad_arguments_are_refused(self, arguments, error, message):
        with self.assertRaisesRegex(error, message):
            towers.Placement(**arguments)

    @parameterized.parameters(0, -1)
    def test_cpus_refuses_less_than_one(self, n):
        with self.assertRaisesRegex(ValueError, "`n` must be at least 1"):
            towers.Placement.cpus(n)

    def test_cpus_refuses_more_than_there_are(self):
        tf.constant(0)  # TensorFlow has started
        with self.assertRaisesRegex(RuntimeError, r"cpus\(64\).*already"):
            towers.Placement.cpus(64)

    @parameterized.parameters("cpus", "gpus", "workers")
    def test_ways_to_one_have_its_own_arguments(self, way):
        def optional(function):
            taken = inspect.signature(function).parameters.values()
            return {
                p.name: p.default
                for p in taken
                if p.name not in ("cluster", "devices", "kind", "n")
            }

        own = optional(towers.Placement)
        own["layer_devices"] = None  # in the place of an empty dict
        self.assertEqual(optional(getattr(towers.Placement, way)), own)

    def test_each_argument_comes_through(self):
        given = {
            "parameter_device": "/CPU:1",
            "weights": (3.0, 1.0),
            "input_device": "/CPU:1",
            "output_device": "/CPU:1",
            "layer_devices": {"a": "/CPU:1"},
            "reasons": ("why",),
        }
        result = towers.Placement.cpus(2, **given, available="any")
        self.assertEqual({k: getattr(result, k) for k in given}, given)
        self.assertEqual(result.available, "any")

    def test_gpus_points_to_cpus(self):
        n = len(tf.config.list_physical_devices("GPU")) + 1
        with self.assertRaisesRegex(ValueError, "Placement.cpus"):
            towers.Placement.gpus(n)
