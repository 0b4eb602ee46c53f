"""Cluster: workers in other processes, connected, and watched by a heartbeat."""

import contextlib
import itertools
import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.cluster.address import Address, own_address
from towers.cluster.connections import cut, trouble_with
from towers.cluster.lost import WorkerLost, is_sign, tasks_named
from towers.cluster.pulse import Pulse
from towers.foreign import tf_cluster

# Names this process to workers, which serve one chief at a time.
_CHIEF = uuid.uuid4().hex
_TASKS: dict[str, int] = {}  # by address, the same for all clusters
_TRIES = 5  # to drop a worker while others may be dying


class Cluster:
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
        if isinstance(addresses, str) or not isinstance(addresses, Sequence):
            raise TypeError(
                "`addresses` must be a list of workers' addresses, such as "
                f'["10.0.0.2:2222"]; got {addresses!r}.'
            )
        if not addresses:
            raise ValueError(
                "`addresses` is empty, but a cluster has at least one worker. "
                "Start one by `python -m towers worker --port=2222`."
            )
        for name, value in (("timeout", timeout), ("heartbeat", heartbeat)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be seconds; got {value!r}.")
            if not value > 0:
                raise ValueError(
                    f"`{name}` must be more than 0 seconds; got {value}."
                )
        workers = [
            Address.parse(text, f"addresses[{i}]")
            for i, text in enumerate(addresses)
        ]
        targets = [worker.target for worker in workers]
        twice = {text for text in targets if targets.count(text) > 1}
        if twice:
            raise ValueError(
                f"`addresses` names {', '.join(sorted(twice))} twice. Expected "
                "each worker once."
            )
        # TensorFlow cannot give a task to another worker.
        new = itertools.count(max(_TASKS.values(), default=-1) + 1)
        self._workers = {
            _TASKS[w.target] if w.target in _TASKS else next(new): w
            for w in workers
        }
        own = tf_cluster.own_address()
        if address is not None:
            asked = Address.parse(address, "address").target
            if own not in (None, asked):
                raise ValueError(
                    f"`address` is {address!r}, but this process has connected "
                    f"as {own!r}, and cannot change that. Leave it out."
                )
            own = asked
        self.address = own or own_address(workers)
        self._joined: dict[int, str] = {}  # incarnations, by task
        self._lost: set[int] = set()  # of those, until the next update
        self._torn = False
        self._watched = 0
        self._graves: list[Any] = []
        self._ended = threading.Event()
        self._to_cut = threading.Event()
        self._pulses = {
            i: Pulse(worker, _CHIEF, heartbeat, self._silent(i))
            for i, worker in self._workers.items()
        }
        self._heartbeat = heartbeat
        threading.Thread(target=self._cut_lost, daemon=True).start()
        try:
            self._connect(time.monotonic() + timeout)
        except BaseException:
            self._end()
            raise
        before = _CONNECTED[:]
        _CONNECTED[:] = [self]
        for cluster in before:
            cluster._end()

    @classmethod
    def from_environment(
        cls, timeout: float = 60, heartbeat: float = 5.0
    ) -> "Cluster":
        """The cluster that the environment variable TF_CONFIG names.

        TF_CONFIG is JSON: `{"cluster": {"chief": [...], "worker": [...]}, "task":
        {"type": "chief", "index": 0}}`. What follows "worker" are the workers,
        and "chief", or "master", if it is there, is where this process is.

        >>> os.environ["TF_CONFIG"] = '{"cluster": {}}'
        >>> towers.Cluster.from_environment()
        Traceback (most recent call last):
          ...
        ValueError: TF_CONFIG names no workers: {"cluster": {}}. Expected {"cluster": {"worker": ["host:port", ...]}}.
        >>> del os.environ["TF_CONFIG"]

        Args:
          timeout, heartbeat: as for `Cluster`.

        Raises:
          ValueError: TF_CONFIG is missing, or names no workers, or says that
            this process is one of them.
          TimeoutError: as for `Cluster`.
        """
        text = os.environ.get("TF_CONFIG", "")
        try:
            config = json.loads(text)
            jobs = dict(config["cluster"])
            task = dict(config.get("task") or {})
            workers = jobs.get("worker") or []
            if isinstance(workers, dict):
                workers = [workers[key] for key in sorted(workers, key=int)]
        except (ValueError, TypeError, KeyError):
            jobs, workers, task = {}, [], {}
        if not workers:
            raise ValueError(
                f"TF_CONFIG names no workers: {text or 'it is not set'}. "
                'Expected {"cluster": {"worker": ["host:port", ...]}}.'
            )
        if task.get("type") == "worker":
            raise ValueError(
                "TF_CONFIG says that this process is a worker. Start workers "
                "by `python -m towers worker --port=...`, and make the Cluster "
                "in the chief only."
            )
        own = jobs.get("chief") or jobs.get("master") or [None]
        if isinstance(own, dict):
            own = list(own.values())
        return cls(workers, own[0], timeout=timeout, heartbeat=heartbeat)

    def devices(self, kind: str | None = None) -> list[str]:
        """Names of the workers' devices, by worker.

        Args:
          kind: "CPU" or "GPU"; None for both.
        """
        if kind is not None and not isinstance(kind, str):
            raise TypeError(
                f'`kind` must be None, "CPU" or "GPU"; got {kind!r}.'
            )
        found = []
        for device in tf.config.list_logical_devices(kind and kind.upper()):
            spec = tf.DeviceSpec.from_string(device.name)
            if (
                spec.job == "worker"
                and spec.task in self._joined
                and not spec.device_type.startswith("XLA_")
            ):
                found.append((spec.task, device.name))
        return [name for _, name in sorted(found, key=lambda pair: pair[0])]

    def alive(self) -> list[str]:
        """Addresses of the workers that answer, those of them too that have
        come back and wait for `update`."""
        return [p.worker.text for p in self._pulses.values() if p.incarnation]

    def pulses(self) -> dict[int, Pulse]:
        """Those of the workers that are connected, by task."""
        return {i: self._pulses[i] for i in self._joined if i not in self._lost}

    def lost(self) -> list[str]:
        """Addresses of the workers that were lost since the last `update`."""
        return [self._workers[i].text for i in sorted(self._lost)]

    def update(self) -> bool:
        """Drops the workers that are lost, and takes back those that returned.

        Variables on this process stay good, and so do functions that use none
        of the workers that are dropped. What lived on those is gone.

        Returns:
          Whether the workers are other ones, or started anew.

        Raises:
          WorkerLost: none answers.
        """
        changed = False
        for _ in range(_TRIES):
            now = self._usable()
            if not now:
                raise WorkerLost(
                    [worker.text for worker in self._workers.values()],
                    "No worker answers. Start one and call `update()` again.",
                )
            changed = changed or now != self._joined or bool(self._lost)
            if not changed and not self._torn:
                return False
            gone = {i for i, told in self._joined.items() if now.get(i) != told}
            self._give_up(gone | self._lost)
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

    def has(self, devices: Sequence[str]) -> bool:
        """Whether all those devices that are of workers are of these."""
        tasks = [task_of(device) for device in devices]
        return all(i is None or i in self._joined for i in tasks)

    def check(self, tasks: set[int]) -> None:
        """Raises a `WorkerLost` if one of these workers has been dropped."""
        gone = sorted(
            i for i in tasks - set(self._joined) if i in self._workers
        )
        if gone:
            raise WorkerLost(self._workers[i].text for i in gone)

    def is_behind(self) -> bool:
        """Whether `update` has something to do."""
        now = {
            i: p.incarnation for i, p in self._pulses.items() if p.incarnation
        }
        return bool(self._lost) or now != self._joined

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
        """As `watch`, inside of that, for those who go on."""
        if self._lost:  # TensorFlow would wait for it
            raise WorkerLost(self.lost())
        self._watched += 1
        try:
            yield
        except WorkerLost:
            raise
        except Exception as error:
            lost = self._whom(error)
            if lost is None:
                raise
            self._torn = True
            self._give_up(set(self._lost))
            raise WorkerLost(lost) from error
        finally:
            self._watched -= 1

    def _whom(self, error: Exception) -> list[str] | None:
        """The workers that an error means; None if it means none."""
        for i, incarnation in list(self._joined.items()):
            if i not in self._lost and not self._pulses[i].is_still(
                incarnation
            ):
                self._lost.add(i)
        if self._lost:
            return self.lost()
        if not is_sign(error):
            return None
        named = [i for i in tasks_named(error) if i in self._joined]
        return [self._workers[i].text for i in named]

    def _silent(self, task: int) -> Callable[[], None]:
        def note() -> None:
            if task in self._joined:
                self._lost.add(task)
                self._to_cut.set()

        return note

    def _cut_lost(self) -> None:
        """Lets nothing of TensorFlow's wait for a worker that is lost."""
        while not self._ended.is_set():
            self._to_cut.wait()
            for task in list(self._lost):
                cut(self._workers[task])
            if not self._lost:
                self._to_cut.clear()
            self._ended.wait(0.1)

    def _give_up(self, tasks: set[int]) -> None:
        """Has models give up variables of workers, before one is touched.

        What they were is kept until TensorFlow has dropped the workers.
        """
        workers = tuple(self._workers[i].text for i in sorted(tasks))
        for holder in list(_HOLDERS) if tasks else ():
            self._graves += holder.lose(tasks, workers)

    def _usable(self) -> dict[int, str]:
        """Incarnations of the workers that answer on both ports."""
        found = {}
        for i, pulse in self._pulses.items():
            incarnation = pulse.incarnation
            if incarnation and not trouble_with(pulse.worker, self._heartbeat):
                found[i] = incarnation
        return found

    def _apply(self, incarnations: dict[int, str]) -> None:
        """Connects TensorFlow to these workers.

        Raises:
          tf.errors.OpError: one has died since it was asked.
        """
        tasks = {i: self._workers[i].target for i in incarnations}
        _TASKS.update((target, i) for i, target in tasks.items())
        self._joined = {**self._joined, **incarnations}  # may be lost from now
        self._lost -= set(incarnations)
        if tf_cluster.own_address() is None:
            tf.config.experimental_connect_to_cluster(
                tf.train.ClusterSpec(
                    {"localhost": [self.address], "worker": tasks}
                )
            )
            tf.config.list_logical_devices()  # now, not at the first op
        else:
            tf_cluster.update_tasks("worker", tasks)
        self._joined = dict(incarnations)
        self._lost = {
            i
            for i, told in incarnations.items()
            if self._pulses[i].incarnation != told
        }
        self._torn = False
        self._graves.clear()

    def _connect(self, deadline: float) -> None:
        """Connects to all, or says who does not answer.

        Raises:
          TimeoutError: after `deadline`.
        """
        while True:
            now = self._usable()
            apart: list[str] = []
            if len(now) == len(self._workers):
                with contextlib.suppress(tf.errors.OpError):
                    self._apply(now)
                    apart = self._apart()
                    if not self._lost and not apart:
                        return
            if time.monotonic() > deadline:
                raise TimeoutError(self._troubles(apart))
            time.sleep(0.1)

    def _apart(self) -> list[str]:
        """Which workers cannot call this process, or the next of them.

        TensorFlow fetches tensors from where they are, and would wait.
        """
        own = Address.parse(self.address, "address")
        told = []
        workers = list(self._workers.values())
        next_ones = [*workers[1:], workers[0]]
        for pulse, other_worker in zip(self._pulses.values(), next_ones):
            for other in (own, other_worker):
                trouble = pulse.trouble_in_reaching(other)
                if trouble:
                    told.append(
                        f"{pulse.worker.text} (it cannot call {other.target}: "
                        f"{trouble})"
                    )
        return told

    def _troubles(self, apart: Sequence[str]) -> str:
        told = list(apart)
        for pulse in self._pulses.values() if not told else ():
            trouble = pulse.trouble or trouble_with(
                pulse.worker, min(1.0, self._heartbeat)
            )
            if trouble:
                told.append(f"{pulse.worker.text} ({trouble})")
        return (
            f"Of {len(self._workers)} workers, {len(told)} cannot be used: "
            f"{', '.join(told)}. Expected each to run `python -m towers worker "
            "--port=PORT --host=ADDRESS`, whose heartbeat is by default on "
            "PORT + 1000, both ports to be open between these machines, and "
            f"this process to be called at `address`, {self.address}."
        )

    def _end(self) -> None:
        """Lets the workers go."""
        self._ended.set()
        self._to_cut.set()
        for pulse in self._pulses.values():
            pulse.end()


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


def hold(model: Any) -> None:
    """Has `model.lose(tasks, workers)` called when workers are lost.

    It returns the variables that it gives up.
    """
    _HOLDERS.add(model)


def task_of(device: str) -> int | None:
    """The worker's task that a device is of; None for this process's."""
    spec = tf.DeviceSpec.from_string(device)
    return (spec.task or 0) if spec.job == "worker" else None
