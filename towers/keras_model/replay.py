"""replay: a call of a model with tensors in the place of its variables."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_layers
from towers.foreign.keras_layers import raw
from towers.foreign.tf_custom_gradients import Follower
from towers.keras_model import hooks
from towers.keras_model.attributes import kept_by
from towers.keras_model.layer_graph import LayerGraph
from towers.keras_model.moments import Moments
from towers.keras_model.notes import Notes, note_update
from towers.keras_model.reads import Reads
from towers.keras_model.refusals import check_reach
from towers.keras_model.row_tables import Tables
from towers.verbs.gather import dense


@dataclasses.dataclass(frozen=True)
class Replay:
    """What one tower computed.

    Attributes:
      outputs: what the model (or the tower function) returned.
      notes: what Keras attached to each flat output, see `get_notes`.
      activations: for each flat output "Softmax" or "Sigmoid", if its logits
        are among the notes and it is just that of them; else None.
      losses: what `add_loss` and activity regularisers have added.
      adders: for each the layer that added it, by its place in `graph.layers`.
      regularized: for each the rule by which those of all towers merge, if it is
        an activity regulariser of Keras's, else None.
      state: new values by index into `LayerGraph.variables`.
      moments: by batch-norm layer's index, one `Moments` per call.
      layer_outputs: output by layer path, a list if called several times.
      halves: under mixed precision, by index the half dtype of those variables
        that are read once, and cast to that.
      input_halves: likewise, by place the half dtype to which all casts an input.
    """

    outputs: Any
    notes: list[dict[str, tf.Tensor | None]]
    activations: list[str | None]
    losses: list[tf.Tensor]
    adders: list[int]
    regularized: list[str | None]
    state: dict[int, tf.Tensor]
    moments: dict[int, list[Moments]]
    layer_outputs: dict[str, Any]
    halves: dict[int, tf.DType]
    input_halves: dict[int, tf.DType]


def replayed(
    graph: LayerGraph,
    values: Sequence[tf.Tensor],
    inputs: Any,
    training: bool | None,
    scope: str,
    tower_fn: Callable[..., Any] | None = None,
    tower: int = 0,
    draws: Any = None,
    tables: Tables | None = None,
) -> Replay:
    """Calls a model with `values` for its variables, changing none.

    To be called while `hooked`.

    Args:
      graph: names the layers and the variables.
      values: one tensor per variable of `graph.variables`.
      inputs: the nest that the model is called with.
      training: what layers that are not told otherwise go by.
      scope: an absolute name scope, with its slash.
      tower_fn: `f(model, inputs)` in the place of `model(inputs)`.
      tower: which one, for layers with a device in each.
      draws: what it draws by seeds that other towers have too.
      tables: those that it reads by rows.
    """
    stateless = Values(graph.variables, values)
    stateless.tables = tables
    notes = Notes(graph, scope, training, stateless, tower, draws)
    stateless.notes = None if draws is None else notes
    reads = Reads(graph.variables, values) if graph.is_mixed else None
    stateless.reads = reads
    with tf.name_scope(scope), replaying(notes):
        if tower_fn is not None:
            outputs = tower_fn(graph.model, inputs)
        elif training is None:
            outputs = graph.model(inputs)
        else:
            outputs = graph.model(inputs, training=training)
        with contextlib.nullcontext() if reads is None else reads.aside():
            losses = [loss for m in graph.models for loss in own_losses(m)]
        adders = [_adder(graph.layers, loss) for loss in losses]
        losses = [tf.convert_to_tensor(loss) for loss in losses]
        # Here, where a variable among them is the tower's copy.
        outputs = tf.nest.map_structure(as_tensor, outputs)
    if tables is not None and stateless.follower is not None:
        tables.end(stateless.follower.is_opaque)
    state = {}
    for i, (variable, value) in enumerate(zip(graph.variables, values)):
        new = stateless.state_mapping[id(variable)]  # which nobody reads here
        if new is not value:
            check_reach(variable.path, new)
            state[i] = new
    halves: dict[int, tf.DType] = {}
    input_halves: dict[int, tf.DType] = {}
    if reads is not None:
        halves = reads.halves(graph.variables, stateless.follower)
        results = outputs, losses, state, notes.layer_outputs
        input_halves = reads.input_halves(
            tf.nest.flatten(inputs),
            tf.nest.flatten(results),
            stateless.follower,
        )
    return Replay(
        outputs,
        keras_layers.get_notes(outputs),
        [keras_layers.activation(x) for x in tf.nest.flatten(outputs)],
        losses,
        adders,
        [_regularized(loss, notes.sums) for loss in losses],
        state,
        notes.moments,
        {k: v[0] if len(v) == 1 else v for k, v in notes.layer_outputs.items()},
        halves,
        input_halves,
    )


class Values(keras.StatelessScope):
    """Reads and writes tensors in the place of one model's variables.

    Attributes:
      follower: hears which copies of trainable variables are read.
      notes: of the replay, which know what a generator's state is in a tower.
      reads: notes them under mixed precision.
      tables: hears of reads, where some are by rows.
    """

    follower: Follower | None = None
    notes: Notes | None = None
    reads: Reads | None = None
    tables: Tables | None = None

    def __init__(self, variables: Sequence[Any], values: Sequence[tf.Tensor]):
        # Set here and not by the parent, which casts to a half dtype when the
        # caller is itself a mixed-precision layer.
        super().__init__(collect_losses=True)
        self._around = keras_layers.scope_here()
        self._copies = {id(v): c for v, c in zip(variables, values)}
        self.state_mapping.update(self._copies)
        self._graph = tf.compat.v1.get_default_graph()
        self._foreign: dict[int, tf.Tensor] = {}

    def as_it_is(self) -> Any:
        """Another scope, with the values that this one has now."""
        other = Values((), ())
        other._copies = self._copies
        other._around, other.tables = self._around, self.tables
        other.state_mapping.update(self.state_mapping)
        return other

    def copy_of(self, variable: Any) -> tf.Tensor | None:
        """What the variable was when the tower began."""
        return self._copies.get(id(variable))

    def handle_of(self, variable: Any) -> tf.Tensor | None:
        """The same, for a tape that takes gradients for it."""
        self._note(variable)
        return self.copy_of(variable)

    def _note(self, variable: Any) -> None:
        """Notes that more is done with a variable than reading it."""
        for listener in (self.reads, self.tables):
            if listener is not None:
                listener.note(variable)

    def get_current_value(self, variable: Any) -> tf.Tensor | None:
        value = super().get_current_value(variable)
        if self.tables is not None:
            self.tables.note(variable)
        if self.reads is not None:
            value = self.reads.read(variable, value, self.follower)
        if self.follower is not None:
            self._tell(self.follower, variable)
        if self.notes is not None and value is not None:
            if value is self.copy_of(variable):
                value = self.notes.state(value)
        if value is None and not keras_layers.is_made(variable):
            raise created_inside(variable.path)
        if value is None and self._gives_other(variable):
            raise ValueError(
                f"The tower reads {variable.path!r}, a variable of no model that "
                "it was given, for which a StatelessScope has a value: a "
                "gradient of that would be lost. Expected all models whose "
                "variables have values there: pass them as a list or dict, as "
                "in build_towers([model, other], ..., tower_fn=f)."
            )
        if value is None and variable.trainable:
            raise ValueError(
                f"The tower reads {variable.path!r}, a trainable variable of "
                "no model that it was given. Expected all models that a tower "
                "uses: pass them as a list or dict, as in "
                "build_towers([model, other], ..., tower_fn=f); or freeze what "
                "is not to be trained, by `trainable = False`."
            )
        if value is None and not tf.executing_eagerly():
            value = self._read(variable)
        return value

    def _tell(self, follower: Follower, variable: Any) -> None:
        """Tells of a read of what has a gradient."""
        copy = self.copy_of(variable)
        if copy is not None and copy.dtype.is_floating:
            # Where a layer is frozen, TensorFlow's variable is not.
            if raw(variable).trainable:
                follower.heard(copy)

    def _gives_other(self, variable: Any) -> bool:
        """Whether the scope around the towers has a value for a variable."""
        around = self._around
        return around is not None and id(variable) in around.state_mapping

    def _read(self, variable: Any) -> tf.Tensor:
        """The value of a frozen variable of no model that the tower has.

        The TensorFlow variable of a frozen one is trainable, so tapes would
        follow what is read of it. It is read once, outside of loops.
        """
        if not hasattr(self._graph, "captures"):
            raise ValueError(
                f"The tower reads {variable.path!r}, a frozen variable of no "
                "model that it was given; a graph of tf.compat.v1 has those of "
                "given models only. Pass its model too, as in "
                "build_towers([model, other], ..., tower_fn=f)."
            )
        if id(variable) not in self._foreign:
            handle, dtype = raw(variable).handle, raw(variable).dtype
            with self._graph.as_default(), tf.control_dependencies(None):
                value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
                value.set_shape(variable.shape)
                self._foreign[id(variable)] = tf.stop_gradient(value)
        return self._foreign[id(variable)]

    def add_update(self, update: tuple[Any, tf.Tensor]) -> None:
        variable, value = update
        copy = self._copies.get(id(variable))
        if copy is None:
            raise ValueError(
                f"The tower updates {variable.path!r}, which is no variable "
                "of the model, so its new value would be lost. Expected "
                "state that a layer owns: give a random op "
                "`seed=keras.random.SeedGenerator(...)` kept as an attribute "
                "of a layer, and keep a metric as an attribute of a layer."
            )
        self._note(variable)
        note_update(variable, self.state_mapping[id(variable)])
        if variable.trainable and copy.dtype.is_floating:
            # What is read after an assignment differentiates to the variable,
            # not into the value that was assigned.
            zero = copy - tf.stop_gradient(copy)
            value = tf.stop_gradient(value) + zero
        self.state_mapping[id(variable)] = value


@contextlib.contextmanager
def replaying(notes: Notes) -> Iterator[None]:
    """While open, layers are one tower's, and their variables are values."""
    followed = contextlib.nullcontext if notes.graph.is_plain else _followed
    with (
        notes.stateless,
        tf.variable_creator_scope(refuse_variable),
        notes.opened(),
        followed(notes),
    ):
        yield


