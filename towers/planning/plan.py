"""placement_plan: what would run where, on a machine that is not here."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers import tower_graph
from towers.foreign import keras_machine, tf_kernels, tf_placer
from towers.placement.device_names import process_of
from towers.placement.scopes import tower_of
from towers.planning import machines, plan_graphs
from towers.planning.crossings import PlacedGraph
from towers.planning.plan_memory import Memory, memory_of
from towers.report import html
from towers.report.html_tables import Bytes, table
from towers.report.moved import moved
from towers.report.plain import subject_of
from towers.report.report import ExecutionReport
from towers.report.summary import least_bytes, machine_of, size
from towers.report.text import text_table as columns
from towers.report.variables import uses

# More ops that are refused than this are not asked for one by one.
_MANY = 20
_STAND_INS = ("Placeholder", "VarHandleOp", "NoOp")
_HELD = "variables copies gradients batch activations total".split()


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An op that TensorFlow would not place.

    Attributes:
      op: its name.
      kind: its type.
      layer: the path of the layer that it is of; "" if it is of none.
      message: TensorFlow's words.
    """

    op: str
    kind: str
    layer: str
    message: str

    def __str__(self) -> str:
        cure = ""
        if "but available devices are" in self.message:
            cure = "\n    `machine` has no such device."
        elif self.layer:
            cure = (
                f"\n    The layer {self.layer!r} has no kernel for that: give "
                f'it layer_devices={{"{self.layer}": "/CPU:0"}}.'
            )
        return f"  {self.op} ({self.kind}): {self.message}{cure}"


