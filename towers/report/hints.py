"""hints: what to change, each true by what a report counts."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from towers.placement.scopes import tower_of
from towers.report.parts import WITHIN
from towers.report.summary import size

MOST = 3
_GATHERS = ("GatherV2", "ResourceGather")


def hints(report: Any) -> tuple[str, ...]:
    """At most three, of an `ExecutionReport`."""
    advice = [
        *_misplaced(report),
        *_pinned(report),
        *(list(_tables(report)) or _one_home(report)),
        *_eager(report),
    ]
    return tuple(advice[:MOST])


def _misplaced(report: Any) -> Iterator[str]:
    if report.moved:
        first = report.moved[0]
        yield (
            f"{_ops(len(report.moved))} elsewhere than asked: {first.op} "
            f"({first.kind}) asked for {first.asked} and got {first.got}. Ask for "
            "a device that has a kernel for it, or leave it as it is."
        )


def _pinned(report: Any) -> Iterator[str]:
    within, total = report.summary.within_towers, report.total_bytes
    if 2 * within <= total or not within:
        return
    pairs: Counter = Counter()
    layers = set()
    for transfer in report.transfers:
        for part in transfer.parts:
            if part.kind in WITHIN and part.bytes:
                ends = sorted((transfer.source, transfer.target))
                pairs[tuple(ends)] += part.bytes
                layers.add(part.layer)
    ((one, other), most) = pairs.most_common(1)[0]
    yield (
        f"{size(within)} of {size(total)} are activations and their gradients of "
        f"{len(layers)} layers with a neighbour that is pinned elsewhere, "
        f"{size(most)} of them between {one} and {other}. Pin layers that follow "
        "each other to one device, as `towers.spread_layers` does."
    )


def _tables(report: Any) -> Iterator[str]:
    """Tables that cross whole, where rows of them would be less."""
    by_layer, total = report.by_layer, report.total_bytes
    looked_up = {
        tower_of(name)[1].rpartition("/")[0]  # type: ignore[index]
        for _, name, op in report.nodes
        if op in _GATHERS and tower_of(name)
    }
    for layer, kinds in by_layer.items():
        whole, rows = kinds.get("parameters", 0), kinds.get("gradients", 0)
        if layer in looked_up and 4 * whole > total and whole > rows > 0:
            home = report.parameter_bytes
            where = max(home, key=lambda d: home[d])
            yield (
                f"{size(whole)} of {size(total)} are the whole table of {layer}, of "
                f"which towers change {size(rows)} of rows. "
                f'layer_devices={{"{layer}": "{where}"}} lets only rows cross.'
            )


def _one_home(report: Any) -> Iterator[str]:
    """Parameters that all come from one device, and go to several."""
    homes: Counter = Counter()
    targets = set()
    for transfer in report.transfers:
        for part in transfer.parts:
            if part.kind == "parameters" and part.bytes:
                homes[transfer.source] += part.bytes
                targets.add(transfer.target)
    if len(homes) != 1 or len(targets) < 2:
        return
    (home,) = homes
    own, total = homes[home], report.total_bytes
    own += sum(
        part.bytes or 0
        for transfer in report.transfers
        for part in transfer.parts
        if part.kind == "gradients" and transfer.target == home
    )
    if 2 * own > total:
        yield (
            f"{size(own)} of {size(total)} are parameters and their gradients "
            f"between {home} and {len(targets)} others. "
            'parameter_device="balanced" spreads them; a larger batch has fewer '
            "steps."
        )


def _eager(report: Any) -> Iterator[str]:
    count = report.eager.total()
    if count > len(report.nodes):
        yield (
            f"{count:,} ops ran one by one outside of functions, and "
            f"{len(report.nodes):,} in them. Put them into a tf.function."
        )


def _ops(count: int) -> str:
    return "1 op is" if count == 1 else f"{count:,} ops are"