@contextlib.contextmanager
def _followed(notes: Notes) -> Iterator[None]:
    """While open, follows gradients that layers take, and what they keep."""

    def resumption() -> Any:
        scope, context = (
            notes.stateless.as_it_is(),
            keras_layers.keras_context(),
        )
        scopes = list(notes.scopes)
        counts = notes.draws and Counter(notes.draws.counts)

        @contextlib.contextmanager
        def resumed() -> Iterator[None]:
            # What a backward pass computes again is noted already.
            draws = notes.draws and notes.draws.again(counts)
            again = notes.again(scope.as_it_is(), scopes, draws)
            with context(), hooks.hooked(notes.graph), replaying(again):
                yield

        return resumed

    stateless = notes.stateless
    stateless.follower = Follower(stateless.handle_of, resumption)
    with kept_by(notes.graph.layers), stateless.follower.opened():
        yield


def created_inside(name: str) -> ValueError:
    return ValueError(
        f"The variable {name!r} is created inside a tower, where it would be "
        "made once per tower and lost. Expected all variables to exist: make "
        "layers and variables outside, and call each model once on real data "
        "before it is given to towers."
    )


def refuse_variable(_: Callable[..., Any], **kwargs: Any) -> tf.Variable:
    raise created_inside(kwargs.get("name") or "Variable")