@dataclasses.dataclass(frozen=True, repr=False)
class PlacementPlan(ExecutionReport):
    """What would run where, see `placement_plan`.

    A report of what has not run: `ops`, `nodes`, `transfers`, `variables`,
    `assert_runs_on`, `assert_bytes` and `to_dict` are those of
    `ExecutionReport`.

    >>> plan = towers.placement_plan(lambda x: x + 1.0, tf.ones([2]),
    ...                              machine={"CPU": 1})
    >>> plan.ops["/CPU:0", "AddV2"]
    1

    Attributes:
      machine: how many devices of each type there are.
      refused: ops that TensorFlow would not place; where there are any, the
        rest of the plan is what it would be with those on the host.
      memory: by device a `Memory`, the bytes that a step would hold there:
        `.variables`, `.copies` of parameters, `.gradients`, `.batch`, and
        `.activations` that wait for the backward pass; and their `.total`.
    """

    machine: Any = dataclasses.field(default_factory=dict, hash=False)
    refused: tuple[Refusal, ...] = ()
    memory: Mapping[str, Memory] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, fit for JSON."""
        return {
            **super().to_dict(),
            "machine": self.machine,
            "refused": [dataclasses.asdict(x) for x in self.refused],
            "memory": {
                device: {**dataclasses.asdict(x), "total": x.total}
                for device, x in self.memory.items()
            },
        }

    def _page(self) -> str:
        refused = table(
            "Refused",
            ["op", "type", "layer", "in TensorFlow's words"],
            [[x.op, x.kind, x.layer, x.message] for x in self.refused],
        )
        held = table(
            "Memory",
            ["device", *_HELD],
            [
                [device, *(Bytes(getattr(x, kind)) for kind in _HELD)]
                for device, x in self.memory.items()
            ],
        )
        return html.page(
            self,
            "What would run where",
            [
                ("Refused by TensorFlow", refused),
                ("What a step would hold, as far as its graph tells", held),
            ],
        )

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.refused:
            refusals = "\n".join(map(str, self.refused))
            parts.append(f"Refused by TensorFlow:\n{refusals}")
        if any(x.activations for x in self.memory.values()):
            parts.append(self._held())
        return "\n\n".join(parts)

    def _held(self) -> str:
        """A table of what devices would hold."""
        rows = [("device", *_HELD)] + [
            (device, *(size(getattr(x, kind)) for kind in _HELD))
            for device, x in self.memory.items()
        ]
        unknown = sum(x.unknown for x in self.memory.values())
        more = f", and {unknown:,} values of unknown size" * bool(unknown)
        return (
            "What a step would hold, as far as its graph tells"
            f"{more}:\n{columns(rows)}"
        )


def placement_plan(
    fn_or_model: Any,
    *args: Any,
    machine: machines.Machine | Sequence[machines.Machine] | None = None,
    strict: bool = False,
    step: str = "train",
    signature: str = "serving_default",
) -> PlacementPlan:
    """Where TensorFlow would put a graph on a machine that is not here.

    It is TensorFlow that places it, softly or strictly, and cuts it in parts;
    nothing is run. For that it needs the kernels' registrations, which its
    Linux wheel has for NVIDIA's GPUs wherever it is installed. Keras acts,
    while the graph is made, as on that machine: recurrent layers take cuDNN
    on its GPUs. What the optimizer of graphs does before a step runs (it folds
    constants, and makes one op of several) is not done.

    >>> placement = towers.Placement(["/GPU:0", "/GPU:1"], available="any")
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> model = towers.TowerModel(model, placement)
    >>> model.compile("sgd", "mse")
    >>> try:
    ...     plan = towers.placement_plan(model, np.ones([6, 3]),
    ...                                  np.ones([6, 2]), machine={"GPU": 2})
    ...     plan.assert_runs_on("tower_1", "/GPU:1")
    ... except RuntimeError:
    ...     pass  # a TensorFlow that knows no GPUs

    Variables are where the placement of a `TowerModel`, or `place_variables`,
    has put them, though that device may be absent here, and others where they
    are here; those of a SavedModel where it notes them. Arguments of functions
    come from the host.

    Args:
      fn_or_model: a function, a `tf.function` or a traced one; a Keras model; a
        graph of `tf.compat.v1`; or the folder of a SavedModel.
      *args: what a function is called with, or specs of that; inputs, targets
        and sample weights for a model; what is fetched of a graph, by default
        all of it.
      machine: how many devices there are of each type; one CPU unless it says
        otherwise. By default {"CPU": 1, "GPU": 4}. Or a list of such, one for
        each worker of a cluster, `/job:worker/task:0` first; this process has
        what is named of it then.
      strict: as a Session with `allow_soft_placement=False`; else what cannot
        be where it was asked to be is moved, see `moved`.
      step: which step a model takes: "train", "test" or "predict".
      signature: that of a SavedModel.

    Returns:
      A `PlacementPlan`. `print(plan)` shows tables, of what a step would hold on
      each device too. Sizes are told where shapes are known beforehand.

    Raises:
      TypeError: `fn_or_model` is none of these, or `machine` no dict.
      ValueError: the machine, the step or the signature cannot be, or ops are
        on workers.
      RuntimeError: called inside a graph, or this TensorFlow was built without
        kernels for GPUs, so that it cannot know.
    """
    devices = machines.checked_machine(machine)
    if not tf.executing_eagerly():
        raise RuntimeError(
            "placement_plan makes a graph of its own: expected an eager call, "
            "got one inside a graph. Call it outside of tf.function."
        )
    gpus = machines.have_gpus(devices)
    if gpus and not tf_kernels.knows_gpus():
        raise RuntimeError(
            "placement_plan cannot know where ops would be on GPUs: this "
            "TensorFlow was built without kernels for them. Expected the Linux "
            "wheel of `tensorflow`; or a `machine` without GPUs."
        )
    with keras_machine.with_gpus(gpus), warnings.catch_warnings():
        warnings.filterwarnings("ignore", tower_graph.UNAPPLIED)
        planned = _planned(fn_or_model, args, step, signature)
    tasks = machines.by_task(devices, planned.graph)
    graph, refused = _settled(planned, tasks, strict)
    variables = uses(planned.variables, planned.device_of)
    placed = PlacedGraph(graph, planned.shapes, planned.held(variables))
    transfers = placed.transfers
    return PlacementPlan(
        tuple(node for node in placed.nodes if node[2] not in _STAND_INS),
        tuple(transfers),
        variables,
        least_bytes(placed.sent),
        least_bytes(placed.sent, machine_of),
        subject=subject_of(fn_or_model, args),
        machine=devices,
        moved=tuple(moved(placed.nodes, _wishes(planned.graph))),
        refused=tuple(refused),
        memory=memory_of(placed, transfers, variables),
    )


def _planned(
    what: Any, args: tuple[Any, ...], step: str, signature: str
) -> plan_graphs.Planned:
    """The graph to plan, by what was given."""
    path = plan_graphs.saved_model_path(what)
    if path is not None:
        return plan_graphs.of_saved_model(path, signature)
    if isinstance(what, keras.Model):
        return plan_graphs.of_model(what, args, step)
    if isinstance(what, tf.Graph):
        return plan_graphs.of_graph(what, args)
    if not callable(what):
        raise TypeError(
            "`fn_or_model` must be a function, a Keras model, a graph of "
            f"tf.compat.v1 or the folder of a SavedModel; got {what!r}."
        )
    if isinstance(getattr(what, "__self__", None), keras.Model):
        raise TypeError(
            f"`fn_or_model` is the method {what.__name__!r} of a model, which "
            "would run it. Expected the model, as in "
            'placement_plan(model, x, y, step="train").'
        )
    return plan_graphs.of_function(what, args)


def _settled(
    planned: plan_graphs.Planned,
    tasks: Mapping[str, machines.Machine],
    strict: bool,
) -> tuple[Any, list[Refusal]]:
    """The placed graph, and what had to be put on the host for it."""
    graph = tf.compat.v1.GraphDef()
    graph.CopyFrom(planned.graph)
    nodes = {node.name: node for node in graph.node}
    refused: list[Refusal] = []
    while True:
        try:
            placed = tf_placer.placed(graph, planned.targets, tasks, strict)
            return placed, refused
        except tf.errors.InvalidArgumentError as error:
            name = tf_placer.refused(error)
            again = [r for r in refused if r.op == name]
            if name is None or (not strict and again):
                raise ValueError(
                    "TensorFlow can place this graph in no way on "
                    f"{dict(tasks)}: {_words(error)}"
                ) from error
            if not again:
                refused.append(_refusal(name, nodes, error))
            if again or name not in nodes or len(refused) == _MANY:
                strict = False  # see at least where the rest would be
            else:
                task = process_of(nodes[name].device)
                nodes[name].device = f"{task}/device:CPU:0"


def _refusal(name: str, nodes: Mapping[str, Any], error: Any) -> Refusal:
    kind = nodes[name].op if name in nodes else ""
    tower = tower_of(name)
    layer, inside, _ = tower[1].partition("/") if tower else ("", "", "")
    return Refusal(name, kind, layer if inside else "", _words(error))


def _words(error: tf.errors.OpError) -> str:
    """What the placer says, without where the op was made."""
    lines = error.message.splitlines()
    reasons = [x for x in lines if "Cannot " in x or "Could not" in x]
    return reasons[0] if reasons else error.message


def _wishes(graph: Any) -> dict[str, str]:
    """Devices by op, but of what reads or writes a variable.

    That is beside it, whatever it asks for.
    """
    handles = {node.name for node in graph.node if node.op == "VarHandleOp"}
    return {
        node.name: node.device
        for node in graph.node
        if not handles & set(node.input)
    }
