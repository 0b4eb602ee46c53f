"""Bytes that processes have sent over TCP, as Linux counts them for each socket.

So what other programs say on the same network device is left out. Sockets are
asked for by sock_diag(7); `tcp_info` is in include/uapi/linux/tcp.h.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

_SOCK_DIAG, _BY_FAMILY, _REQUEST_DUMP = 4, 20, 0x301
_HEADER = struct.Struct("=IHHII")
_ASK = struct.Struct("=BBBxI48x")
_ALL_STATES = 0xFFFFFFFF
_INODE, _MESSAGE, _INFO = 68, 72, 2
_UNACKED, _BYTES_ACKED, _NOT_SENT = 24, 120, 144
_PATIENCE = 60.0  # seconds; a receiver may take 0.2 to say that it has received


def sent_bytes(pids: Iterable[int]) -> int:
    """What all open connections of these processes have sent, and was received.

    Waits until nothing is on its way.

    Raises:
      TimeoutError: there always is something.
    """
    ours = {inode for pid in pids for inode in _inodes(pid)}
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        results = [
            counts
            for family in (socket.AF_INET, socket.AF_INET6)
            for inode, counts in _connections(family)
            if inode in ours
        ]
        if not any(waiting for _, waiting in results):
            return sum(received for received, _ in results)
        time.sleep(0.01)
    raise TimeoutError(f"bytes were on their way for {_PATIENCE} seconds")


def of_a_step(step: Callable[[], Any], pids: Iterable[int], n: int) -> float:
    """Bytes of one of n steps, of this process and others, after a first one."""
    every = [os.getpid(), *pids]
    step()  # traced
    before = sent_bytes(every)
    for _ in range(n):
        step()
    return (sent_bytes(every) - before) / n


def _inodes(pid: int) -> Iterable[int]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # it was closed
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:["):
                yield int(target[len("socket:[") : -1])


def _connections(family: int) -> Iterable[tuple[int, tuple[int, int]]]:
    """(inode, (bytes received, what waits)) of each TCP socket of the machine."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as line:
        ask = _ASK.pack(
            family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _ALL_STATES
        )
        size = _HEADER.size + len(ask)
        line.send(_HEADER.pack(size, _BY_FAMILY, _REQUEST_DUMP, 1, 0) + ask)
        while True:
            data = line.recv(1 << 20)
            while data:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind != _BY_FAMILY:  # done, or an error
                    return
                message = data[_HEADER.size : size]
                (inode,) = struct.unpack_from("=I", message, _INODE)
                yield inode, _counts(message[_MESSAGE:])
                data = data[(size + 3) & ~3 :]


def _counts(attributes: bytes) -> tuple[int, int]:
    """(bytes received by the other end, packets and bytes that are not yet)."""
    while len(attributes) >= 4:
        size, kind = struct.unpack_from("=HH", attributes)
        if kind == _INFO and size >= 4 + _NOT_SENT + 4:
            info = attributes[4:size]
            (received,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
            (unacked,) = struct.unpack_from("=I", info, _UNACKED)
            (not_sent,) = struct.unpack_from("=I", info, _NOT_SENT)
            return received, unacked + not_sent
        attributes = attributes[(size + 3) & ~3 :]
    return 0, 0
