"""members: the workers of a cluster, with their heartbeats, and who is lost."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from towers.cluster.address import Address
from towers.cluster.connections import (
    NO_SUCH_NAME,
    cut_connections,
    trouble_with,
)
from towers.cluster.lost import is_sign, tasks_named
from towers.cluster.pulse import Pulse


class Members:
    """Workers that are asked all the time whether they are alive.

    Attributes:
      workers: their addresses, by task.
      joined: of those that TensorFlow is connected to, the incarnations, each of
        which names a start of the worker's process.
      lost: tasks of those that were lost since they joined.

    Args:
      workers: the addresses, by task.
      chief: names this process to workers, which serve one chief at a time.
      heartbeat: seconds without an answer after which a worker is lost.
    """

    def __init__(
        self, workers: Mapping[int, Address], chief: str, heartbeat: float
    ):
        self.workers = dict(workers)
        self.joined: dict[int, str] = {}
        self.lost: set[int] = set()
        self._heartbeat = heartbeat
        self._ended = threading.Event()
        self._to_cut = threading.Event()
        self._pulses = {
            i: Pulse(worker, chief, heartbeat, self._when_silent(i))
            for i, worker in self.workers.items()
        }
        threading.Thread(target=self._cut_lost, daemon=True).start()

    def end(self) -> None:
        """Lets the workers go."""
        self._ended.set()
        self._to_cut.set()
        for pulse in self._pulses.values():
            pulse.end()

    def texts(self, tasks: Iterable[int]) -> list[str]:
        """Addresses of tasks, as they were given."""
        return [self.workers[i].text for i in sorted(tasks)]

    def alive(self) -> dict[int, str]:
        """Incarnations of those that answer."""
        starts = {i: pulse.incarnation for i, pulse in self._pulses.items()}
        return {
            i: incarnation for i, incarnation in starts.items() if incarnation
        }

    def connected(self) -> dict[int, Pulse]:
        """Heartbeats of those that have joined, and are not lost."""
        joined = self.joined
        return {i: self._pulses[i] for i in joined if i not in self.lost}

    def usable(self) -> dict[int, str]:
        """Incarnations of those that answer on both ports."""
        return {
            i: incarnation
            for i, incarnation in self.alive().items()
            if not trouble_with(self.workers[i], self._heartbeat)
        }

    def note_joined(self, incarnations: Mapping[int, str]) -> None:
        """Says that TensorFlow is connected to these, and to no others."""
        self.joined = dict(incarnations)
        alive = self.alive()
        self.lost = {
            i for i, start in incarnations.items() if alive.get(i) != start
        }

    def whom(self, error: Exception) -> list[str] | None:
        """Addresses of the workers that an error means; None if it means none.

        Those that are lost are noted, too.
        """
        for i, incarnation in list(self.joined.items()):
            if i not in self.lost and not self._pulses[i].is_still(incarnation):
                self.lost.add(i)
        if self.lost:
            return self.texts(self.lost)
        if not is_sign(error):
            return None
        return self.texts(i for i in tasks_named(error) if i in self.joined)

    def waited_for(self) -> str:
        """Which workers do not answer, and why."""
        troubles = self._troubles()
        named = [f"{text} ({why})" for text, why in troubles.items()]
        return (
            f"waiting for {len(named)} of {len(self.workers)} workers: "
            f"{', '.join(named) or 'to be connected'}"
        )

    def unresolved(self) -> set[str]:
        """Those whose names nobody knows."""
        return {
            text
            for text, why in self._troubles().items()
            if NO_SUCH_NAME in why
        }

    def _troubles(self) -> dict[str, str]:
        pulses = list(self._pulses.values())
        return {p.worker.text: p.trouble for p in pulses if p.trouble}

    def apart(self, chief: Address) -> list[str]:
        """Which workers cannot call the chief, or the next of them.

        TensorFlow fetches tensors from where they are, and would wait.
        """
        troubles = []
        workers = list(self.workers.values())
        next_ones = [*workers[1:], workers[0]]
        for pulse, other_worker in zip(self._pulses.values(), next_ones):
            for other in (chief, other_worker):
                trouble = pulse.trouble_in_reaching(other)
                if trouble:
                    troubles.append(
                        f"{pulse.worker.text} (it cannot call {other.target}: "
                        f"{trouble})"
                    )
        return troubles

    def troubles(self, apart: Sequence[str], address: str) -> str:
        """Why they cannot be used, and what is expected."""
        troubles = list(apart)
        for pulse in self._pulses.values() if not troubles else ():
            trouble = pulse.trouble or trouble_with(
                pulse.worker, min(1.0, self._heartbeat)
            )
            if trouble:
                troubles.append(f"{pulse.worker.text} ({trouble})")
        return (
            f"Of {len(self.workers)} workers, {len(troubles)} cannot be used: "
            f"{', '.join(troubles)}. Expected each to run `python -m towers worker "
            "--port=PORT --host=ADDRESS`, whose heartbeat is by default on "
            "PORT + 1000, both ports to be open between these machines, and "
            f"this process to be called at `address`, {address}."
        )

    def _when_silent(self, task: int) -> Callable[[], None]:
        def note() -> None:
            if task in self.joined:
                self.lost.add(task)
                self._to_cut.set()

        return note

    def _cut_lost(self) -> None:
        """Lets nothing of TensorFlow's wait for a worker that is lost."""
        while not self._ended.is_set():
            self._to_cut.wait()
            for task in list(self.lost):
                cut_connections(self.workers[task])
            if not self.lost:
                self._to_cut.clear()
            self._ended.wait(0.1)
