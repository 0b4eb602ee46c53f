"""Connections to a worker: asked, and cut."""

import socket

from absl.testing import absltest

from towers.cluster.address import Address
from towers.cluster.connections import cut_connections, trouble_with


class ConnectionsTest(absltest.TestCase):
    def test_those_to_the_worker_are_cut_and_no_others(self):
        for family, host in (
            (socket.AF_INET, "127.0.0.1"),
            (socket.AF_INET6, "::1"),
        ):
            one, other = (
                socket.create_server((host, 0), family=family) for _ in "ab"
            )
            with one, other:
                to_one, to_other = (
                    socket.create_connection(s.getsockname()[:2])
                    for s in (one, other)
                )
                with to_one, to_other:
                    port = one.getsockname()[1]
                    self.assertEqual(
                        cut_connections(Address(host, port, 1, "")), 1
                    )
                    self.assertEqual(to_one.recv(1), b"")
                    to_other.settimeout(0.1)
                    with self.assertRaises(TimeoutError):
                        to_other.recv(1)

    def test_nothing_else_is_touched(self):
        self.assertEqual(cut_connections(Address("127.0.0.1", 1, 1, "")), 0)

    def test_a_server_that_says_nothing_is_in_trouble(self):
        with socket.create_server(("127.0.0.1", 0)) as s:
            where = Address("127.0.0.1", s.getsockname()[1], 1, "")
            self.assertEqual(trouble_with(where, 0.1), "no answer in time")
        self.assertIn("refused", trouble_with(where, 0.1))