def own_losses(model: keras.Model) -> list[tf.Tensor]:
    """`model.losses` less its weight regularisers, which come last."""
    regularised = sum(
        v.regularizer is not None for v in model.trainable_weights
    )
    losses = list(model.losses)
    return losses[: len(losses) - regularised]


def _adder(layers: Sequence[keras.Layer], loss: tf.Tensor) -> int:
    """The place of the layer that added a loss."""
    added = [keras_layers.has_added(layer, loss) for layer in layers]
    return added.index(True) if any(added) else 0


def _regularized(loss: tf.Tensor, sums: Sequence[tf.Tensor]) -> str | None:
    """How an activity regulariser's loss merges, if it is one of `sums`.

    Keras divides it by the rows, or before 3.14 takes it as it is.
    """
    if any(loss is x for x in sums):
        return "sum"
    divided = not hasattr(loss, "numpy") and list(loss.op.inputs)[:1]
    return "mean" if divided and any(divided[0] is x for x in sums) else None


def as_tensor(value: Any) -> Any:
    """A dense tensor; None stays, for outputs that a model leaves out."""
    if value is None:
        return None
    tensor = tf.convert_to_tensor(dense(value))
    mask = keras_layers.get_mask(value)
    # One that was made outside of the tower's graph.
    if mask is not None and hasattr(mask, "numpy"):
        raise ValueError(
            "An output has a mask that is a constant, of shape "
            f"{tuple(mask.shape)}, but the batch has another number of rows. "
            "Expected one of its rows, or one that is computed of the inputs: by "
            "a layer's `compute_mask`, or a function as a Lambda's `mask`."
        )
    keras_layers.set_notes(tensor, [{"mask": mask}])
    return tensor
