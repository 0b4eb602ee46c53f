"""plain: a report as numbers, strings, lists and dicts, and what it is of."""

import collections
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf


def plain(report: Any) -> dict[str, Any]:
    """All of an `ExecutionReport`, fit for JSON."""
    return {
        "subject": report.subject,
        "ops": _counted(report.ops),
        "transfers": [t.to_dict() for t in report.transfers],
        "variables": [dataclasses.asdict(v) for v in report.variables],
        "bytes_between": _listed(report.bytes_between),
        "total_bytes": report.total_bytes,
        "least_bytes": report.least_bytes,
        "by_kind": report.by_kind,
        "by_layer": report.by_layer,
        "pinned_bytes": report.pinned_bytes,
        "between_machines": _listed(report.between_machines),
        "least_between_machines": report.least_between_machines,
        "parameter_bytes": report.parameter_bytes,
        "slot_bytes": report.slot_bytes,
        "eager": _counted(report.eager),
        "peak_bytes": report.peak_bytes,
        "moved": [dataclasses.asdict(m) for m in report.moved],
        "hints": list(report.hints),
    }


def subject_of(fn: Callable[..., Any], args: Sequence[Any]) -> str:
    """What is reported: "sequential.fit of [60, 28, 28], TensorFlow ..., today"."""
    owner = getattr(fn, "__self__", None)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    if isinstance(owner, keras.Model):
        name = f"{owner.name}.{name}"
    leaves = tf.nest.flatten(list(args[:1]))
    shapes = [x.shape for x in leaves if hasattr(x, "shape")]
    inputs = f" of {', '.join(str(list(s)) for s in shapes[:3])}" * bool(shapes)
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        f"{name}{inputs}; TensorFlow {tf.__version__}, Keras "
        f"{keras.__version__}; {now}"
    )


def _counted(ran: collections.Counter) -> list[dict[str, Any]]:
    return [
        {"device": device, "op": kind, "count": count}
        for (device, kind), count in sorted(ran.items())
    ]


def _listed(pairs: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [
        {"source": source, "target": target, "bytes": count}
        for (source, target), count in pairs.items()
    ]
