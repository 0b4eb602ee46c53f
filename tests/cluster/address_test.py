"""Addresses of workers."""

import socket

from absl.testing import parameterized

from towers.cluster.address import Address, own_address


class AddressTest(parameterized.TestCase):
    @parameterized.parameters(
        ("10.0.0.2:2222", "10.0.0.2", 2222, 3222, "10.0.0.2:2222"),
        ("worker-0.jobs:64536", "worker-0.jobs", 64536, 63536, None),
        ("grpc://a:64535", "a", 64535, 65535, "a:64535"),
        ("a:1:2", "a", 1, 2, "a:1"),
        ("[::1]:2222", "::1", 2222, 3222, "[::1]:2222"),
    )
    def test_a_text_is_an_address(self, text, host, port, heartbeat, target):
        result = Address.parse(text)
        self.assertEqual(
            (result.host, result.port, result.heartbeat),
            (host, port, heartbeat),
        )
        self.assertEqual(result.target, target or text)
        self.assertEqual(result.text, text)

    @parameterized.parameters(
        "a", "a:", ":1", "a:b", "a:1:2:3", "::1:2", "a:0", "a:65536", "a:1:0"
    )
    def test_other_texts_are_refused(self, text):
        with self.assertRaisesRegex(ValueError, "`address` must"):
            Address.parse(text)

    def test_own_address_is_where_workers_are_reached_and_free(self):
        host, port = own_address([Address.parse("127.0.0.1:9")]).split(":")
        self.assertEqual(host, "127.0.0.1")
        with socket.socket() as s:
            s.bind((host, int(port)))
