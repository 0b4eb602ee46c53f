"""answers: what a report says in sentences, for text and page alike."""

from typing import Any

from towers.placement.device_names import few
from towers.report.summary import size


def answers(report: Any) -> list[tuple[str, str]]:
    """What is asked, and the answer; what does not arise is left out."""
    pairs = [
        ("Crossed", _crossed(report)),
        ("By kind", _by_kind(report)),
        ("Most of it", _largest(report)),
        ("Between machines", _network(report)),
        ("Most ops", _busiest(report)),
        ("Parameters", _homes(report)),
        ("Elsewhere than asked", _misplaced(report)),
    ]
    pairs += [("What to change", hint) for hint in report.hints]
    return [(asked, answer) for asked, answer in pairs if answer]


def _crossed(report: Any) -> str:
    unknown = len(report.unknown)
    more = f" (and {unknown:,} of unknown size)" * bool(unknown)
    count = len(report.transfers)
    answer = (
        f"{size(report.total_bytes)} in {count:,} "
        f"transfer{'s' * (count != 1)}{more}"
    )
    if not count:
        return answer
    answer += f"; {_twice(report.total_bytes, report.least_bytes)}"
    pinned = report.pinned_bytes
    if pinned:
        why = "a tower's layers are on several devices"
        why = why if report.moved else "layers are pinned"
        answer += f"; {size(pinned)} only because {why}"
    return answer


def _twice(total: int, least: int) -> str:
    if total <= least:
        return "nothing crossed twice"
    return f"{size(total - least)} crossed twice"


def _by_kind(report: Any) -> str:
    total = report.total_bytes
    parts, small = [], 0
    for kind, count in report.by_kind.items():
        if kind == "rest" or 200 * count < total:
            small += count
        else:
            parts.append(f"{kind} {size(count)} ({100 * count / total:.0f} %)")
    return ", ".join([*parts, *([f"the rest {size(small)}"] if small else [])])


def _largest(report: Any) -> str:
    layers = [(sum(k.values()), x) for x, k in report.by_layer.items() if x]
    if not layers:
        return ""
    count, layer = max(layers)
    kinds = ", ".join(
        f"{kind} {size(n)}" for kind, n in report.by_layer[layer].items()
    )
    return f"of layer {layer} {size(count)} crossed: {kinds}"


def _network(report: Any) -> str:
    busiest = report.busiest_link
    if busiest is None:
        return ""
    machine, sent, received = busiest
    total = sum(report.between_machines.values())
    return (
        f"{size(total)}; {_twice(total, report.least_between_machines)}. The "
        f"busiest link is that of {machine}: {size(sent)} out, "
        f"{size(received)} in"
    )


def _busiest(report: Any) -> str:
    ran = report.summary.ran
    if not ran:
        return ""
    ((device, most),) = ran.most_common(1)
    return (
        f"{device} has {most:,} of {ran.total():,}; how long they take, a timeline "
        "tells"
    )


def _homes(report: Any) -> str:
    homes = sorted(report.parameter_bytes.items(), key=lambda p: -p[1])
    return few([f"{size(count)} on {device}" for device, count in homes])


def _misplaced(report: Any) -> str:
    if not report.moved:
        return "no op" if report.nodes else ""
    return few(
        [
            f"{m.op} ({m.kind}) is on {m.got}, not {m.asked}"
            for m in report.moved
        ]
    )
