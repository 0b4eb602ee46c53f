"""heartbeat: whether a worker is alive, told on a port of its own.

TensorFlow says nothing of a process that has stopped, and waits for it. So each
worker answers lines of JSON on a second port, from the process that computes: if
that is stopped or gone, so is the answer. The line is also a lease: a chief that
closes it, or says nothing for long, is gone, and the worker starts anew.
"""

import contextlib
import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

LONGEST_LINE = 1 << 16
SILENCE = 30.0  # seconds without a word after which a chief is gone
GRACE = 3.0  # seconds in which a chief whose line broke can call again


class Refused(ValueError):
    """What answers is no worker, or serves another chief."""


class Line:
    """One end of a conversation: an object of JSON per line."""

    def __init__(self, connection: socket.socket, patience: float):
        connection.settimeout(patience)
        self._connection = connection
        self._incoming = connection.makefile("rb")

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: Any) -> None:
        self._incoming.close()
        self._connection.close()

    def say(self, **words: Any) -> None:
        self._connection.sendall(json.dumps(words).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """What the other says; None when it has hung up.

        Raises:
          OSError: it says nothing for too long.
          Refused: it says something else.
        """
        line = self._incoming.readline(LONGEST_LINE)
        if not line:
            return None
        try:
            words = json.loads(line)
        except ValueError:
            words = None
        if not isinstance(words, dict):
            raise Refused(f"something else answers: {line[:40]!r}")
        return words

    def waits(self, seconds: float | None) -> bool:
        """Whether the other says something, or hangs up, within that time.

        With None it waits for as long as that takes.
        """
        before = self._connection.gettimeout()
        self._connection.settimeout(seconds)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        finally:
            self._connection.settimeout(before)
        return True

    def end(self) -> None:
        """Takes leave, from any thread."""
        with contextlib.suppress(OSError):
            self.say(bye=True)
            self._connection.shutdown(socket.SHUT_RDWR)

    def ask(self, **words: Any) -> dict[str, Any]:
        """The answer to what is said."""
        self.say(**words)
        answer = self.hear()
        if answer is None:
            raise ConnectionError("hung up")
        return answer


class Heartbeat(socketserver.ThreadingTCPServer):
    """The worker's end.

    Args:
      host: the interface to listen on.
      port: the heartbeat's.
      greeting: what is said of the worker: its port, its devices.
      when_left: called, in a thread, when the chief is gone.
      profile: tells a chief, on its line, what a profiler hears.

    Raises:
      OSError: the port is taken.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        greeting: dict[str, Any],
        when_left: Callable[[str], None],
        profile: Callable[[Line], None] | None = None,
    ):
        entry = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = entry[0]
        super().__init__(entry[4][:2], _Conversation)  # type: ignore[arg-type]
        self.greeting = {**greeting, "incarnation": secrets.token_hex(8)}
        self.profile = profile
        self._when_left = when_left
        self._lock = threading.Lock()
        self._chief: str | None = None
        self._lines = 0
        self._broken_at = 0.0

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def take(self, chief: str) -> bool:
        """Whether this chief may have the worker: one at a time."""
        with self._lock:
            if self._chief not in (None, chief):
                if not self._lines:  # it is in its grace, and another waits
                    self._leave("another chief waits")
                return False
            self._chief = chief
            self._lines += 1
            return True

    def release(self, said_bye: bool) -> None:
        """One line of the chief's has ended."""
        with self._lock:
            self._lines -= 1
            if self._lines:
                return
            if said_bye:
                return self._leave("its chief has finished")
            self._broken_at = now = time.monotonic()

        def after_grace() -> None:
            with self._lock:
                if not self._lines and self._broken_at == now:
                    self._leave("its chief is gone")

        timer = threading.Timer(GRACE, after_grace)
        timer.daemon = True
        timer.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: whoever talked nonsense, or hung up, is gone."""

    def _leave(self, why: str) -> None:
        threading.Thread(
            target=self._when_left, args=[why], daemon=True
        ).start()


class _Conversation(socketserver.BaseRequestHandler):
    """What a worker says to one who calls."""

    server: Heartbeat

    def handle(self) -> None:
        with Line(self.request, SILENCE) as line:
            first = line.hear()
            if not first or "hello" not in first:
                return
            chief = first.get("chief")
            if chief is None:  # one who only asks
                line.say(**self.server.greeting)
            elif not self.server.take(chief):
                line.say(busy=True)
            else:
                said_bye = False
                try:
                    line.say(**self.server.greeting)
                    said_bye = self._answer(line)
                except (OSError, Refused):
                    pass
                finally:
                    self.server.release(said_bye)

    def _answer(self, line: Line) -> bool:
        """Answers a chief until it hangs up; whether it took its leave."""
        while (words := line.hear()) is not None:
            if "bye" in words:
                return True
            if "reach" in words:
                line.say(**_reached(*words["reach"]))
            elif "profile" in words and self.server.profile:
                self.server.profile(line)
            else:
                line.say(pong=True, time=time.time())
        return False


def _reached(host: str, port: int) -> dict[str, Any]:
    """Whether a worker can call an address, as TensorFlow will."""
    try:
        socket.create_connection((host, port), 3).close()
    except OSError as error:
        return {"trouble": str(error)}
    return {"reached": True}
