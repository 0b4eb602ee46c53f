"""worked_out: placements that are made of what there is.

On devices of a kind, or of workers; or as the layers of a model are, or a map of
Keras's lays them out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from towers.placement import device_names
from towers.placement.from_layers import made_where
from towers.placement.from_layout_map import laid_out, mesh_of
from towers.placement.layer_devices import LayerDevices
from towers.placement.policies import POLICIES, Policy

Made = TypeVar("Made", bound="WorkedOut")


class WorkedOut:
    """The ways to a `Placement` besides saying all of it."""

    @classmethod
    def gpus(
        cls: type[Made],
        n: int | None = None,
        *,
        parameter_device: str | Policy = "/CPU:0",
        weights: Sequence[float] | None = None,
        input_device: str = "/CPU:0",
        output_device: str | None = None,
        available: Sequence[str] | str | None = None,
        layer_devices: LayerDevices | None = None,
        reasons: Sequence[str] = (),
    ) -> Made:
        """One tower on each of the first `n` GPUs, by default on all.

        Looking for GPUs starts TensorFlow: set memory growth before.

        Args:
          n: how many GPUs, at least 1; None takes all that TensorFlow sees.
          parameter_device, ..., reasons: as for `Placement`.

        Raises:
          TypeError: `n` is no integer.
          ValueError: `n` is below 1, or there are fewer GPUs.
        """
        device_names.check_count("n", n, optional=True)
        names = device_names.own("GPU")
        if not names:
            raise ValueError(
                f"`n` asks for {n or 'all'} GPUs, but TensorFlow sees none. If "
                "there is one, `pip install tensorflow[and-cuda]` brings what it "
                "needs, and CUDA_VISIBLE_DEVICES must not hide it. If there is "
                "none, run the same towers on logical CPU devices with "
                f"Placement.cpus({n or 2})."
            )
        if len(names) < (n or 1):
            raise ValueError(
                f"`n` asks for {n or 'all'} GPUs, but TensorFlow sees "
                f"{len(names)}. Ask for fewer, or run the same towers on "
                f"logical CPU devices with Placement.cpus({n or 2})."
            )
        return _placement_of(
            cls,
            names[:n],
            parameter_device=parameter_device,
            weights=weights,
            input_device=input_device,
            output_device=output_device,
            available=available,
            layer_devices=layer_devices,
            reasons=reasons,
        )

    @classmethod
    def cpus(
        cls: type[Made],
        n: int,
        *,
        parameter_device: str | Policy = "/CPU:0",
        weights: Sequence[float] | None = None,
        input_device: str = "/CPU:0",
        output_device: str | None = None,
        available: Sequence[str] | str | None = None,
        layer_devices: LayerDevices | None = None,
        reasons: Sequence[str] = (),
    ) -> Made:
        """One tower on each of `n` logical CPU devices of this machine.

        If TensorFlow has not started yet, the devices are made; this starts
        it. They share the machine's cores, so they show placement and
        transfers on a laptop rather than the speed of separate devices.

        >>> towers.Placement.cpus(2).devices
        ('/CPU:0', '/CPU:1')

        Args:
          n: how many, at least 1.
          parameter_device, ..., reasons: as for `Placement`.

        Raises:
          TypeError: `n` is no integer.
          ValueError: `n` is below 1.
          RuntimeError: TensorFlow has started with fewer CPU devices.
        """
        device_names.check_count("n", n)
        host = tf.config.list_physical_devices("CPU")[0]
        devices = tf.config.get_logical_device_configuration(host) or ()
        if len(devices) < n:
            one = tf.config.LogicalDeviceConfiguration()
            try:
                tf.config.set_logical_device_configuration(host, [one] * n)
            except RuntimeError:  # TensorFlow has started: take what is there
                pass
        names = device_names.own("CPU")
        if len(names) < n:
            raise RuntimeError(
                f"Placement.cpus({n}) needs {n} logical CPU devices, but "
                f"TensorFlow has already started with {len(names)}, and they "
                "cannot be added later. Call it before anything that uses a "
                f"tensor or a model, or ask for at most {len(names)}."
            )
        return _placement_of(
            cls,
            names[:n],
            parameter_device=parameter_device,
            weights=weights,
            input_device=input_device,
            output_device=output_device,
            available=available,
            layer_devices=layer_devices,
            reasons=reasons,
        )

    @classmethod
    def from_layers(
        cls: type[Made],
        model: Any,
        devices: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Made:
        """Each layer where its variables are, as `tf.device` has made them.

        Plain Keras runs the ops of layers that were made under `tf.device` on
        the default device. Here they run beside their variables, which stay
        where they are. Layers without variables run on the tower.

        >>> x = keras.Input([3])
        >>> with tf.device("/CPU:1"):
        ...     y = keras.layers.Dense(4, name="low")(x)
        >>> with tf.device("/CPU:0"):
        ...     z = keras.layers.Dense(2, name="high")(y)
        >>> placement = towers.Placement.from_layers(keras.Model(x, z))
        >>> placement.devices, placement.layer_devices
        (('/CPU:1',), {'low': '/CPU:1', 'high': '/CPU:0'})

        Args:
          model: a built `keras.Model`.
          devices: those of the towers; by default one tower, on the device that
            holds most bytes of variables.
          **kwargs: as for `Placement`. By default the first tower's device has
            what is no layer's.

        Raises:
          TypeError: `model` is no Keras model, or `layer_devices` are given.
          ValueError: it is not built, or a layer's variables are on several
            devices.
        """
        where, held = made_where(model)
        _check_own("from_layers", kwargs, "layer_devices")
        if devices is None:
            devices = [device for device, _ in held.most_common(1)]
            devices = devices or ["/CPU:0"]
        kwargs.setdefault("parameter_device", devices[0])
        kwargs.update(layer_devices=where)
        return _placement_of(cls, devices, **kwargs)

    @classmethod
    def from_layout_map(
        cls: type[Made],
        model: Any,
        layout_map: Any,
        batch_dim_name: str | None = None,
        **kwargs: Any,
    ) -> Made:
        """Layers in pieces, and towers, as a `keras.distribution.LayoutMap` says.

        Keras itself does not heed it on TensorFlow. Along the batch's axis of its
        mesh are the towers, along the other the pieces of their layers; a layer
        that it does not name runs on the first device of its tower.

        >>> mesh = keras.distribution.DeviceMesh(
        ...     (1, 2), ["batch", "model"], ["cpu:0", "cpu:1"])
        >>> layout_map = keras.distribution.LayoutMap(mesh)
        >>> layout_map[".*up/kernel"] = (None, "model")
        >>> model = keras.Sequential(
        ...     [keras.Input([3]), keras.layers.Dense(4, name="up")])
        >>> towers.Placement.from_layout_map(model, layout_map).layer_devices
        {'up': column_wise(['/CPU:0', '/CPU:1'])}

        Args:
          model: a built `keras.Model`.
          layout_map: keys are paths of variables, or match them whole. Attention
            is cut by heads: query, key, value and output.
          batch_dim_name: the axis of the batch, as for `ModelParallel`; by default
            "batch", or the first of two.
          **kwargs: as for `Placement`. By default the first device has what is in
            no pieces; of several towers, all variables are spread over those of
            the first. `reasons` say what of the map is not done, as what is cut
            along the batch's axis.

        Raises:
          TypeError: an argument has the wrong type, or devices are given.
          ValueError: the model is not built; or the map has a layout of no
            variable, over an axis that is not there, or that cannot be.
        """
        _check_own("from_layout_map", kwargs, "devices", "layer_devices")
        mesh = mesh_of(layout_map, batch_dim_name)
        model = getattr(model, "template", model)
        where, reasons = laid_out(model, layout_map, mesh)
        home: Any = mesh.rows[0][0]
        if where and len(mesh.rows) > 1:
            home = POLICIES["balanced"](mesh.rows[0])
        kwargs.setdefault("parameter_device", home)
        reasons += kwargs.pop("reasons", ())
        devices = [row[0] for row in mesh.rows]
        kwargs.update(layer_devices=where, reasons=reasons)
        return _placement_of(cls, devices, **kwargs)

    @classmethod
    def workers(
        cls: type[Made],
        cluster: Any,
        kind: str | None = None,
        *,
        parameter_device: str | Policy = "/CPU:0",
        weights: Sequence[float] | None = None,
        input_device: str = "/CPU:0",
        output_device: str | None = None,
        available: Sequence[str] | str | None = None,
        layer_devices: LayerDevices | None = None,
        reasons: Sequence[str] = (),
    ) -> Made:
        """One tower on each device of the workers of a cluster.

        >>> towers.Placement.workers(["10.0.0.2:2222"])
        Traceback (most recent call last):
          ...
        TypeError: `cluster` must be a towers.Cluster; got ['10.0.0.2:2222']. Write
        towers.Cluster([...]).

        Args:
          cluster: a `Cluster`.
          kind: "CPU" or "GPU"; None takes GPUs if any worker has one, else CPUs.
          parameter_device, ..., reasons: as for `Placement`. By default parameters,
            inputs and outputs are on this process.

        Raises:
          TypeError: `cluster` is no `Cluster`.
          ValueError: the workers have no device of this kind.
        """
        if not callable(getattr(cluster, "devices", None)):
            raise TypeError(
                f"`cluster` must be a towers.Cluster; got {cluster!r}. Write "
                "towers.Cluster([...])."
            )
        kinds = [kind] if kind is not None else ["GPU", "CPU"]
        each = [cluster.devices(one) for one in kinds]
        names: list[str] = next(filter(None, each), [])
        if not names:
            raise ValueError(
                f"`kind` is {kind!r}, but the workers have "
                f"{', '.join(cluster.devices()) or 'no devices'}. Expected a "
                "kind that they have, or None."
            )
        return _placement_of(
            cls,
            names,
            parameter_device=parameter_device,
            weights=weights,
            input_device=input_device,
            output_device=output_device,
            available=available,
            layer_devices=layer_devices,
            reasons=reasons,
        )


def _placement_of(
    kind: type[Made], devices: Sequence[str], **kwargs: Any
) -> Made:
    """A placement of a kind, on devices."""
    make: Any = kind
    return make(devices, **kwargs)


def _check_own(name: str, kwargs: Mapping[str, Any], *own: str) -> None:
    """Raises if a function is given what it works out itself."""
    for argument in own:
        if argument in kwargs:
            raise TypeError(
                f"{name} works out `{argument}` itself; got "
                f"{kwargs[argument]!r}. For others, write "
                f"dataclasses.replace(placement, {argument}=...)."
            )
