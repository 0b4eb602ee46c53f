"""profile: which op ran when, on which device, and what it waited for.

The profiler tells names and times, the executed graphs tell each name's device.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import op_of_kernel, rendezvous, source
from towers.foreign.tf_profiler import (
    ARRIVED,
    EXECUTOR,
    ISSUED,
    NODE,
    OP_OF_KERNEL,
    PROCESS,
    RUN,
    Event,
)
from towers.placement.device_names import process_of, short
from towers.report.graph_defs import ends, walked
from towers.report.partitions import Transfer

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Op:
    """An op that ran.

    Attributes:
      device: where.
      name: its name in the executed graph.
      kind: its type.
      start: in seconds.
      seconds: how long.
    """

    device: str
    name: str
    kind: str
    start: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A tensor that arrived from another device.

    Attributes:
      source, target: the devices.
      tensor: its name in the executed graph.
      asked: when the target began to wait for it, in seconds.
      sent: when it was sent; None if that was in another process.
      arrived: when it was there.
      bytes: how many it has; None if that is not known.
      holds: what it holds in words, "weights of dense/kernel"; "" if unknown.
    """

    source: str
    target: str
    tensor: str
    asked: float
    sent: float | None
    arrived: float
    bytes: int | None = None
    holds: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a call ran, in the order of time.

    Attributes:
      ops: without those that carry tensors.
      crossings: the tensors that crossed between devices.
    """

    ops: tuple[Op, ...]
    crossings: tuple[Crossing, ...]


def profile(
    graphs: Sequence[Any],
    events: Sequence[Event],
    sent: Mapping[Any, Transfer] | None = None,
) -> Profile:
    """Joins what the profiler heard with what was executed.

    Args:
      graphs: the partitions, a `GraphDef` each.
      events: what the profiler heard meanwhile.
      sent: what sends carried, by their `rendezvous`, where it is known.
    """
    nodes = _nodes(graphs)
    ran = list(_by_executor(events))
    devices = _executors(ran, nodes)
    on_gpus = {e.device for e in events if e.device}
    ops = []
    for event, executor in ran:
        name, _, kind = event.name.rpartition(":")
        if kind in (*tf_nodes.SENDS, *tf_nodes.RECEIVES):
            continue
        device = _device(nodes.get(name, {}), devices.get(executor))
        if device and device not in on_gpus:
            ops.append(Op(device, name, kind, event.start, event.seconds))
    for event in events:  # a GPU's op is as long as its kernels
        if event.device and ":" in str(event.stats.get(OP_OF_KERNEL, "")):
            name, _, kind = event.stats[OP_OF_KERNEL].rpartition(":")
            ops.append(Op(event.device, name, kind, event.start, event.seconds))
    return Profile(
        tuple(sorted(ops, key=lambda op: op.start)),
        tuple(_crossings(_Carried(graphs), events, ran, sent or {})),
    )


def times_sent(
    graphs: Sequence[Any], events: Sequence[Event]
) -> dict[Any, int]:
    """How often each tensor crossed, by the `rendezvous` of its send."""
    totals: collections.Counter = collections.Counter()
    counts = _Carried(graphs).times(events, list(_by_executor(events)))
    for (which, _), times in counts.items():
        totals[which] += times
    return dict(totals)


class _Carried:
    """The sends and receives of what was executed.

    Attributes:
      sends, receives: nodes by `rendezvous`.
      takers: the nodes that take what was received, by `rendezvous`.
      sources: the node whose value a send carries, by `rendezvous`.
    """

    def __init__(self, graphs: Sequence[Any]):
        self.sends: dict[Any, Any] = {}
        self.receives: dict[Any, Any] = {}
        self.takers: dict[Any, list[Any]] = collections.defaultdict(list)
        self.sources: dict[Any, Any] = {}
        for graph in graphs:
            walk = [node for _, _, node in walked(graph)]
            here = {node.name: node for node in walk}
            for node in walk:
                if node.op in tf_nodes.SENDS:
                    self.sends[rendezvous(node)] = node
                    self.sources[rendezvous(node)] = here.get(
                        source(node.input[0])
                    )
                elif node.op in tf_nodes.RECEIVES:
                    self.receives[rendezvous(node)] = node
                for name in node.input:
                    received = here.get(source(name))
                    if received and received.op in tf_nodes.RECEIVES:
                        self.takers[rendezvous(received)].append(node)

    def times(
        self, events: Sequence[Event], ran: Sequence[tuple[Event, Any]]
    ) -> dict[tuple[Any, Any], int]:
        """How often a tensor crossed in a run, by (`rendezvous`, run).

        After its last step a loop sends once more, nothing, so that the
        other side ends, too. So what counts is how often the op ran whose
        value is sent, or those that take it, if the profiler tells of them.
        Where it does not tell the run of a send, the receive does.
        """
        heard: dict[Any, collections.Counter] = collections.defaultdict(
            collections.Counter
        )
        kinds = set()
        for event, executor in ran:
            name, _, kind = event.name.rpartition(":")
            heard[name][executor[0]] += 1
            kinds.add(kind)
        requests: dict[Any, collections.Counter] = collections.defaultdict(
            collections.Counter
        )
        for event in events:
            if event.name == ISSUED:
                requests[event.stats.get(NODE)][_run(event)] += 1
        processes = {event.process for event in events}
        counts = {}
        for which in {**self.sends, **self.receives}:
            send, receive = self.sends.get(which), self.receives.get(which)
            runs = collections.Counter(heard[send.name] if send else ())
            cut_off = runs.pop(None, 0)
            if receive and (cut_off or not runs):
                runs |= requests[receive.name]
            maker = self.sources.get(which)
            sender, receiver = (process_of(end.decode()) for end in which[:2])
            makers = []
            if maker is not None and op_of_kernel(maker.op) in kinds:
                makers = [maker] if sender in processes else []
            elif receiver in processes:
                makers = [
                    n for n in self.takers[which] if op_of_kernel(n.op) in kinds
                ]
            for run, times in runs.items():
                alive = [
                    heard[node.name][run] + heard[node.name][None]
                    for node in makers
                ]
                counts[which, run] = min(times, max(alive, default=times))
        return counts


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in intervals that do not touch."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _nodes(graphs: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Nodes by name, and by device."""
    nodes: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for graph in graphs:
        for device, name, node in walked(graph):
            nodes[name][device] = node
            nodes[node.name].setdefault(device, node)
    return nodes


