"""pictures: a placement as Graphviz draws it, before anything has run."""

import collections
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from towers.keras_model.checks import check_model
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.parameters import parameter_devices
from towers.keras_model.pieces.rules import sizes_of
from towers.placement.device_names import few
from towers.placement.layer_devices import devices_of
from towers.placement.placement import Placement, check_placement
from towers.planning.folding import Block, repeated
from towers.planning.steps import Steps, steps_of, variable_bytes
from towers.report.colours import rgb
from towers.report.summary import size

_MANY = 4  # towers that are alike, to be drawn as one


class Drawing(str):
    """A picture's source, of which notebooks show the picture."""

    def _repr_svg_(self) -> str | None:
        program = shutil.which("dot")
        if program is None:
            return None
        process = subprocess.run(
            [program, "-Tsvg"], input=self, capture_output=True, text=True
        )
        return process.stdout or None


def plot_placement(
    model: Any,
    placement: Placement,
    to_file: str = "placement.png",
    fold: bool = True,
) -> Any:
    """Draws where a placement puts a model's layers, as `plot_model` draws models.

    Towers stand side by side, their layers in the colour of the device that
    they run on, between the device that splits and the one that gathers;
    above them the devices that parameters live on. Four towers or more that are
    alike but for their device are drawn as one, and so are blocks of layers that
    come again, one after the other. Nothing runs for it, and the devices need not
    be here (`available="any"`).

    >>> placement = towers.Placement(["/GPU:0", "/GPU:1"], available="any")
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> towers.plot_placement(model, placement, "")[:18]
    'digraph placement '

    Args:
      model: a built `keras.Model`; of a `TowerModel` its template.
      placement: a `Placement`.
      to_file: a path whose ending is a format of Graphviz's: .png, .svg, .pdf;
        or .dot, which needs no Graphviz. "" writes nothing.
      fold: whether what is alike is drawn once; else all towers and layers are.

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
    model = getattr(model, "template", model)
    if not model.built:
        raise ValueError(
            "`model` is not built, so there are no layers to draw. Call it on "
            "some data first."
        )
    program = check_picture_ending(to_file, "to_file") if to_file else None
    text = Drawing(_source(model, placement, fold))
    if not to_file:
        return text
    if program is None:
        with open(to_file, "w", encoding="utf-8") as file:
            file.write(text)
        return text
    process = subprocess.run(
        [program, f"-T{_ending(to_file)}", "-o", to_file],
        input=text,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise ValueError(
            f"`to_file` is {to_file!r}, which Graphviz did not write: "
            f"{process.stderr.strip()} Expected a path that can be written."
        )
    return text


def check_picture_ending(path: str, argument: str) -> str | None:
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


def _source(model: Any, placement: Placement, fold: bool) -> str:
    """The picture in Graphviz's language."""
    graph = LayerGraph(model, layer_devices=placement.layer_devices)
    steps = steps_of(model, None)
    held: collections.Counter = collections.Counter()
    for variable, device in zip(
        graph.variables, parameter_devices(graph, placement)
    ):
        held[device] += variable_bytes(variable)
    _cut(held, graph, placement)
    pinned = [d for pin in graph.pins.values() for d in devices_of(pin)]
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
    edges = _edges(steps)
    groups = _alike(graph, placement, steps)
    if not fold or all(len(group) < _MANY for group in groups):
        groups = [[i] for i in range(len(placement.devices))]
    first, last = _ends(steps)
    for group in groups:
        i = group[0]
        kinds = [_kind(step.layer, graph, i) for step in steps.steps]
        blocks = repeated(kinds, edges) if fold else []
        share = placement.shares[i] / total
        drawn = _Frame(i, graph, steps, placement.devices[i], devices, blocks)
        lines += drawn.lines(_title(group, placement.devices, share), edges)
        lines += [_edge("split", drawn.node(k)) for k in first]
        lines += [_edge(drawn.node(k), "gather") for k in last]
        lines += [
            _edge(
                *(f"held {where}", drawn.node(0)),
                f', style=dashed, lhead="cluster {i}"',
            )
            for where in held
            if steps.steps
        ]
    if steps.steps and len(groups) > 1:  # the towers stand in their order
        firsts = " -> ".join(_quoted(f"{group[0]} 0") for group in groups)
        lines.append(f"{{rank=same; {firsts} [style=invis]}}")
    return "\n".join([*lines, "}"]) + "\n"


