"""The two ends of a heartbeat."""

import contextlib
import queue
import socket
import threading
import time
import types
from unittest import mock

from absl.testing import absltest

from towers.cluster import heartbeat
from towers.cluster.address import Address
from towers.cluster.heartbeat import Heartbeat, Line, Refused
from towers.cluster.pulse import Pulse

PATIENCE = 60  # seconds, which a busy machine may take to do anything


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def often():
    """While open, a pulse asks a hundred times as often; what it was answered."""
    waits, ask, beats = Line.waits, Line.ask, []

    def soon(line, seconds):
        return waits(line, seconds / 100)

    def asked(line, **words):
        answer = ask(line, **words)
        if "ping" in words:
            beats.append(answer)
        return answer

    with mock.patch.multiple(Line, waits=soon, ask=asked):
        yield beats


class HeartbeatTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.left = queue.SimpleQueue()
        self.silent = queue.SimpleQueue()
        self.start_worker(0)
        self.graces = []  # to end by hand: what is called at the end of each
        ours = types.SimpleNamespace(**{**vars(threading), "Timer": self.timer})
        threads = mock.patch.object(heartbeat, "threading", ours)
        threads.start()
        self.addCleanup(threads.stop)

    def timer(self, seconds, call):
        self.assertEqual(seconds, heartbeat.GRACE)
        self.graces.append(call)
        return mock.Mock()

    def start_worker(self, port):
        told = {"towers": 1}
        self.worker = Heartbeat("127.0.0.1", port, told, self.left.put)
        self.worker.start()
        port = self.worker.server_address[1]
        self.address = Address("127.0.0.1", 9, port, "worker")
        self.addCleanup(self.end_worker)

    def end_worker(self):
        self.worker.shutdown()
        self.worker.server_close()

    def call(self, **words):
        where = ("127.0.0.1", self.address.heartbeat)
        connection = socket.create_connection(where, PATIENCE)
        line = Line(connection, PATIENCE)
        self.addCleanup(line.__exit__)
        return line, line.ask(hello=1, **words)

    def pulse(self, patience=PATIENCE):
        pulse = Pulse(
            self.address, "chief", patience, lambda: self.silent.put(1)
        )
        self.addCleanup(pulse.end)
        return pulse

    def test_one_chief_at_a_time(self):
        _, told = self.call(chief="one")
        self.assertEqual(told["towers"], 1)
        _, told = self.call(chief="other")
        self.assertEqual(told, {"busy": True})
        _, told = self.call()  # who only asks is told
        self.assertEqual(told["towers"], 1)

    def test_a_worker_is_told_when_its_chief_has_finished(self):
        one, _ = self.call(chief="one")
        another, _ = self.call(chief="one")  # a second cluster of its own
        one.end()
        time.sleep(0.1)
        self.assertTrue(self.left.empty())
        another.end()
        self.assertIn("finished", self.left.get(timeout=PATIENCE))

    def test_a_chief_whose_line_breaks_can_call_again_for_a_while(self):
        one, _ = self.call(chief="one")
        one.__exit__()
        wait_until(lambda: self.graces)
        again, _ = self.call(chief="one")
        self.graces.pop()()
        time.sleep(0.1)
        self.assertTrue(self.left.empty())
        again.__exit__()
        wait_until(lambda: self.graces)
        self.assertTrue(self.left.empty())
        self.graces.pop()()
        self.assertIn("gone", self.left.get(timeout=PATIENCE))

    def test_one_who_waits_ends_the_grace(self):
        one, _ = self.call(chief="one")
        one.__exit__()
        wait_until(lambda: not self.worker._lines)
        _, told = self.call(chief="other")
        self.assertEqual(told, {"busy": True})
        self.assertIn("waits", self.left.get(timeout=PATIENCE))

    def test_a_chief_that_says_nothing_is_gone(self):
        hear, patience = Line.hear, []

        def once(line):
            """What the first word is, and later that there was none in time."""
            patience.append(line._connection.gettimeout())
            line.hear = mock.Mock(side_effect=TimeoutError)
            return hear(line)

        with mock.patch.object(Line, "hear", once):
            self.call(chief="one")
            wait_until(lambda: self.graces)
        self.assertCountEqual(patience, [heartbeat.SILENCE, PATIENCE])
        self.graces.pop()()
        self.assertIn("gone", self.left.get(timeout=PATIENCE))

    def test_a_pulse_beats_until_the_worker_is_gone_and_again(self):
        with often() as beats:
            pulse = self.pulse()
            wait_until(lambda: pulse.incarnation)
            first = pulse.incarnation
            wait_until(lambda: len(beats) > 5)
            self.assertTrue(all("pong" in beat for beat in beats))
        self.assertTrue(self.silent.empty())
        self.assertTrue(pulse.is_still(first))
        there = Address("127.0.0.1", self.address.heartbeat, 1, "itself")
        self.assertEqual(pulse.trouble_in_reaching(there), "")
        nobody = Address("127.0.0.1", 1, 1, "nobody")
        self.assertIn("refused", pulse.trouble_in_reaching(nobody))

    def test_a_worker_that_only_listens_is_not_alive(self):
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            self.address = Address(
                "127.0.0.1", 9, deaf.getsockname()[1], "deaf"
            )
            pulse = self.pulse(0.2)
            wait_until(lambda: pulse.trouble == "heartbeat: no answer in time")
            self.assertIsNone(pulse.incarnation)

    def test_a_worker_that_falls_silent_is_told_of_in_time(self):
        with often():
            pulse = self.pulse()
            wait_until(lambda: pulse.incarnation)
            with mock.patch.object(Line, "hear", side_effect=TimeoutError):
                self.silent.get(timeout=PATIENCE)
                self.assertIsNone(pulse.incarnation)
        wait_until(lambda: pulse.incarnation)

    def test_what_is_no_worker_is_refused(self):
        one, other = socket.socketpair()
        self.addCleanup(other.close)
        other.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        with Line(one, 1) as line, self.assertRaisesRegex(Refused, "HTTP"):
            line.hear()
