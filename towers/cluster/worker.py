"""worker: a process that computes for a chief: `python -m towers worker`."""

import contextlib
import os
import pathlib
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from towers.cluster.address import check_port
from towers.cluster.address import heartbeat_port as usual_heartbeat_port
from towers.cluster.heartbeat import Heartbeat
from towers.cluster.profiling import tell

_FOLDER = pathlib.Path(__file__).parents[2]


def serve(
    port: int,
    host: str = "127.0.0.1",
    threads: int | None = None,
    heartbeat_port: int | None = None,
) -> None:
    """Serves this machine's devices to one chief at a time, until SIGTERM.

    When its chief is gone, the process starts anew, as `python -m towers worker`
    with the same arguments, so that nothing of the chief's is left in it.

    TensorFlow's server listens on `port` of every interface, and asks nobody who
    he is: whoever reaches it can run what he likes. Trusted networks only.

    >>> towers.serve(port=0)
    Traceback (most recent call last):
      ...
    ValueError: `port` must have a port from 1 to 65535; got 0. Choose a free one,
    such as 2222.

    Args:
      port: for TensorFlow.
      host: the interface on which the heartbeat listens; for chiefs on other
        machines their side's address of this one, or "0.0.0.0".
      threads: how many TensorFlow computes with; by default one per core.
      heartbeat_port: by default `port + 1000`, or `port - 1000` above 64535.

    Raises:
      TypeError, ValueError: a port or `threads` is no such number.
      OSError: a port is taken, or `host` is none of this machine's.
    """
    check_port("port", port)
    if heartbeat_port is None:
        heartbeat_port = usual_heartbeat_port(port)
    check_port("heartbeat_port", heartbeat_port)
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise ValueError(
            f"`threads` must be None or a whole number from 1; got {threads!r}."
        )
    ends: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    greeting: dict[str, Any] = {"towers": 1, "port": port, "devices": []}
    try:
        heartbeat = Heartbeat(host, heartbeat_port, greeting, ends.put, tell)
    except OSError as error:
        raise OSError(
            error.errno,
            f"`heartbeat_port` {heartbeat_port} on `host` {host!r} cannot be "
            f"listened on: {error.strerror or error}. Choose a port that is "
            "free, and an address of this machine.",
        ) from error
    with heartbeat, _ended_by_signals(ends):
        server = _server(port, threads)
        greeting["devices"] = heartbeat.greeting["devices"] = _devices(server)
        heartbeat.start()
        print(
            f"towers worker: {', '.join(greeting['devices'])} on port {port}, "
            f"heartbeat on {host}:{heartbeat_port}. TensorFlow listens on every "
            "interface and has no authentication: whoever reaches this port "
            "can run programs here. Trusted networks only.",
            flush=True,
        )
        why = ends.get()
        heartbeat.shutdown()
    while why is not None and not ends.empty():
        why = ends.get()  # it may have been told to end meanwhile
    if why is not None:
        print(f"towers worker: {why}, starting anew", flush=True)
        _start_anew(port, host, threads, heartbeat_port)


def _server(port: int, threads: int | None) -> Any:
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads or 0,
        inter_op_parallelism_threads=threads or 0,
    )
    # Its own address is all that a worker needs: the chief tells it the others'.
    spec = tf.train.ClusterSpec({"worker": [f"localhost:{port}"]})
    try:
        socket.create_server(("", port)).close()
        return tf.distribute.Server(spec, "worker", 0, config=config)
    except (OSError, tf.errors.OpError) as error:
        raise OSError(
            f"TensorFlow's server could not start on `port` {port}, which may "
            f"be taken: {error}. Choose one that is free."
        ) from error


def _devices(server: Any) -> list[str]:
    """ "CPU:0" and the like, as the server itself has them."""
    with tf.Graph().as_default():
        with tf.compat.v1.Session(server.target) as session:
            specs = [
                tf.DeviceSpec.from_string(device.name)
                for device in session.list_devices()
            ]
    return [
        f"{spec.device_type}:{spec.device_index}"
        for spec in specs
        if not spec.device_type.startswith("XLA_")
    ]


@contextlib.contextmanager
def _ended_by_signals(ends: Any) -> Iterator[None]:
    """While open, SIGTERM and SIGINT put None into a queue."""
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever runs us in a thread has the signals
        return
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(n, lambda *_: ends.put(None)) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def _start_anew(
    port: int, host: str, threads: int | None, heartbeat_port: int
) -> None:
    """Becomes a new process of the same number."""
    sys.stdout.flush()
    sys.stderr.flush()
    path = [str(_FOLDER), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    flags = [
        f"--port={port}",
        f"--host={host}",
        f"--heartbeat_port={heartbeat_port}",
    ]
    if threads:
        flags.append(f"--threads={threads}")
    os.execv(sys.executable, [sys.executable, "-m", "towers", "worker", *flags])
