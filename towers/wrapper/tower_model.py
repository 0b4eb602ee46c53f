"""TowerModel: towers behind the face of a Keras model."""

import copy
import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from towers.engine.unoptimized import unoptimized
from towers.export import export_towers
from towers.foreign import (
    keras_compile,
    keras_layers,
)
from towers.inputs_per_tower import refuse_per_tower
from towers.keras_model import checks, layer_graph
from towers.keras_model.calls import (
    call_signature,
    model_call,
    signed,
)
from towers.keras_model.parameters import (
    move_variable,
    place_slots,
    place_variables,
)
from towers.placement.device_names import (
    HOST_HERE,
    absent,
    process_of,
)
from towers.placement.placement import Placement, check_placement
from towers.verbs.gather import check_rule
from towers.wrapper.loss_choice import belongs_on_towers
from towers.wrapper.prefetch import Prefetch, check_prefetch
from towers.wrapper.recovery import Recovering, watching
from towers.wrapper.tower_calls import TowerCalls
from towers.wrapper.tower_steps import at_inputs


class TowerModel(Recovering):
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

    A template's own `compile`, `train_step`, `test_step`, `compute_loss` or
    `compute_metrics` is used. What a step calls as `self(x)` runs in towers, and
    so does each layer or model of the template that it calls by itself, as
    `self.encoder(x)`: shared by the rows of that call, gathered, and its state
    applied before the next. What has no rows, or makes something of all of
    them, as a layer that returns a loss, is called once, beside the outputs.

    With `compile(jit_compile=True)` each tower is an XLA program on its device,
    forward and backward, see `build_towers`. "auto" leaves XLA off.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> model = towers.TowerModel(model, towers.Placement.cpus(2))
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(np.ones([8, 3]), np.ones([8, 2]), batch_size=4, verbose=0)
    >>> model.predict(np.ones([5, 3]), verbose=0).shape
    (5, 2)

    Args:
      model: the template, a Keras 3 model.
      placement: where towers, parameters, inputs and outputs live.
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
      **kwargs: as for `keras.Model`: `name`.

    Raises:
      TypeError: `model` is no Keras model, or `placement` no `Placement`.
      ValueError: a merge rule, or `loss_on_towers`, is unknown, or `on_lost` or
        `prefetch` cannot be met.
      WorkerLost: a worker that is to have variables is lost.
      RuntimeError: made under a `tf.distribute` strategy.
    """

    train_function: Any
    test_function: Any
    predict_function: Any

    @watching
    def __init__(
        self,
        model: keras.Model,
        placement: Placement,
        merge: Any = "concat",
        loss_on_towers: bool | str = False,
        whole: Sequence[Any] = (),
        quick_start: bool = False,
        on_lost: str = "raise",
        prefetch: bool = False,
        **kwargs: Any,
    ):
        checks.check_model(model)
        check_placement(placement)
        if tf.distribute.has_strategy():
            strategy = type(tf.distribute.get_strategy()).__name__
            raise RuntimeError(
                f"TowerModel was made under a tf.distribute {strategy}, which "
                "places ops itself. Make the model and the wrapper outside "
                "`strategy.scope()`."
            )
        if isinstance(model, TowerModel):
            raise TypeError(
                "`model` is a TowerModel already. Wrap its `template` instead."
            )
        if loss_on_towers not in (True, False, "auto"):
            raise ValueError(
                "`loss_on_towers` must be True, False or 'auto'; got "
                f"{loss_on_towers!r}."
            )
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
        self.placement = placement
        self.merge = merge
        self.loss_on_towers = loss_on_towers
        self.whole = tuple(whole)
        self.quick_start = quick_start
        self.set_on_lost(on_lost)
        self.prefetch = prefetch
        self.read_ahead = Prefetch(self)
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
            place_variables(model, placement)
            self.tower_calls.placed.note(self)
        self.tower_calls.placed.place_new(self)
        if model.compiled:
            by_auto = bool(tf.config.list_physical_devices("GPU"))
            if model.jit_compile and by_auto:
                warnings.warn(
                    f"The template {model.name!r} was compiled to use XLA, by "
                    'jit_compile=True or, on a machine with GPUs, by "auto". '
                    "Keras does not tell which, so this model trains without. "
                    "Compile it with jit_compile=True for an XLA program per "
                    "tower, or the template with False.",
                    stacklevel=2,
                )
            self._use_xla(model.jit_compile and not by_auto)
            self._compile_as_template()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras would take them for what is no input.
        refuse_per_tower([*args, *kwargs.values()], "call", self.on_lost)
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Nothing: the template is built from its first inputs, in `call`."""
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The gathered outputs, like the template's."""
        if len(args) == 1:
            checks.check_given(self.template, args[0])
        signature = call_signature(self.template)
        if (
            kwargs.get("mask", ()) is None
            and "mask" not in signature.parameters
        ):
            kwargs.pop("mask")  # of a subclass, whose `call` has one
        call = model_call(args, kwargs, self.whole, signature)
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
        own = keras_compile.overridden(self.template, ("compile",))
        keras_s = () if own else args  # an own one takes what it likes
        eagerly = kwargs.get("run_eagerly", keras_s[5:6] == (True,))
        jit = kwargs.get("jit_compile", [*keras_s[7:8], "auto"][0])
        if jit == "auto" and tf.config.list_physical_devices("GPU"):
            logging.info(
                "Towers of %r run without XLA, which Keras turns on by itself on "
                "GPUs: nobody has measured yet that it helps them. Say "
                "compile(jit_compile=True) to try.",
                self.name,
            )
        self._use_xla(jit is True and not eagerly)
        if jit is True:  # not of the step, which is on several devices
            if keras_s[7:]:
                args = (*args[:7], False, *args[8:])
            else:
                kwargs["jit_compile"] = False
        if own:
            # It keeps what it is given where the template's methods look.
            self.template.compile(*args, **kwargs)
            if self.template.compiled:
                self._compile_as_template()
        else:
            super().compile(*args, **kwargs)
            self._place()

    def _use_xla(self, jit: bool) -> None:
        """Makes each tower an XLA program from now on, or not."""
        if jit:
            pins = self.placement.layer_devices
            graph = layer_graph.LayerGraph(self.template, (), pins)
            checks.check_compilable(graph, graph.talks(True, None))
        self.jit_towers = jit

    def _compile_as_template(self) -> None:
        """Takes on what the template was compiled with, very objects."""
        super().compile(**keras_compile.compile_arguments(self.template))
        self._is_lent = True
        self._place()

    def _place(self) -> None:
        """Puts the optimizers beside the parameters, and the loss somewhere."""
        place_variables(self, self.placement)
        # Now, since Keras replaces what it was given when it is built.
        self.loss_belongs_there = belongs_on_towers(self)

    def _make_train_function(self) -> None:
        super().make_train_function(force=True)
        function = self._beside_outputs(self.train_function)
        function = self._ahead(self.train_step, function)
        self.train_function = self._started(function)

    def renew_functions(self) -> None:
        """Makes functions again that read variables which have moved since.

        None that Keras has is dropped: a callback may be the one who asks, and
        `fit` goes on with what it has.
        """
        if not self.tower_calls.any_moved():
            return
        if self.train_function is not None:
            self._make_train_function()
        if self.test_function is not None:
            self._make_other_function("test_function", True)
        if self.predict_function is not None:
            self._make_other_function("predict_function", True)

    def _make_other_function(self, name: str, force: bool) -> None:
        """As Keras makes the one of this name, and started as this model is."""
        if force or getattr(self, name) is None:
            getattr(super(), f"make_{name}")(force=True)
            function = self._fed(getattr(self, name))
            if name == "test_function":
                function = self._ahead(self.test_step, function)
            setattr(self, name, self._started(function))

    def _ahead(self, step: Any, function: Any) -> Any:
        """The function, which reads a batch ahead if that is asked."""
        if not self.prefetch:
            return function
        return self.read_ahead.function(step, function)

    def _started(self, function: Any) -> Any:
        """The function, which TensorFlow does not rewrite for a quick start."""
        if not self.quick_start:
            return function

        @functools.wraps(function)
        def started(*args: Any) -> Any:
            with unoptimized():
                return function(*args)

        return started

    def _beside_outputs(self, function: Any) -> Any:
        """The function, with what has no device on the output device.

        Or on this process, if that is of another one: TensorFlow would wait for
        what a step returns with Python locked, and the step for a generator.
        """
        function = self._fed(function)
        outputs = str(self.placement.output_device)
        device = HOST_HERE if process_of(outputs) else outputs

        @functools.wraps(function)
        def placed(*args: Any) -> Any:
            with tf.device(device):
                return function(*args)

        return placed

    def _fed(self, function: Any) -> Any:
        """The function, with arrays taken to where batches are split.

        They would become tensors on the device of the step, or the default one.
        """

        @functools.wraps(function)
        def fed(data: Any) -> Any:
            return function(at_inputs(data, self.placement.input_device))

        return fed

    def _gather_metrics(self) -> bool:
        """Moves compiled metrics to the outputs; whether any moved."""
        if not self.compiled:
            return False
        device = str(self.placement.output_device)
        return any(
            [
                move_variable(v, device)
                for v in keras_compile.metric_variables(self)
            ]
        )

    def make_train_function(self, force: bool = False) -> None:
        self.catch_up()
        self._check_devices()
        self._check_steps()
        self.renew_functions()
        self.build_slots()
        if self._gather_metrics() or force or self.train_function is None:
            self._make_train_function()

    def build_slots(self) -> None:
        """Makes slots eagerly, and not while the step is traced.

        Not of one that Keras gave to a template which has others of its own.
        """
        if (
            self.optimizer
            and not self.optimizer.built
            and not keras_compile.overridden(self.template, ("compile",))
            and keras_layers.is_built(self.template)
            and self.trainable_variables
        ):
            self.optimizer.build(self.trainable_variables)
            place_slots(self, self.placement)

    def make_test_function(self, force: bool = False) -> Any:
        self._check_steps()
        self.renew_functions()
        self._make_other_function(
            "test_function", self._gather_metrics() or force
        )
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        self.renew_functions()
        self._make_other_function("predict_function", force)
        return self.predict_function

    def _check_devices(self) -> None:
        """Raises where training would not be on the placement's devices."""
        where = self.placement
        missing = absent(
            [
                *where.devices,
                where.input_device,
                str(where.output_device),
                *tf.nest.flatten(list(where.layer_devices.values())),
                *map(keras_layers.device_of, self.template.variables),
            ]
        )
        if missing:
            raise RuntimeError(
                f"The model is placed on {', '.join(missing)}, but TensorFlow "
                'sees no such device here (`available="any"` let it through), '
                "so it would train somewhere else. Expected devices that are "
                "here; make a TowerModel of the `template` with those. "
                "placement_plan, export and predictions work without them."
            )

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        if self.merge == "concat":
            if not keras_layers.is_built(self.template):
                self.template(*args, **kwargs)
                self.tower_calls.placed.place_new(self)
            if (
                "training"
                not in inspect.signature(self.template.call).parameters
            ):
                kwargs.pop("training", None)
            return self.template.compute_output_spec(*args, **kwargs)
        return super().compute_output_spec(*args, **kwargs)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the placement, then the template's summary."""
        (kwargs.get("print_fn") or print)(str(self.placement))
        self.template.summary(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TowerModel":
        copied = TowerModel(
            copy.deepcopy(self._lent(), memo),
            self.placement,
            self.merge,
            self.loss_on_towers,
            self.whole,
            self.quick_start,
            self.on_lost,
            self.prefetch,
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
        if format != "tf_saved_model":
            if isinstance(placement, Placement):
                raise ValueError(
                    f"A file of format {format!r} can hold no `placement`. "
                    'Expected format="tf_saved_model"; or leave it out.'
                )
            self.template.export(
                filepath,
                format=format,
                verbose=verbose,
                input_signature=input_signature,
                **kwargs,
            )
            return
        if kwargs:
            of_jax = set(kwargs) <= {"is_static", "jax2tf_kwargs"}
            raise (ValueError if of_jax else TypeError)(  # as Keras has it
                f"export does not take {', '.join(kwargs)} with format "
                '"tf_saved_model" of TensorFlow. Leave that out.'
            )
        if placement == "own":
            placement = self.placement
        export_towers(
            self.template,
            filepath,
            placement,
            input_signature,
            self.merge,
            whole=self.whole,
        )
        if verbose:
            print(f"Saved towers at {filepath!r}: {placement}")
