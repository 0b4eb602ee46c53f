"""report: what ran where, and what crossed between devices, as a record."""

import collections
import dataclasses
import functools
import json
import os
import re
from typing import Any

from towers.placement.device_names import few, short
from towers.report import figure, html, write_graph
from towers.report.hints import hints
from towers.report.moved import Moved
from towers.report.partitions import Transfer
from towers.report.plain import plain
from towers.report.summary import Summary, summed
from towers.report.text import listed, printed
from towers.report.variables import VariableUse

# What towers and verbs do on the host of their device, see `engine/host.py`.
_HOSTS = re.compile(
    r"(^|/)host/(tower_\d|split|all_towers|replicate|gather|merge)"
)
_CALLS = re.compile(r"((?:^|/)tower_\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class ExecutionReport:
    """What ran where, see `execution_report`.

    Attributes:
      nodes: (device, name, op type) of each op in the executed graphs, what
        carries tensors between them left out.
      transfers: what crossed between devices.
      variables: what was read or written.
      least_bytes: the bytes if each value crossed once to each device that
        received it; of several that are joined for their way, each counts.
      least_between_machines: the bytes if each value crossed once to each other
        machine that received it; a machine is a process.
      eager: how many ops of a (device, type) ran outside of functions.
      peak_bytes: by GPU, the most memory that was in use at once.
      graphs: what was executed, as partitions of `GraphDef`s.
      moved: ops that are elsewhere than they were asked to be; of functions that
        are called under a device of another process none is told.
      subject: what was reported, with which versions, and when.
    """

    nodes: tuple[tuple[str, str, str], ...]
    transfers: tuple[Transfer, ...]
    variables: tuple[VariableUse, ...]
    least_bytes: int
    least_between_machines: int = 0
    eager: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, hash=False
    )
    peak_bytes: dict[str, int] = dataclasses.field(
        default_factory=dict, hash=False
    )
    graphs: tuple[Any, ...] = dataclasses.field(
        default=(), repr=False, compare=False
    )
    moved: tuple[Moved, ...] = ()
    subject: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def ops(self) -> collections.Counter:
        """How many ops of a (device, type) there are, in graphs that ran."""
        return collections.Counter((d, kind) for d, _, kind in self.nodes)

    @functools.cached_property
    def summary(self) -> Summary:
        """The sums by device, pair of devices and machine."""
        return summed(self.nodes, self.transfers, self.variables)

    @property
    def total_bytes(self) -> int:
        """All bytes that crossed, but those of `unknown`."""
        return sum(self.bytes_between.values())

    @property
    def bytes_between(self) -> dict[tuple[str, str], int]:
        """Bytes by (source, target)."""
        return self.summary.bytes_between

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by what crossed, most first; their sum is `total_bytes`.

        Keys are "parameters", "gradients", "batch", "batch gradients", "outputs",
        "output gradients", "state"; "activations" and "activation gradients", which
        go from layer to layer of a tower that is on several devices; and "rest".
        """
        return self.summary.by_kind

    @property
    def by_layer(self) -> dict[str, dict[str, int]]:
        """The same bytes by layer, then by kind; those of no layer under ""."""
        sizes: dict[str, dict[str, int]] = {}
        for (layer, kind), count in self.summary.by_layer.items():
            sizes.setdefault(layer, {})[kind] = count
        return sizes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that crossed only as layers of a tower are on other devices."""
        return self.summary.within_towers

    @property
    def hints(self) -> tuple[str, ...]:
        """What to change: at most three, each true by a count in here."""
        return hints(self)

    @property
    def between_machines(self) -> dict[tuple[str, str], int]:
        """What the network carries: bytes by (source, target), which are tasks.

        As ("/job:localhost/replica:0/task:0", "/job:worker/replica:0/task:1"), of
        which the first is this process. Empty where nothing left it.
        """
        return self.summary.between_machines

    @property
    def busiest_link(self) -> tuple[str, int, int] | None:
        """The machine with most on its network: task, bytes sent, received."""
        return self.summary.busiest_link

    @property
    def unknown(self) -> tuple[Transfer, ...]:
        """Transfers of a size that is not known."""
        return tuple(t for t in self.transfers if t.bytes is None)

    @property
    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of trainable variables, by device."""
        return self.summary.of_kind("parameter")

    @property
    def slot_bytes(self) -> dict[str, int]:
        """Bytes of the optimizers' variables, by device."""
        return self.summary.of_kind("slot")

    def assert_runs_on(self, scope: str, device: str) -> None:
        """Raises unless all ops of a name scope ran on one device.

        What belongs to the host of a GPU, as assertions and seeds do, is in a
        scope of its own: "host/tower_1".

        Args:
          scope: part of a name between slashes: "tower_1", "tower_1/conv2d";
            a tower is meant in all calls that a step makes of towers.
          device: in any spelling.

        Raises:
          AssertionError: prints the ops that ran elsewhere; or no op has this
            scope.
        """
        # Of several calls of towers in one graph, the second is "tower_1_1".
        named = _CALLS.sub(r"\1(_\\d+)?", re.escape(scope.strip("/")))
        part = re.compile(f"(^|/){named}(/|$)")
        nodes = [
            node
            for node in self.nodes
            if part.search(node[1])
            and (scope.startswith("host/") or not _HOSTS.search(node[1]))
        ]
        if not nodes:
            raise AssertionError(
                f"No op that ran is in the scope {scope!r}. Expected part of a "
                "name between slashes, such as 'tower_1'."
            )
        expected = short(device)
        strays = [node for node in nodes if node[0] != expected]
        if strays:
            lines = [f"  {d}: {name} ({kind})" for d, name, kind in strays]
            raise AssertionError(
                f"{len(strays)} of {len(nodes)} ops of {scope!r} ran elsewhere "
                f"than on {expected}:\n" + "\n".join(lines)
            )

    def assert_bytes(self, at_most: int) -> None:
        """Raises unless no more bytes than this crossed between devices.

        Raises:
          AssertionError: prints the largest transfers; or those whose size is
            not known.
        """
        if self.unknown:
            raise AssertionError(
                f"Expected at most {at_most:,} bytes, but of some transfers "
                "the size is not known:\n" + listed(self.unknown)
            )
        if self.total_bytes > at_most:
            raise AssertionError(
                f"Expected at most {at_most:,} bytes between devices, got "
                f"{self.total_bytes:,}:\n" + listed(self.transfers)
            )

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, fit for JSON."""
        return plain(self)

    def save(self, path: Any) -> None:
        """Writes the report to one file, for people or for programs.

        Args:
          path: a path that ends in ".html", for one page that opens in any
            browser without a network, or in ".json", for `to_dict()`.

        Raises:
          ValueError: another ending.
        """
        ending = os.path.splitext(os.fspath(path))[1].lower()
        if ending in (".html", ".htm"):
            text = self._page()
        elif ending == ".json":
            text = json.dumps(self.to_dict(), indent=1)
        else:
            raise ValueError(
                f"`path` is {path!r}, but a report is saved as .html or .json. "
                'Write report.save("report.html").'
            )
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def write_graph(self, logdir: Any) -> None:
        """Writes what was executed, for TensorBoard's page of graphs.

        There, "colour by device" shows where each op did run, sends and
        receives among them.

        Args:
          logdir: the folder that TensorBoard looks at.
        """
        write_graph.write_graph(self.graphs, logdir)

    def plot(self) -> Any:
        """Bytes of variables per device, and a matrix of what crossed.

        Returns:
          A `matplotlib.figure.Figure`; `.savefig("report.png")` writes it.

        Raises:
          ImportError: `pip install towers[pictures]` brings what is missing.
        """
        return figure.figure(self.summary)

    def _page(self) -> str:
        return html.page(self)

    def _repr_html_(self) -> str:
        """The short form, which notebooks show."""
        return html.short_form(self)

    def __repr__(self) -> str:
        devices = few(sorted({device for device, _ in self.ops}))
        return (
            f"<{type(self).__name__}: {len(self.nodes):,} ops on "
            f"{devices or 'no device'}; {self.total_bytes:,} bytes in "
            f"{len(self.transfers):,} transfers>"
        )

    def __str__(self) -> str:
        return printed(self)
