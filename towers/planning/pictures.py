"""pictures: a placement as Graphviz draws it, before anything has run."""

import collections
import os
import shutil
import subprocess
from typing import Any

from towers.keras_model.checks import check_model
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.parameters import parameter_devices
from towers.placement.placement import Placement, check_placement
from towers.planning.steps import Steps, steps_of, variable_bytes
from towers.report.colours import rgb
from towers.report.summary import size


class Drawing(str):
    """A picture's source, of which notebooks show the picture."""

    def _repr_svg_(self) -> str | None:
        program = shutil.which("dot")
        if program is None:
            return None
        done = subprocess.run(
            [program, "-Tsvg"], input=self, capture_output=True, text=True
        )
        return done.stdout or None


def plot_placement(
    model: Any, placement: Placement, to_file: str = "placement.png"
) -> Any:
    """Draws where a placement puts a model's layers, as `plot_model` draws models.

    Towers stand side by side, their layers in the colour of the device that
    they run on, between the device that splits and the one that gathers;
    above them the devices that parameters live on. Nothing runs for it, and
    the devices need not be here (`available="any"`).

    >>> placement = towers.Placement(["/GPU:0", "/GPU:1"], available="any")
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> towers.plot_placement(model, placement, "")[:18]
    'digraph placement '

    Args:
      model: a built `keras.Model`.
      placement: a `Placement`.
      to_file: a path whose ending is a format of Graphviz's: .png, .svg, .pdf;
        or .dot, which needs no Graphviz. "" writes nothing.

    Returns:
      The picture's source, in Graphviz's language, a string; where there is
      Graphviz, a notebook shows it as the picture.

    Raises:
      TypeError: `model` is no Keras model, `placement` no `Placement`.
      ValueError: the model is not built, or `to_file` has no such ending.
      ImportError: there is no Graphviz.
    """
    check_model(model)
    check_placement(placement)
    if not model.built:
        raise ValueError(
            "`model` is not built, so there are no layers to draw. Call it on "
            "some data first."
        )
    program = check_ending(to_file, "to_file") if to_file else None
    text = Drawing(_source(model, placement))
    if not to_file:
        return text
    if program is None:
        with open(to_file, "w", encoding="utf-8") as file:
            file.write(text)
        return text
    done = subprocess.run(
        [program, f"-T{_ending(to_file)}", "-o", to_file],
        input=text,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"`to_file` is {to_file!r}, which Graphviz did not write: "
            f"{done.stderr.strip()} Expected a path that can be written."
        )
    return text


def check_ending(path: str, argument: str) -> str | None:
    """The program that draws a picture of such an ending; None writes its source.

    Raises:
      ValueError: Graphviz draws no such pictures.
      ImportError: there is no Graphviz.
    """
    ending = _ending(path)
    if ending == "dot":
        return None
    if not ending:
        raise ValueError(
            f"`{argument}` is {path!r}, without an ending that says the format. "
            "Expected one such as 'placement.png'."
        )
    program = shutil.which("dot")
    if program is None:
        raise ImportError(
            "plot_placement draws with Graphviz, and there is no program `dot`. "
            "Install it, on Debian by `apt-get install graphviz`, or give "
            f"`{argument}` the ending .dot."
        )
    tried = subprocess.run(
        [program, f"-T{ending}"], input=b"graph {}", capture_output=True
    )
    if tried.returncode:
        raise ValueError(
            f"`{argument}` is {path!r}, which Graphviz cannot draw: "
            f"{tried.stderr.decode().strip()}"
        )
    return program


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower().removeprefix(".")


def _source(model: Any, placement: Placement) -> str:
    """The picture in Graphviz's language."""
    graph = LayerGraph(model, layer_devices=placement.layer_devices)
    steps = steps_of(model, None)
    held: collections.Counter = collections.Counter()
    for variable, device in zip(
        graph.variables, parameter_devices(graph, placement)
    ):
        held[device] += variable_bytes(variable)
    pinned = [d for pin in graph.pins.values() for d in _devices_of(pin)]
    gathers = placement.output_device or placement.devices[0]
    devices = sorted(
        {*placement.devices, *held, *pinned, placement.input_device, gathers}
    )
    total = sum(placement.shares)
    lines = [
        "digraph placement {",
        'graph [rankdir=TB, compound=true, newrank=true, fontname="sans-serif"]',
        'node [shape=box, style="filled,rounded", fontname="sans-serif"]',
        'edge [color="#555555", fontname="sans-serif"]',
        _node("split", f"split\n{placement.input_device}", devices),
        _node("gather", f"gather\n{gathers}", devices),
    ]
    for device, count in sorted(held.items()):
        label = f"variables, {size(count)}\n{device}"
        lines.append(_node(f"held {device}", label, devices, "cylinder"))
    for i, (device, share) in enumerate(
        zip(placement.devices, placement.shares)
    ):
        lines += _tower(i, graph, steps, device, devices, share / total)
        first, last = _ends(steps)
        lines += [_edge("split", f"{i} {k}") for k in first]
        lines += [_edge(f"{i} {k}", "gather") for k in last]
        lines += [
            _edge(
                *(f"held {where}", f"{i} 0"),
                f', style=dashed, lhead="cluster {i}"',
            )
            for where in held
            if steps.steps
        ]
    if steps.steps:  # the towers stand in their order
        firsts = " -> ".join(
            _quoted(f"{i} 0") for i in range(len(placement.devices))
        )
        lines.append(f"{{rank=same; {firsts} [style=invis]}}")
    return "\n".join([*lines, "}"]) + "\n"


def _tower(
    i: int,
    graph: LayerGraph,
    steps: Steps,
    device: str,
    devices: list[str],
    share: float,
) -> list[str]:
    """A tower in a frame: a node per layer, an edge per value."""
    label = f"tower_{i} on {device}, {share:.0%} of the rows"
    lines = [f'subgraph "cluster {i}" {{', f"label={_quoted(label)}"]
    for k, step in enumerate(steps.steps):
        where = graph.device_of(step.layer, i) or device
        text = f"{step.path}\n{type(step.layer).__name__}, {where}"
        lines.append(_node(f"{i} {k}", text, devices, device=where))
    edges = dict.fromkeys(
        (made, taker) for made, takers, _ in steps.values for taker in takers
    )
    lines += [_edge(f"{i} {a}", f"{i} {b}") for a, b in edges if a != b]
    return [*lines, "}"]


def _ends(steps: Steps) -> tuple[list[int], list[int]]:
    """The steps that take no other's values, and those that give none."""
    makers = {made for made, _, _ in steps.values}
    takers = {taker for _, several, _ in steps.values for taker in several}
    count = range(len(steps.steps))
    return (
        [k for k in count if k not in takers],
        [k for k in count if k not in makers],
    )


def _devices_of(pin: Any) -> list[str]:
    return [pin] if isinstance(pin, str) else list(pin)


def _node(
    name: str,
    label: str,
    devices: list[str],
    shape: str = "",
    device: str = "",
) -> str:
    where = device or label.split("\n")[-1]
    more = f", shape={shape}, style=filled" if shape else ""
    colour = rgb(devices, where)
    return (
        f'{_quoted(name)} [label={_quoted(label)}, fillcolor="{colour}"{more}]'
    )


def _edge(source: str, target: str, more: str = "") -> str:
    # Edges need an attribute list for what follows to be one.
    return f'{_quoted(source)} -> {_quoted(target)} [arrowsize="0.7"{more}]'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n") + '"'