def _by_executor(
    events: Sequence[Event],
) -> Iterator[tuple[Event, Any]]:
    """Events on the host, each with the run and executor that it is part of.

    An executor may still be leaving its thread when the last step is done and
    the profiler stops, which then tells of the ops and not of the executor.
    Those of one thread are one executor's, of a run that is None.
    """
    events = sorted(events, key=lambda e: (e.start, -e.seconds))
    open_: dict[Any, list[tuple[float, Any]]] = collections.defaultdict(list)
    for event in events:
        stack = open_[event.process, event.thread]
        while stack and stack[-1][0] <= event.start:
            stack.pop()
        if event.name == PROCESS:
            own = event.process, event.stats.get(EXECUTOR)
            executor = _run(event), own
            stack.append((event.start + event.seconds, executor))
        elif not event.device and ":" in event.name:
            cut_off = None, (event.process, event.thread)
            yield event, stack[-1][1] if stack else cut_off


def _executors(
    ran: Iterable[tuple[Event, Any]], nodes: dict[str, dict[str, Any]]
) -> dict[Any, str]:
    """The device of each executor, by names that are on one device only."""
    votes: dict[Any, collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    for event, executor in ran:
        places = nodes.get(event.name.rpartition(":")[0], {})
        if len(places) == 1:
            votes[executor].update(list(places))
    return {
        executor: counts.most_common(1)[0][0]
        for executor, counts in votes.items()
    }


def _device(places: dict[str, Any], executor: str | None) -> str | None:
    """Where a node ran: the one place there is, or its executor's."""
    if len(places) == 1:
        return next(iter(places))
    return executor if executor in places else None


def _run(event: Event) -> Any:
    return next((event.stats[k] for k in RUN if k in event.stats), None)


def _crossings(
    carried: _Carried,
    events: Sequence[Event],
    ran: Sequence[tuple[Event, Any]],
    carried_by: Mapping[Any, Transfer],
) -> Iterator[Crossing]:
    """Receives, each with the send that it answers, in the order of time."""
    left = carried.times(events, ran)
    sent: dict[Any, list[float]] = collections.defaultdict(list)
    for event, executor in ran:
        name, _, kind = event.name.rpartition(":")
        if kind in tf_nodes.SENDS:
            sent[name, executor[0]].append(event.start)
    waits: dict[str, list[Any]] = collections.defaultdict(list)
    for which, node in carried.receives.items():
        waits[node.name].append(which)
    for name, run, asked, arrived in _receives(events):
        which = next((w for w in waits[name] if left.get((w, run))), None)
        if which is None:
            continue
        left[which, run] -= 1
        start, end = ends(carried.receives[which])
        send = carried.sends.get(which)
        times = []
        if send:
            times = sent[send.name, run] or sent[send.name, None]
        transfer = carried_by.get(which)
        if start != end:
            yield Crossing(
                source=start,
                target=end,
                tensor=send.input[0] if send else name,
                asked=asked,
                sent=times.pop(0) if times else None,
                arrived=arrived,
                bytes=transfer.bytes_once if transfer else None,
                holds=transfer.holds if transfer else "",
            )


def _receives(
    events: Sequence[Event],
) -> Iterator[tuple[str, Any, float, float]]:
    """Name, run, and times of issue and arrival, in the order of arrival.

    What the profiler had not heard arrive when it stopped came at the end.
    """
    requests: dict[Any, list[float]] = collections.defaultdict(list)
    for event in sorted(events, key=lambda e: e.start):
        which = str(event.stats.get(NODE)), _run(event)
        if event.name == ISSUED:
            requests[which].append(event.start)
        elif event.name == ARRIVED:
            since = requests[which].pop(0) if requests[which] else event.start
            yield *which, since, event.start
    end = max((e.start + e.seconds for e in events), default=0.0)
    for which, times in requests.items():
        for since in times:
            yield *which, since, end


def partition_devices(graphs: Sequence[Any]) -> list[str]:
    """All devices that have a part of what was executed."""
    return sorted({short(n.device) for g in graphs for n in g.node if n.device})
