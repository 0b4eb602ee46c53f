"""export: towers as a SavedModel, for these devices or for others.

What is written is a plain `tf.Module`: a process that loads it needs neither
towers nor Keras.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.build import assemble
from towers.foreign import keras_layers
from towers.foreign.tf_saved_model import note_devices
from towers.keras_model import checks, hooks, layer_graph
from towers.keras_model.homes import Home
from towers.keras_model.model_calls import model_call
from towers.keras_model.parameters import parameter_devices
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request
from towers.keras_model.signature import (
    input_specs,
    named_outputs,
    several_arguments,
    spec_parts,
    whole_arguments,
)
from towers.keras_model.tower import forward
from towers.placement.placement import Placement, check_placement
from towers.verbs.batch import Batch, whole_leaves


def export_towers(
    model: Any,
    path: str,
    placement: Placement | None,
    input_signature: Any = None,
    merge: Any = "concat",
    tower_fn: Callable[..., Any] | None = None,
    whole: Sequence[Any] = (),
    synchronized: bool = False,
) -> None:
    """Writes a model as a SavedModel whose signature holds its towers.

    `tf.saved_model.load(path)` gives an object with `serve(inputs)`, and with
    the signature "serving_default" for servers; `serve(x, y)` of a model that is
    called with several tensors. Any number of rows may come,
    but to a stateful RNN as many as it keeps states for. Inference only; seeds
    of noise that is on, and state that the model assigns, move on with each
    call. The placement may name devices that this machine lacks, if it was
    made with `available="any"`. Loaded where they are missing too, ops fall
    back to other devices, as TensorFlow's soft placement has it. So a
    recurrent layer takes cuDNN, which only GPUs have, only if it says
    `use_cudnn=True`, and is then served nowhere else. Variables are
    on the default device, from where towers copy them; with
    `tf.saved_model.LoadOptions(experimental_variable_policy=
    "save_variable_devices")` they are on the parameter device.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> placement = towers.Placement(
    ...     ["/GPU:0", "/GPU:1"], available="any")
    >>> path = os.path.join(tempfile.mkdtemp(), "model")
    >>> towers.export_towers(model, path, placement)
    >>> loaded = tf.saved_model.load(path)
    >>> loaded.serve(tf.ones([5, 3])).shape
    TensorShape([5, 2])

    Args:
      model: a built Keras 3 model, or with `tower_fn` a list or dict of them.
      path: a folder. One that exists is written over when all has gone well,
        as TensorFlow and Keras do.
      placement: where the towers run and their variables live; None writes
        the model with no devices at all.
      input_signature: a nest, like the model's inputs, of `tf.TensorSpec`,
        [rows, ...]; rows are left open. If its call takes several tensors, a list
        of one for each. By default what the model was built for.
      merge: see `gather_outputs`. As there, a scalar, or an output that is no
        batch, needs another rule than "concat".
      tower_fn: as in `build_towers`. Without devices it is called once.
      whole: as in `build_towers`; their specs are taken as they are.
      synchronized: as in `build_towers`, for batch norms that train here too,
        as one that a model calls with `training=True`.

    Raises:
      TypeError: the model, the placement or a leaf of `input_signature` is of
        the wrong kind.
      ValueError: `path` is a file, the inputs are unknown, `merge` does not fit,
        a layer is not in the pieces that `placement` wants, or the model reads
        a lookup table, or a variable, that none of its layers keeps.
      RuntimeError: called inside a graph.
    """
    checks.check_model(model, nested=tower_fn is not None)
    if placement is not None:
        check_placement(placement)
    if os.path.isfile(path):
        raise ValueError(
            f"`path` is {os.fspath(path)!r}, which is a file. Expected the name "
            "of a folder, a new one or one to be written over."
        )
    if not tf.executing_eagerly():
        raise RuntimeError(
            "export_towers writes files and must be called eagerly; got a "
            "call inside a graph. Call it outside of tf.function and tf.Graph; "
            "a tf.compat.v1 graph is exported with its Session by "
            "tf.compat.v1.saved_model.simple_save."
        )
    pins = placement.layer_devices if placement is not None else None
    may_meet = placement is not None and len(placement.devices) > 1
    graph = layer_graph.LayerGraph(
        model, (), pins, synchronized=synchronized and may_meet
    )
    if graph.cuts.unready:
        graph.cuts.refuse()
    graph.is_portable = not any(
        getattr(layer, "use_cudnn", None) is True for layer in graph.layers
    )
    states = [graph.variables[i] for i in graph.row_states]
    rows = states[0].shape[0] if states else None
    several = None
    if tower_fn is None:
        several = several_arguments(model, input_signature)
    if several is not None:
        input_signature, whole = several, whole_arguments(several, whole)
    specs = input_specs(model, input_signature, whole, rows)
    module = tf.Module()
    module.parameters = [keras_layers.raw(v) for v in graph.variables]

    def serve(inputs: Any) -> Any:
        call, tensors, undivided = tower_fn, inputs, whole_leaves(specs, whole)
        if several is not None:
            call = model_call([], inputs, whole, training=False)
            tensors = call.batch
            undivided = [i in call.whole for i in range(len(tensors))]
        if placement is None:
            values = [v.read_value() for v in module.parameters]
            with hooks.hooked(graph):
                replay = replayed(graph, values, tensors, False, "", call)
            for i, value in sorted(replay.state.items()):
                module.parameters[i].assign(value)
            return replay.outputs
        devices = parameter_devices(graph, placement)
        homes = [
            Home(variable, device, variable)
            for variable, device in zip(module.parameters, devices)
        ]
        request = Request(placement, False, merge, call)
        batch = Batch(tensors, undivided)
        built = assemble(graph, homes, [], batch, request, forward)
        built.apply_updates()
        return built.outputs

    def serving_default(*leaves: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = tf.nest.pack_sequence_as(specs, leaves, expand_composites=True)
        return named_outputs(serve(inputs))

    def serve_several(*arguments: Any) -> Any:
        return serve(dict(zip(specs, arguments)))

    module.serve = tf.function(
        serve if several is None else serve_several,
        input_signature=[specs] if several is None else [*specs.values()],
        autograph=False,
    )
    served = module.serve.get_concrete_function()
    if resources := _resources(graph, served):
        module.resources = resources
    signature = tf.function(
        serving_default,
        input_signature=spec_parts(specs),
        autograph=False,
    )
    where = os.path.abspath(path)
    os.makedirs(os.path.dirname(where), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(where)) as beside:
        new = os.path.join(beside, "model")
        tf.saved_model.save(
            module,
            new,
            signatures={"serving_default": signature},
            options=tf.saved_model.SaveOptions(
                experimental_custom_gradients=False
            ),
        )
        note_devices(
            new,
            [""] * len(module.parameters)
            if placement is None
            else parameter_devices(graph, placement),
        )
        shutil.copytree(new, where, dirs_exist_ok=True)


def _resources(graph: layer_graph.LayerGraph, served: Any) -> list[Any]:
    """What else a function reads: lookup tables, and variables of no Keras.

    Args:
      graph: names the layers that keep them as attributes.
      served: the concrete function.

    Raises:
      ValueError: it reads what no layer keeps.
    """
    handles = {id(keras_layers.raw(v).handle) for v in graph.variables}
    read = [
        x
        for x in served.captured_inputs
        if x.dtype == tf.resource and id(x) not in handles
    ]
    resources = {}
    for layer in graph.layers if read else []:
        for kept in _kept(layer):
            if isinstance(kept, tf.Variable):
                resources[id(kept.handle)] = kept
            elif isinstance(
                kept, tf.saved_model.experimental.TrackableResource
            ):
                resources[id(kept.resource_handle)] = kept
    for x in read:
        if id(x) not in resources:
            raise ValueError(
                "The model reads a lookup table, or a variable, that no layer "
                f"of it keeps: {x!r}. Expected all that it reads to be saved "
                "with it; keep that as an attribute of a layer."
            )
    return [resources[id(x)] for x in read]


def _kept(layer: keras.Layer) -> Iterator[Any]:
    """What a layer holds, by attributes and in lists and dicts there."""
    yield from tf.train.TrackableView(layer).descendants()
    for value in vars(layer).values():
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value
