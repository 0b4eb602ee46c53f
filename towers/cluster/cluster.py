"""Cluster: workers in other processes, connected, and watched by a heartbeat."""

import contextlib
import itertools
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.cluster.address import Address, checked_addresses, own_address
from towers.cluster.lost import WorkerLost
from towers.cluster.members import Members
from towers.cluster.pulse import Pulse
from towers.cluster.schedulers import Scheduled
from towers.cluster.waiting import ended_before
from towers.foreign import long_waits, tf_cluster

# Names this process to workers, which serve one chief at a time.
_CHIEF = uuid.uuid4().hex
_TASKS: dict[str, int] = {}  # by address, the same for all clusters
_TRIES = 5  # to drop a worker while others may be dying


class Cluster(Scheduled):
    """Workers, started by `python -m towers worker`, that this chief uses.

    Every address is asked first whether a worker answers, so that a wrong one is
    an error that names it; TensorFlow would wait without end. Then TensorFlow is
    connected. A process has one cluster: making another one takes its place.
    Variables made before, on this process, stay good.

    >>> try:
    ...     towers.Cluster(["127.0.0.1:9"], timeout=0.5)
    ... except TimeoutError as error:
    ...     print(str(error)[:39])
    Of 1 workers, 1 cannot be used: 127.0.0

    Args:
      addresses: one per worker: "host:port", or "host:port:heartbeat" if the
        heartbeat is not on its usual port.
      address: where workers can call this process back, "host:port". By default
        that of the interface that leads to them, and a free port.
      timeout: seconds within which all must answer.
      heartbeat: seconds without an answer after which a worker is lost.

    Raises:
      TypeError: `addresses` is no list of texts.
      ValueError: one is no address, or `timeout` or `heartbeat` not positive.
      TimeoutError: names the workers that do not answer, and why.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        address: str | None = None,
        timeout: float = 60,
        heartbeat: float = 5.0,
    ):
        workers = checked_addresses(addresses, timeout, heartbeat)
        # TensorFlow cannot give a task to another worker.
        new = itertools.count(max(_TASKS.values(), default=-1) + 1)
        tasks = {
            _TASKS[w.target] if w.target in _TASKS else next(new): w
            for w in workers
        }
        own = tf_cluster.connected_address()
        if address is not None:
            asked = Address.parse(address, "address").target
            if own not in (None, asked):
                raise ValueError(
                    f"`address` is {address!r}, but this process has connected "
                    f"as {own!r}, and cannot change that. Leave it out."
                )
            own = asked
        self.address = own or own_address(workers)
        self._torn = False
        self._watched = 0
        self._graves: list[Any] = []
        self._members = Members(tasks, _CHIEF, heartbeat)
        try:
            with long_waits.announced(self._members.waited_for):
                self._connect(time.monotonic() + timeout)
        except BaseException:
            self._end()
            raise
        before = _CONNECTED[:]
        _CONNECTED[:] = [self]
        tf_cluster.wait_by(self._wait)
        for cluster in before:
            cluster._end()

    def devices(self, kind: str | None = None) -> list[str]:
        """Names of the workers' devices, by worker.

        Args:
          kind: "CPU" or "GPU"; None for both.
        """
        if kind is not None and not isinstance(kind, str):
            raise TypeError(
                f'`kind` must be None, "CPU" or "GPU"; got {kind!r}.'
            )
        pairs = []
        for device in tf.config.list_logical_devices(kind and kind.upper()):
            spec = tf.DeviceSpec.from_string(device.name)
            if (
                spec.job == "worker"
                and spec.task in self._members.joined
                and not spec.device_type.startswith("XLA_")
            ):
                pairs.append((spec.task, device.name))
        return [name for _, name in sorted(pairs, key=lambda pair: pair[0])]

    def alive(self) -> list[str]:
        """Addresses of the workers that answer, those of them too that have
        come back and wait for `update`."""
        return self._members.texts(self._members.alive())

    def pulses(self) -> dict[int, Pulse]:
        """Those of the workers that are connected, by task."""
        return self._members.connected()

    def lost(self) -> list[str]:
        """Addresses of the workers that were lost since the last `update`."""
        return self._members.texts(self._members.lost)

    def update(self) -> bool:
        """Drops the workers that are lost, and takes back those that returned.

        Variables on this process stay good, and so do functions that use none
        of the workers that are dropped. What lived on those is gone.

        Returns:
          Whether the workers are other ones, or started anew.

        Raises:
          WorkerLost: none answers.
        """
        members, changed = self._members, False
        for _ in range(_TRIES):
            now = members.usable()
            if not now:
                raise WorkerLost(
                    members.texts(members.workers),
                    "No worker answers. Start one and call `update()` again.",
                )
            changed = changed or now != members.joined or bool(members.lost)
            if not changed and not self._torn:
                return False
            before = members.joined.items()
            gone = {i for i, start in before if now.get(i) != start}
            self._give_up(gone | members.lost)
            try:
                self._apply(now)
            except tf.errors.OpError:  # another one dies
                self._torn = True
                time.sleep(0.2)
                continue
            return changed
        raise WorkerLost(
            self.lost(), "The others cannot be connected. Try again later."
        )

    def addresses(self, devices: Sequence[str]) -> list[str]:
        """Addresses of the workers that have these devices, each once."""
        tasks = {task_of(device) for device in devices} - {None}
        return self._members.texts(i for i in tasks if i is not None)

    def has(self, devices: Sequence[str]) -> bool:
        """Whether all those devices that are of workers are of these."""
        tasks = [task_of(device) for device in devices]
        return all(i is None or i in self._members.joined for i in tasks)

    def starts(self, devices: Sequence[str]) -> tuple[str | None, ...]:
        """Names the starts of the workers' processes that have these devices."""
        tasks = [task_of(device) for device in devices]
        joined = self._members.joined
        return tuple(None if i is None else joined.get(i) for i in tasks)

    def check(self, tasks: set[int]) -> None:
        """Raises a `WorkerLost` if one of these workers has been dropped."""
        members = self._members
        gone = (tasks - set(members.joined)) & set(members.workers)
        if gone:
            raise WorkerLost(members.texts(gone))

    def is_behind(self) -> bool:
        """Whether `update` has something to do."""
        members = self._members
        return bool(members.lost) or members.alive() != members.joined

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """While open, what TensorFlow raises when a worker is lost is `WorkerLost`.

        It comes in seconds, too, when the worker has only stopped to answer. For
        steps of your own; a `TowerModel` does it itself.

        Raises:
          WorkerLost: a worker is lost, or was before.
        """
        if self._watched:
            yield
            return
        with self.guard():
            yield

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """As `watch`, nested in it, for training that goes on after a loss."""
        if self._members.lost:  # TensorFlow would wait for it
            raise WorkerLost(self.lost())
        self._watched += 1
        try:
            yield
        except WorkerLost:
            raise
        except Exception as error:
            lost = self._members.whom(error)
            if lost is None:
                raise
            self._torn = True
            self._give_up(set(self._members.lost))
            raise WorkerLost(lost) from error
        finally:
            self._watched -= 1

    def _wait(self, wait: Callable[[], None]) -> None:
        """Waits for all that was begun, here and on workers that are not lost.

        Raises:
          WorkerLost: a worker is, and a step that may need it is watched.
        """
        ended = ended_before(wait, lambda: bool(self._members.lost))
        if not ended and self._watched:
            raise WorkerLost(self.lost())

    def _give_up(self, tasks: set[int]) -> None:
        """Has models give up variables of workers, before one is touched.

        What they were is kept until TensorFlow has dropped the workers.
        """
        workers = tuple(self._members.texts(tasks))
        for holder in list(_HOLDERS) if tasks else ():
            self._graves += holder.lose(tasks, workers)

    def _apply(self, incarnations: dict[int, str]) -> None:
        """Connects TensorFlow to these workers.

        Raises:
          tf.errors.OpError: one has died since it was asked.
        """
        members = self._members
        tasks = {i: members.workers[i].target for i in incarnations}
        _TASKS.update((target, i) for i, target in tasks.items())
        # They may be lost from now on.
        members.joined = {**members.joined, **incarnations}
        members.lost -= set(incarnations)
        if tf_cluster.connected_address() is None:
            tf.config.experimental_connect_to_cluster(
                tf.train.ClusterSpec(
                    {"localhost": [self.address], "worker": tasks}
                )
            )
            tf.config.list_logical_devices()  # now, not at the first op
        else:
            tf_cluster.update_tasks("worker", tasks)
        members.note_joined(incarnations)
        self._torn = False
        self._graves.clear()

    def _connect(self, deadline: float) -> None:
        """Connects to all, or says who does not answer.

        Raises:
          TimeoutError: after `deadline`.
        """
        own = Address.parse(self.address, "address")
        members = self._members
        named: set[str] = set()
        while True:
            for text in members.unresolved() - named:
                named.add(text)
                left = deadline - time.monotonic()
                long_waits.say(
                    f"the name of the worker {text} does not resolve; trying "
                    f"for {left:.0f} s"
                )
            now = members.usable()
            apart: list[str] = []
            if len(now) == len(members.workers):
                with contextlib.suppress(tf.errors.OpError):
                    self._apply(now)
                    apart = members.apart(own)
                    if not members.lost and not apart:
                        return
            if time.monotonic() > deadline:
                raise TimeoutError(members.troubles(apart, self.address))
            time.sleep(0.1)

    def _end(self) -> None:
        """Lets the workers go."""
        self._members.end()


_CONNECTED: list[Cluster] = []
# Models, which may have variables on workers; they have a method `lose`.
_HOLDERS: weakref.WeakSet = weakref.WeakSet()


def connected() -> Cluster | None:
    """The cluster of this process; TensorFlow has one, too."""
    return _CONNECTED[0] if _CONNECTED else None


def current() -> Cluster:
    """The cluster of this process, which must have one.

    Raises:
      RuntimeError: it has none.
    """
    cluster = connected()
    if cluster is None:
        raise RuntimeError(
            "This process has no cluster, but a step that goes on without lost "
            "workers is to be taken. Expected towers.Cluster([...]) before."
        )
    return cluster


def hold(holder: Any) -> None:
    """Has `holder.lose(tasks, workers)` called when workers are lost.

    It returns the variables that it gives up.
    """
    _HOLDERS.add(holder)


def task_of(device: str) -> int | None:
    """The worker's task that a device is of; None for this process's."""
    spec = tf.DeviceSpec.from_string(device)
    return (spec.task or 0) if spec.job == "worker" else None