def _cut(
    held: collections.Counter, graph: LayerGraph, placement: Placement
) -> None:
    """Counts layers that are still whole by the devices of their pieces."""
    where = dict(
        zip(map(id, graph.variables), parameter_devices(graph, placement))
    )
    for weight, pin in graph.cuts.weights:
        whole = weight.value
        if id(whole) not in where or isinstance(pin, tuple):
            continue  # in pieces, or where variables live
        n, size = whole.shape[weight.axis], variable_bytes(whole)
        held[where[id(whole)]] -= size
        for rows, device in zip(sizes_of(n, len(pin)), pin.devices):
            held[device] += size * rows // n
    for device in [device for device, size in held.items() if not size]:
        del held[device]


def _alike(
    graph: LayerGraph, placement: Placement, steps: Steps
) -> list[list[int]]:
    """Towers by what they are alike in: shares, and where their layers are."""
    groups: dict[Any, list[int]] = {}
    for i, share in enumerate(placement.shares):
        where = [_place(step.layer, graph, i) for step in steps.steps]
        groups.setdefault((share, *where), []).append(i)
    return [*groups.values()]


def _place(layer: Any, graph: LayerGraph, tower: int) -> str:
    """A layer's device, if that is another than its tower's, or its pieces'."""
    pieces = graph.cuts.of(layer, tower)
    return str(pieces or graph.device_of(layer, tower) or "")


def _kind(layer: Any, graph: LayerGraph, tower: int) -> Any:
    """What a layer is like: its class, its variables, and where it is."""
    # What has no variables may be an operation of Keras's.
    shapes = tuple(tuple(v.shape) for v in getattr(layer, "variables", ()))
    return type(layer), shapes, _place(layer, graph, tower)


def _title(group: list[int], devices: Sequence[str], share: float) -> str:
    """What stands above a tower, or above those that are drawn as one."""
    where = few([devices[i] for i in group])
    if len(group) == 1:
        return f"tower_{group[0]} on {where}, {share:.0%} of the rows"
    names = few([f"tower_{i}" for i in group])
    return f"{names}, alike, on {where}, {share:.0%} of the rows each"


class _Frame:
    """A tower in a frame: a node per layer, an edge per value.

    Args:
      i: which.
      graph: where its layers are.
      steps: what it calls.
      device: its device.
      devices: all, for their colours.
      blocks: what is drawn once, in frames of their own.
    """

    def __init__(
        self,
        i: int,
        graph: LayerGraph,
        steps: Steps,
        device: str,
        devices: list[str],
        blocks: Sequence[Block],
    ):
        self._i, self._graph, self._steps = i, graph, steps
        self._device, self._devices = device, devices
        self._blocks = blocks

    def node(self, k: int) -> str:
        """The name of what stands for a step."""
        for block in self._blocks:
            if block.start <= k < block.end:
                k = block.first(k)
        return f"{self._i} {k}"

    def lines(self, label: str, edges: Sequence[tuple[int, int]]) -> list[str]:
        """The source of the frame, below a label."""
        lines = [f'subgraph "cluster {self._i}" {{', f"label={_quoted(label)}"]
        starts = {block.start: block for block in self._blocks}
        k = 0
        while k < len(self._steps.steps):
            block = starts.get(k)
            if block is None:
                lines.append(self._step(k))
                k += 1
                continue
            lines += [
                f'subgraph "cluster {self._i} {k}" {{',
                f'label="{block.count} times"; style=dashed',
                *map(self._step, range(k, k + block.length)),
                "}",
            ]
            k = block.end
        drawn = dict.fromkeys(
            (self.node(a), self.node(b))
            for a, b in edges
            if not self._back(a, b)
        )
        return [*lines, *(_edge(*pair) for pair in drawn), "}"]

    def _back(self, maker: int, taker: int) -> bool:
        """Whether a value goes from one of a block to the next of it."""
        return any(
            block.start <= maker < block.end
            and block.start <= taker < block.end
            and (maker - block.start) // block.length
            != (taker - block.start) // block.length
            for block in self._blocks
        )

    def _step(self, k: int) -> str:
        step = self._steps.steps[k]
        place = _place(step.layer, self._graph, self._i) or self._device
        where = place.split(",")[0]  # of pieces the first
        text = f"{step.path}\n{type(step.layer).__name__}, {place}"
        return _node(f"{self._i} {k}", text, self._devices, device=where)


def _edges(steps: Steps) -> list[tuple[int, int]]:
    """From which step to which, each once."""
    return [
        pair
        for pair in dict.fromkeys(
            (maker, taker)
            for maker, takers, _ in steps.values
            for taker in sorted(takers)
        )
        if pair[0] != pair[1]
    ]


def _ends(steps: Steps) -> tuple[list[int], list[int]]:
    """The steps that take no other's values, and those that give none."""
    makers = {maker for maker, _, _ in steps.values}
    takers = {taker for _, several, _ in steps.values for taker in several}
    count = range(len(steps.steps))
    return (
        [k for k in count if k not in takers],
        [k for k in count if k not in makers],
    )


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
