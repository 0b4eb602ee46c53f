"""keras_saving: a Keras model that passes for another, its template.

Keras's savers go by an object's class, `_obj_type`, attributes and config, and
TensorFlow's checkpoints by `_trackable_children`. All of them see the template
here, so that what they write is the plain model. Its trainer finds metrics that
are attributes in `_metrics`, and `clone_model` a model's inputs in `_layers`. There is
no public word for it; `keras_saving_test.py` and `own_class_test.py` fail when one
changes.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import keras

from towers.foreign import keras_compile, keras_self
from towers.foreign.keras_self import TemplateSelf

# In what a compiled model counts.
_COUNTED = ("_loss_tracker", "_compile_metrics")


def overridden(
    model: keras.Layer, names: Sequence[str], base: type = keras.Model
) -> list[str]:
    """Which methods of `base` the class of a model, or a layer, replaces."""
    return [
        name
        for name in names
        if inspect.getattr_static(type(model), name)
        is not inspect.getattr_static(base, name)
    ]


class TemplateProxy(keras.Model):
    """What does not depend on towers: the face of the template.

    Attributes that the proxy has not, those of a class of yours, are the
    template's, to get and to set. `isinstance` says yes for the template's
    class, too. Methods and properties of such a class have a `TemplateSelf`.
    """

    template: keras.Model
    jit_asked: Any = "auto"  # `compile`'s `jit_compile`, as a file is to say
    _is_lent = False

    def __getattr__(self, name: str) -> Any:
        template = vars(self).get("template")
        if template is None or name.startswith("__"):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
            )
        own = keras_self.own_attribute(template, name)
        if keras_self.is_absent(own):
            return getattr(template, name)
        return self.bound(own)

    def _method(self, name: str) -> Any:
        """Keras's method or property, or that of the template's class."""
        template = vars(self).get("template")
        own = of_keras = inspect.getattr_static(keras.Model, name)
        if template is not None:
            own = inspect.getattr_static(type(template), name)
        if own is of_keras:
            return of_keras.__get__(self, type(self))
        return self.bound(own)

    def bound(self, own: Any) -> Any:
        """A method, or the value of a property, of the template's class."""
        view = vars(self).get("_template_self")
        if view is None:
            view = TemplateSelf(self)
            object.__setattr__(self, "_template_self", view)
        return own.__get__(view, type(self.template))

    def __setattr__(self, name: str, value: Any) -> None:
        template = vars(self).get("template")
        mine = name in vars(self) or hasattr(type(self), name)
        if (
            template is None
            or mine
            or keras_self.is_kept_by_keras(name)
            or not hasattr(template, name)
        ):
            super().__setattr__(name, value)
        else:
            setattr(template, name, value)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(vars(self).get("template", self))

    def __dir__(self) -> list[str]:
        return dir(vars(self).get("template", type(self)))

    @property
    def _metrics(self) -> list[keras.metrics.Metric]:
        """Those that are attributes, the template's too."""
        mine, template = (
            vars(self).get("_metrics", []),
            vars(self).get("template"),
        )
        return mine if template is None else [*mine, *template._metrics]

    @_metrics.setter
    def _metrics(self, metrics: list[keras.metrics.Metric]) -> None:
        self.__dict__["_metrics"] = metrics

    @property
    def _layers(self) -> list[keras.Layer]:
        """This one's own, behind the first of a sequential template.

        Keras's `clone_model` asks that for the inputs, which are no layer of ours.
        """
        mine = vars(self).get("_layers", [])
        template = vars(self).get("template")
        if not isinstance(template, keras.Sequential):
            return mine
        first = template._layers[:1]
        return [
            *(x for x in first if isinstance(x, keras.layers.InputLayer)),
            *mine,
        ]

    @_layers.setter
    def _layers(self, layers: list[keras.Layer]) -> None:
        self.__dict__["_layers"] = layers

    def _obj_type(self) -> str:
        return self._lent()._obj_type()

    def _trackable_children(self, *args: Any, **kwargs: Any) -> Any:
        if "template" not in vars(self):
            return super()._trackable_children(*args, **kwargs)
        return self._lent()._trackable_children(*args, **kwargs)

    def _lent(self) -> keras.Model:
        """The template, compiled as this model is, with its optimizer."""
        if self.compiled and not self._is_lent:
            self.template.compile(
                **keras_compile.compile_arguments(self),
                jit_compile=self.jit_asked,
            )
            self._share_metrics(self, self.template)
            self._is_lent = True
        return self.template

    def _share_metrics(self, of: keras.Model, model: keras.Model) -> None:
        if vars(self).get("merge") == "concat":  # else outputs are others
            keras_compile.share_metrics(of, model)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        template = self.template
        metrics = list(template._metrics)
        counted = {name: getattr(template, name, None) for name in _COUNTED}
        super().compile(*args, **kwargs)
        # Keras 3.7 lets models inside of a compiled one forget their metrics.
        template._metrics[:] = metrics
        vars(template).update(counted)
        self._is_lent = False

    def get_compile_config(self) -> Any:
        """The template's, once that is compiled as this model is."""
        return self._lent().get_compile_config()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles this model, in the way of the template's class."""
        self.bound(type(self.template).compile_from_config)(config)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantizes the template, in the way of its class."""
        self.template.quantize(*args, **kwargs)
        self.train_function = None
        self.test_function = None
        self.predict_function = None

    def get_config(self) -> dict[str, Any]:
        """The template's."""
        return self.template.get_config()

    def get_build_config(self) -> Any:
        """The template's."""
        return self.template.get_build_config()

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Saves the plain model, with the optimizer if there is one."""
        self._lent().save(*args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        """Saves the plain model's weights, and the optimizer's state."""
        self._lent().save_weights(*args, **kwargs)

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """Loads the plain model's weights, and the optimizer's state."""
        self._lent().load_weights(*args, **kwargs)

    def get_weights(self) -> Any:
        """The template's, whose layers in pieces have whole ones."""
        return self.template.get_weights()

    def set_weights(self, weights: Any) -> None:
        self.template.set_weights(weights)

    def __reduce__(self) -> Any:
        """Pickles the plain model."""
        return self._lent().__reduce__()

    @property
    def path(self) -> Any:
        return self.template.path

    @property
    def layers(self) -> list[keras.Layer]:
        """The template's layers."""
        return self.template.layers

    @property
    def inputs(self) -> Any:
        return self.template.inputs

    @property
    def outputs(self) -> Any:
        return self.template.outputs

    @property
    def output_names(self) -> list[str]:
        return self.template.output_names

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Keras's list, or what the template's class says."""
        if overridden(self.template, ("metrics",)):
            return self.bound(type(self.template).metrics)
        return super().metrics


def _done_as_its_class_does(name: str) -> Any:
    """What asks the template's class, which may do it in its own way."""
    of_keras = inspect.getattr_static(keras.Model, name)
    if isinstance(of_keras, property):
        return property(
            lambda self: self._method(name), of_keras.fset, doc=of_keras.__doc__
        )

    @functools.wraps(of_keras)
    def do(self: TemplateProxy, *args: Any, **kwargs: Any) -> Any:
        return self._method(name)(*args, **kwargs)

    return do


for _name in (
    "evaluate",
    "fit",
    "losses",
    "make_predict_function",
    "make_test_function",
    "make_train_function",
    "metrics_names",
    "non_trainable_variables",
    "non_trainable_weights",
    "predict",
    "predict_on_batch",
    "test_on_batch",
    "train_on_batch",
    "trainable_variables",
    "trainable_weights",
    "variables",
    "weights",
):
    setattr(TemplateProxy, _name, _done_as_its_class_does(_name))


def _asked_of_template(name: str) -> Any:
    """A method that asks the template, whose class may have one of its own."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def ask(self: TemplateProxy, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._lent(), name)(*args, **kwargs)

    return ask


for _name in (
    "count_params",
    "get_layer",
    "get_quantization_layer_structure",
    "to_json",
):
    if hasattr(keras.Model, _name):  # the structure is of Keras 3.12
        setattr(TemplateProxy, _name, _asked_of_template(_name))
