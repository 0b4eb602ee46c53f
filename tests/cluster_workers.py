"""Workers for a test's chief: forks of a process that has not started TensorFlow.

Import this first. As a program, `cluster_workers.py N` says, as JSON, the addresses
and numbers of its workers, which end when it can read no more. Whatever ends the
chief ends them: they are killed when the process that forks them hears no more, and
that when its parent is gone.
"""

import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import time
from unittest import mock

import tensorflow as tf

import towers


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Workers:
    """`n` workers, each known by its place, of so many CPU devices each.

    Attributes:
      addresses: theirs, for a `towers.Cluster`.
      pids: of those that run, or ran.
    """

    def __init__(self, n: int, started: int | None = None, devices: int = 1):
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(n)]
        self.pids: dict[int, int] = {}
        (self._hears, says), (hears, self._says) = os.pipe(), os.pipe()
        if not os.fork():
            os.close(self._says)
            _forks(os.fdopen(hears), says, devices)
        for i in range(n if started is None else started):
            self.start(i)

    def start(self, i: int) -> None:
        """Starts it, when the one before, which was killed, has left its port."""
        wait_until(lambda: i not in self.pids or not _is_there(self.pids[i]))
        port = int(self.addresses[i].split(":")[1])
        os.write(self._says, f"{port}\n".encode())
        self.pids[i] = json.loads(os.read(self._hears, 100))

    def kill(self, i: int) -> None:
        os.kill(self.pids[i], signal.SIGKILL)

    def stop(self, i: int) -> None:
        os.kill(self.pids[i], signal.SIGSTOP)

    def resume(self, i: int) -> None:
        os.kill(self.pids[i], signal.SIGCONT)

    def end(self) -> None:
        os.close(self._says)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _forks(asked, says: int, devices: int) -> None:
    """Forks a worker for each line, until there are no more; ends them."""
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    pids = []
    for line in asked:
        pid = os.fork()
        if not pid:
            _die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1):
                os.dup2(nothing, descriptor)
            # As many as a machine's GPUs; TensorFlow asks for them so only.
            config = functools.partial(
                tf.compat.v1.ConfigProto, device_count={"CPU": devices}
            )
            with mock.patch.object(tf.compat.v1, "ConfigProto", config):
                towers.serve(int(line), threads=1)
            os._exit(0)
        pids.append(pid)
        os.write(says, json.dumps(pid).encode())
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os._exit(0)


def main() -> None:
    workers = Workers(int(sys.argv[1]))
    print(
        json.dumps([workers.addresses, list(workers.pids.values())]), flush=True
    )
    sys.stdin.read()


_CANDIDATES = itertools.count(10 * os.getpid())  # each is given once


def free_ports(n: int) -> list[int]:
    """Ports that nobody has, nor the ones of their heartbeats.

    From 10,000 to 30,000, where no connection is given its port before a worker
    listens there; each process that asks begins elsewhere. Every second thousand
    is of heartbeats.
    """
    found: list[int] = []
    for k in _CANDIDATES:
        port = 10_000 + 2000 * (k // 1000 % 10) + k % 1000
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("", port))
                other.bind(("", port + 1000))
            except OSError:
                continue
        found.append(port)
        if len(found) == n:
            break
    return found


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("It has not come to be.")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
