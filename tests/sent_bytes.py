"""Bytes that processes have sent over TCP, as Linux counts them for each socket.

So what other programs say on the same network device is left out. Sockets are
asked for by sock_diag(7); `tcp_info` is in include/uapi/linux/tcp.h.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterable

_SOCK_DIAG, _BY_FAMILY, _REQUEST_DUMP = 4, 20, 0x301
_HEADER = struct.Struct("=IHHII")
_ASK = struct.Struct("=BBBxI48x")
_ALL_STATES = 0xFFFFFFFF
_INODE, _MESSAGE, _INFO, _BYTES_ACKED = 68, 72, 2, 120


def sent_bytes(pids: Iterable[int]) -> int:
    """What all open connections of these processes have sent, and was received."""
    ours = {inode for pid in pids for inode in _inodes(pid)}
    return sum(
        sent
        for family in (socket.AF_INET, socket.AF_INET6)
        for inode, sent in _connections(family)
        if inode in ours
    )


def _inodes(pid: int) -> Iterable[int]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # it was closed
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:["):
                yield int(target[len("socket:[") : -1])


def _connections(family: int) -> Iterable[tuple[int, int]]:
    """(inode, bytes) of each TCP socket of the machine."""
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
                yield inode, _acknowledged(message[_MESSAGE:])
                data = data[(size + 3) & ~3 :]


def _acknowledged(attributes: bytes) -> int:
    while len(attributes) >= 4:
        size, kind = struct.unpack_from("=HH", attributes)
        if kind == _INFO and size >= 4 + _BYTES_ACKED + 8:
            return struct.unpack_from("=Q", attributes, 4 + _BYTES_ACKED)[0]
        attributes = attributes[(size + 3) & ~3 :]
    return 0
