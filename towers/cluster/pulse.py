"""pulse: the chief's end of one worker's heartbeat."""

import socket
import threading
from collections.abc import Callable
from typing import Any

from towers.cluster.address import Address
from towers.cluster.connections import words_of
from towers.cluster.heartbeat import Line, Refused

_AGAIN = 0.2  # seconds until the next try to call


class Pulse:
    """Keeps asking a worker whether it is alive, in a thread.

    Attributes:
      worker: its address.
      trouble: why it does not answer; "" while it does.

    Args:
      worker: its address.
      chief: names this process, to which the worker then belongs.
      patience: seconds without an answer after which it is not alive.
      when_silent: called, in the thread, when it stops to answer.
    """

    def __init__(
        self,
        worker: Address,
        chief: str,
        patience: float,
        when_silent: Callable[[], None],
    ):
        self.worker = worker
        self.trouble = "no answer yet"
        self._chief = chief
        self._patience = patience
        self._when_silent = when_silent
        self._greeting: dict[str, Any] = {}
        self._line: Line | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def incarnation(self) -> str | None:
        """Names this start of the worker's process; None if not alive."""
        return self._greeting.get("incarnation")

    def end(self) -> None:
        """Hangs up."""
        self._ended.set()
        line = self._line
        if line is not None:
            line.end()

    def is_still(self, incarnation: str) -> bool:
        """Asks, now, whether the worker is alive and has not been restarted."""
        try:
            with self._call() as line:
                answer = line.ask(hello=1)
        except (OSError, Refused):
            return False
        return answer.get("incarnation") == incarnation

    def trouble_in_reaching(self, target: Address) -> str:
        """Why the worker cannot call another address; "" if it can."""
        try:
            with self._call(5.0) as line:
                line.ask(hello=1, chief=self._chief)
                answer = line.ask(reach=[target.host, target.port])
        except (OSError, Refused) as error:
            return str(error)
        return str(answer.get("trouble", ""))

    def line(self, patience: float) -> Line:
        """A further connection to the worker, as its chief.

        Raises:
          OSError, Refused: it does not answer as this chief's worker.
        """
        line = self._call(patience)
        try:
            if "towers" not in line.ask(hello=1, chief=self._chief):
                raise Refused("it serves another chief")
        except (OSError, Refused):
            line.__exit__()
            raise
        return line

    def _call(self, least: float = 0.0) -> Line:
        patience = max(self._patience, least)
        where = self.worker.host, self.worker.heartbeat
        return Line(socket.create_connection(where, patience), patience)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with self._call() as self._line:
                    self._talk(self._line)
            except (OSError, Refused) as error:
                words = words_of(error) if isinstance(error, OSError) else error
                self.trouble = f"heartbeat: {words}"
            if self._greeting:
                self._greeting = {}
                self._when_silent()
            self._ended.wait(_AGAIN)

    def _talk(self, line: Line) -> None:
        """Listens to a worker for as long as it is alive."""
        greeting = line.ask(hello=1, chief=self._chief)
        if "busy" in greeting:
            raise Refused("it serves another chief")
        if "towers" not in greeting or "incarnation" not in greeting:
            raise Refused("something else answers")
        self._greeting, self.trouble = greeting, ""
        while not self._ended.is_set():
            if line.waits(min(self._patience / 4, 5.0)):
                return  # unasked: it hung up
            line.ask(ping=1)
