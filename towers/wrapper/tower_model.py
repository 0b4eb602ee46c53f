"""TowerModel: towers behind the face of a Keras model."""

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_compile, keras_layers
from towers.foreign.keras_saving import overridden
from towers.foreign.keras_self import compiled_as
from towers.keras_model import checks
from towers.keras_model.model_calls import call_signature, signed
from towers.keras_model.parameters import place_variables
from towers.placement.placement import (
    Placement,
    as_placement,
    check_placement,
)
from towers.verbs.batch import refuse_per_tower
from towers.verbs.gather import check_rule
from towers.wrapper import descriptions
from towers.wrapper.distributed import check_distributed
from towers.wrapper.jit_choice import (
    checked_jit,
    jit_of_compile,
    jit_of_template,
)
from towers.wrapper.loss_choice import belongs_on_towers, check_loss_on_towers
from towers.wrapper.model_export import export_model
from towers.wrapper.prefetch import Prefetch, check_prefetch
from towers.wrapper.recovery import Recovery
from towers.wrapper.tower_calls import TowerCalls
from towers.wrapper.tower_functions import TowerFunctions
from towers.wrapper.tower_steps import TowerSteps
from towers.wrapper.watching import watched_method, watching


class TowerModel(TowerSteps):
    """A Keras model whose forward and backward pass run in towers.

    `compile`, `fit`, `evaluate`, `predict`, `train_on_batch`, callbacks and
    weights are those of Keras, with Keras's own training step. `batch_size`
    is the global one: with 2 equal towers and `batch_size=128`, each tower
    sees 64 rows. The wrapper shares its template's variables and moves them,
    with the optimizer's, to the parameter device. A compiled template hands
    on what it was compiled with, its very optimizer included.

    With `loss_on_towers`, `fit` and `evaluate` compute losses and metrics in
    the towers, from their shards of targets and sample weights, and gather
    sums of a few numbers: outputs never leave their tower. The values are the
    plain model's. What cannot be put together from shards is refused by name,
    as are losses and metrics of Keras that look at other rows (`Circle`, or
    `axis=0`). Of a function of your own towers cannot know: each of its values
    must be that of one row, and of no other.

    What is written is the plain model, optimizer included, so that any number
    of towers, or none, loads it: by `save`, `keras.saving.save_model`,
    `save_weights`, callbacks and `tf.train.Checkpoint`. `copy.deepcopy` gives
    a TowerModel on the same devices, with a copy of the template;
    `keras.models.clone_model` and pickling give the plain model. Attributes
    and methods of a template of your own class are there, and `isinstance`
    knows that class.

    `stateless_call`, and a call in a `keras.StatelessScope`, run in towers too, with
    the values that are given: gradients are those values', of any order.

    A template's own `compile`, `train_step`, `test_step`, `compute_loss` or
    `compute_metrics` is used. What a step calls as `self(x)` runs in towers, and
    so does each layer or model of the template that it calls by itself, as
    `self.encoder(x)`: shared by the rows of that call, gathered, and its state
    applied before the next. What has no rows, or makes something of all of
    them, as a layer that returns a loss, is called once, beside the outputs.

    With `compile(jit_compile=True)` each tower is an XLA program on its device,
    forward and backward, see `build_towers`. "auto" leaves XLA off.

    >>> layers = [keras.Input([3]), keras.layers.Dense(2)]
    >>> model = keras.Sequential(layers, name="net")
    >>> model = towers.TowerModel(model, towers.Placement.cpus(2))
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(np.ones([8, 3]), np.ones([8, 2]), batch_size=4, verbose=0)
    >>> model.predict(np.ones([5, 3]), verbose=0).shape
    (5, 2)
    >>> model
    <TowerModel of net: 2 towers on /CPU:0, /CPU:1>

    Args:
      model: the template, a Keras 3 model.
      placement: where towers, parameters, inputs and outputs live. A number n
        stands for `Placement.gpus(n)`, a list of devices for `Placement` of it.
      merge: how outputs are gathered, see `gather_outputs`. One that is no
        batch, as a weight is none, needs another rule than "concat".
      loss_on_towers: whether towers compute losses and metrics themselves. "auto"
        does so where outputs would cross and all losses and metrics are Keras's
        own of one row at a time; not with steps of one's own, another `merge`,
        `run_eagerly`, or an `output_device` of one's own.
      whole: keys of a dict of inputs, or positions in a list, that are no
        batch: every tower gets them as they are, see `split_batch`. Feed them by a
        `tf.data.Dataset`, as arrays in `fit` must all have the same rows. Names
        of further arguments of a call too: `model(x, table=table)`.
      quick_start: whether TensorFlow runs steps as they were built, and does not
        rewrite them before the first, which for many towers of a deep model
        takes half of the time until then. Later steps take a few per cent
        longer, on GPUs and where much could be folded or fused maybe more: for
        trying things out.
      on_lost: what to do when a worker of a `Cluster` is lost: "raise" a
        `WorkerLost`; or "continue": what the step may have changed is put back,
        and the same batch taken again by those that are left. Those that have
        come back join at the next epoch. Parameters are then on this process.
      prefetch: whether `fit` and `evaluate`, while a step runs, read the next batch
        and copy its shards to the towers' devices, which then hold two batches.
        As `Dataset.prefetch` does, it reads a batch more than there are steps, and
        `fit` may wait for that at its end; an error of the dataset comes at the
        step that needs the batch. Refused with `on_lost="continue"`,
        `run_eagerly`, `steps_per_execution`, and a `train_step`, `test_step` or
        `compute_loss` of your own. `predict` and `train_on_batch` are as ever.
        TensorFlow keeps int32 tensors on the host of a GPU until a step. While a
        report or a timeline is made, copies and steps take turns.
      synchronized: whether every `BatchNormalization` that trains takes the mean
        and variance of all rows of a batch, as in the plain model, whatever its own
        `synchronized` says; else those of its tower's rows. So do those of models
        that a step of your own calls; what is saved is the plain model. Towers then
        meet at each such layer, on the output device: one of c channels sends there
        2c + 1 numbers of its dtype (float32 in half precisions) and gets 2c, and of
        gradients as many: 4 transfers for each layer and each tower elsewhere, and
        a tower waits for the slowest. Towers that meet are no copies of each other:
        the first step of eight took 2.4 times as long, that of two 1.7. Layers that
        are frozen (`trainable=False`), calls with `training=False`, and one tower
        cost nothing. Refused by name: layers in loops (the cell of an RNN without
        `unroll`), in `tf.cond` and in `keras.remat`, and `jit_compile=True`; and
        gradients of gradients.
      **kwargs: as for `keras.Model`: `name`.

    Raises:
      TypeError: `model` is no Keras model, or is or holds a `TowerModel`, or
        `placement` is no `Placement`.
      ValueError: a merge rule, or `loss_on_towers`, is unknown, or `on_lost` or
        `prefetch` cannot be met.
      WorkerLost: a worker that is to have variables is lost.
      RuntimeError: made under a `tf.distribute` strategy.
    """

    on_lost: str = "raise"
    has_fitted = False  # whose first `fit` says what runs where

    _fit = watched_method(TowerSteps.fit)
    evaluate = watched_method(TowerSteps.evaluate)
    predict = watched_method(TowerSteps.predict)
    train_on_batch = watched_method(TowerSteps.train_on_batch)
    test_on_batch = watched_method(TowerSteps.test_on_batch)
    predict_on_batch = watched_method(TowerSteps.predict_on_batch)
    get_weights = watched_method(TowerSteps.get_weights, of_weights=True)
    set_weights = watched_method(TowerSteps.set_weights, of_weights=True)
    save = watched_method(TowerSteps.save, of_weights=True)
    save_weights = watched_method(TowerSteps.save_weights, of_weights=True)
    load_weights = watched_method(TowerSteps.load_weights, of_weights=True)

    @watching
    def __init__(
        self,
        model: keras.Model,
        placement: Placement | int | Sequence[str],
        merge: Any = "concat",
        loss_on_towers: bool | str = False,
        whole: Sequence[Any] = (),
        quick_start: bool = False,
        on_lost: str = "raise",
        prefetch: bool = False,
        synchronized: bool = False,
        **kwargs: Any,
    ):
        checks.check_model(model)
        where: Placement = as_placement(placement)
        check_placement(where)
        check_distributed()
        if isinstance(model, TowerModel):
            raise TypeError(
                "`model` is a TowerModel already. Wrap its `template` instead."
            )
        check_loss_on_towers(loss_on_towers)
        check_prefetch(prefetch, on_lost)
        for rule in tf.nest.flatten(merge):
            check_rule(rule)
        kwargs.setdefault("name", model.name)
        if type(self).call is TowerModel.call:
            # Keras goes by the signature of what it will call.
            call = signed(self.call, call_signature(model))
            object.__setattr__(self, "call", call)
        # The template converts its inputs itself, on the tower.
        super().__init__(dtype=model.dtype_policy, autocast=False, **kwargs)
        keras_layers.take_context(self, model)
        if type(self).call is TowerModel.call:
            keras_compile.tell_phase_as(self, model)
        self.placement = where
        self.merge = merge
        self.loss_on_towers = loss_on_towers
        self.whole = tuple(whole)
        self.quick_start = quick_start
        self.on_lost = on_lost
        self.prefetch = prefetch
        self.synchronized = synchronized
        self.tower_recovery = Recovery(self)
        self.read_ahead = Prefetch(self)
        self.tower_functions = TowerFunctions(self)
        self.supports_jit = False  # what compiles is each tower, not the step
        self.jit_towers = False
        self.supports_masking = True
        self.tower_calls = TowerCalls(self)
        self.template = model  # whose attributes are set from now on
        own = self._own("compute_loss")
        if own is not None:
            keras_compile.use_compute_loss(self, own)
        if keras_layers.is_built(model):
            self.built = True
            place_variables(model, where)
            self.tower_calls.placed.note(self)
        self.tower_calls.placed.place_new(self)
        if model.compiled:
            self.jit_towers = checked_jit(self, jit_of_template(model))
            self._compile_as_template()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras would take them for what is no input.
        refuse_per_tower([*args, *kwargs.values()], "call")
        self.built = True  # or Keras would build it, for this number of rows
        return super().__call__(*args, **kwargs)

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Builds the template, as its class does, and places its variables.

        Without, the template is built from its first inputs, in `call`.
        """
        if not keras_layers.is_built(self.template):
            with keras_layers.out_of(self):
                self.template.build(*args, **kwargs)
            self.tower_calls.placed.place_new(self)
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The gathered outputs, like the template's."""
        call = self.tower_calls.of_template(args, kwargs)
        with compiled_as(self):
            return self.tower_calls.run(self.template, call)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: masks come with the gathered outputs."""
        return None

    @watching
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As the template's own, or Keras's; optimizers go to the parameters.

        With `jit_compile=True`, XLA compiles each tower, for its device.

        Raises:
          ValueError: XLA cannot take each tower by itself; names the layer.
        """
        own = overridden(self.template, ("compile",))
        jit, args, kwargs = jit_of_compile(self.name, args, kwargs, bool(own))
        self.jit_asked = jit
        self.jit_towers = checked_jit(self, jit is True)
        if own:
            # It keeps what it is given where the template's methods look.
            self.template.compile(*args, **kwargs)
            if self.template.compiled:
                self._compile_as_template()
        else:
            super().compile(*args, **kwargs)
            self._place()

    def _compile_as_template(self) -> None:
        """Compiles this model with what the template has, the same objects."""
        super().compile(**keras_compile.compile_arguments(self.template))
        self._share_metrics(self.template, self)
        self._is_lent = True
        self._place()

    def _place(self) -> None:
        """Places the optimizers' slots; decides where the loss is computed."""
        place_variables(self, self.placement)
        # Now, since Keras replaces what it was given when it is built.
        self.loss_belongs_there = belongs_on_towers(self)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        if not self.has_fitted:
            descriptions.say_first(self.name, self.placement, args, kwargs)
            object.__setattr__(self, "has_fitted", True)
        args, kwargs = self.tower_recovery.fit_arguments(args, kwargs)
        return self._fit(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        return self.tower_functions.make("train_function", force)

    def make_test_function(self, force: bool = False) -> Any:
        return self.tower_functions.make("test_function", force)

    def make_predict_function(self, force: bool = False) -> Any:
        return self.tower_functions.make("predict_function", force)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        if self.merge == "concat":
            return self.template.compute_output_shape(*args, **kwargs)
        return super().compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        if self.merge == "concat":
            return self.tower_calls.output_spec(*args, **kwargs)
        return super().compute_output_spec(*args, **kwargs)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the template's summary, then the placement."""
        self._lent().summary(*args, **kwargs)
        descriptions.printer(args, kwargs)(str(self.placement))

    def __repr__(self) -> str:
        return descriptions.short_repr(self.name, vars(self).get("placement"))

    def _repr_html_(self) -> str:
        """What is on which device, for notebooks."""
        return descriptions.shown(self.name, self.placement, self.variables)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TowerModel":
        _, _, _, *options, _ = inspect.signature(TowerModel.__init__).parameters
        copied = TowerModel(
            copy.deepcopy(self._lent(), memo),
            self.placement,
            **{name: getattr(self, name) for name in options},
            name=self.name,
        )
        copied.jit_towers = self.jit_towers
        return copied

    def export(
        self,
        filepath: str,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        placement: Any = "own",
        **kwargs: Any,
    ) -> None:
        """Writes a SavedModel that holds the towers, see `export_towers`.

        Args:
          filepath: a folder, which is written over if it exists.
          format: "tf_saved_model"; others have no devices, and are written
            from the template by Keras.
          verbose: whether to say where it is.
          input_signature: as for `keras.Model.export`.
          placement: "own" for that of this model, a `Placement` for other
            devices, or None for no devices at all.
          **kwargs: for other formats.

        Raises:
          TypeError: a leaf of `input_signature`, or an argument, is of the
            wrong kind.
          ValueError: `filepath` is a file, the format can hold no placement, or
            an argument is one of another backend.
        """
        export_model(
            self,
            filepath,
            format,
            verbose,
            input_signature,
            placement,
            **kwargs,
        )
