"""connections: TCP connections to a worker, asked and cut.

TensorFlow waits without end for a worker that has stopped, and its way to cancel
a call does not reach that. When its connection is cut it raises, as it does when
a worker dies. Sockets know whom they are connected to, so that needs no help.
"""

import os
import socket
import stat

from towers.cluster.address import Address, plain_ip

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)
_SETTINGS = 4
NO_SUCH_NAME = "the name does not resolve"


def cut_connections(worker: Address) -> int:
    """Cuts this process's connections to a worker's TensorFlow; how many."""
    ips, count = worker.ip_addresses(), 0
    for name in os.listdir("/dev/fd"):
        try:
            copy = os.dup(int(name))
        except (OSError, ValueError):  # it was closed
            continue
        if not stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as other:
            try:
                peer = other.getpeername()
                if peer[1] == worker.port and plain_ip(peer[0]) in ips:
                    other.shutdown(socket.SHUT_RDWR)
                    count += 1
            except (OSError, IndexError, TypeError):  # it is not connected
                continue
    return count


def trouble_with(worker: Address, patience: float) -> str:
    """Why TensorFlow's port does not answer as gRPC does; "" if it does.

    A gRPC server says its HTTP/2 settings first (RFC 9113, section 3.4).
    """
    try:
        with socket.create_connection(
            (worker.host, worker.port), patience
        ) as connection:
            connection.settimeout(patience)
            connection.sendall(_PREFACE)
            frame = b""
            while len(frame) < 9:
                more = connection.recv(9 - len(frame))
                if not more:
                    break
                frame += more
    except OSError as error:
        return words_of(error)
    if len(frame) < 9 or frame[3] != _SETTINGS:
        return f"something else than TensorFlow's server answers: {frame!r}"
    return ""


def words_of(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return NO_SUCH_NAME
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror or str(error)).lower()
